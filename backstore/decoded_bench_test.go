package backstore

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

const benchDevice = 64 << 20

// benchContent is the content of a layer as far as this machine has one: files
// of Python's library and of /usr/bin, in whole 4 KiB blocks, less what
// compresses badly; generated where there is too little.
var benchContent = sync.OnceValue(func() []byte {
	var all []byte
	for _, root := range []string{"/usr/lib/python3", "/usr/lib/python3.11", "/usr/lib/python3.13", "/usr/bin"} {
		_ = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || len(all) >= benchDevice {
				return nil
			}
			if fi, err := d.Info(); err != nil || fi.Size() > 8<<20 {
				return nil
			}
			p, _ := os.ReadFile(name)
			all = append(all, p...)
			all = append(all, make([]byte, -len(all)&4095)...)
			return nil
		})
	}
	r := rand.New(rand.NewPCG(3, 3))
	for len(all) < benchDevice {
		all = append(all, byte(r.IntN(5)))
	}
	return all[:benchDevice]
})

// newBenchImage is one layer of benchContent.
func newBenchImage(b *testing.B, o *zfile.Options) *testImage {
	b.Helper()
	im := &testImage{device: benchContent()}
	f, err := os.Create(filepath.Join(b.TempDir(), "upper"))
	require.NoError(b, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: benchDevice})
	require.NoError(b, err)
	defer w.Close()
	for off := 0; off < benchDevice; off += 1 << 20 {
		_, err = w.WriteAt(im.device[off:off+1<<20], int64(off))
		require.NoError(b, err)
	}
	out, err := os.Create(filepath.Join(b.TempDir(), "blob"))
	require.NoError(b, err)
	defer out.Close()
	z, err := zfile.NewWriter(out, o)
	require.NoError(b, err)
	require.NoError(b, w.Commit(b.Context(), z, lsmt.CommitOptions{}))
	require.NoError(b, z.Close())
	p, err := os.ReadFile(out.Name())
	require.NoError(b, err)
	im.origins = []*origin{{data: p}}
	return im
}

// openWith opens the image in a cache that has all of it.
func (im *testImage) openWith(b *testing.B, o CacheOptions) *Image {
	b.Helper()
	c := openTestCache(b, b.TempDir(), o)
	blob, err := c.Blob(digest.FromBytes(im.origins[0].data), int64(len(im.origins[0].data)), im.origins[0])
	require.NoError(b, err)
	open, err := OpenImage(b.Context(), []LayerSource{{Blob: blob}})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, open.Close()) })
	require.NoError(b, open.Complete(b.Context(), nil))
	return open
}

// BenchmarkDecoded reads an image that is on the node, by turns without and
// with decoded blocks kept: in each loop some hundred reads at the same places
// of either, in processor time. Random reads go to places all over 64 MiB, twice what is kept;
// near ones to 16 places around each of these, within 64 KiB.
func BenchmarkDecoded(b *testing.B) {
	patterns := []struct {
		name string
		n    int
		next func(r *rand.Rand, i int) int64
	}{
		{"random 4K", 4 << 10, func(r *rand.Rand, _ int) int64 { return r.Int64N(benchDevice>>12) << 12 }},
		{"near 4K", 4 << 10, near()},
		{"sequential 4K", 4 << 10, func(_ *rand.Rand, i int) int64 { return int64(i) << 12 % benchDevice }},
		{"sequential 128K", 128 << 10, func(_ *rand.Rand, i int) int64 { return int64(i) << 17 % benchDevice }},
	}
	for _, algo := range []zfile.Algo{zfile.LZ4, zfile.Zstd} {
		for _, kb := range []int{4, 16, 64} {
			model := newBenchImage(b, &zfile.Options{Algo: algo, BlockSize: kb << 10})
			off := model.openWith(b, CacheOptions{DecodedBytes: -1})
			on := model.openWith(b, CacheOptions{})
			for _, p := range patterns {
				b.Run(fmt.Sprintf("%s/%dK/%s", algo, kb, p.name), func(b *testing.B) {
					on.layers[0].blob.cache.decoded.close()
					benchPaired(b, off, on, p.n, p.next)
				})
			}
		}
	}
}

// near reads 16 times within 64 KiB, then goes elsewhere.
func near() func(*rand.Rand, int) int64 {
	var base int64
	return func(r *rand.Rand, i int) int64 {
		if i%16 == 0 {
			base = r.Int64N(benchDevice>>16) << 16
		}
		return base + r.Int64N(16)<<12
	}
}

// threadTime is the processor time of this thread: other programs on the
// machine change it less than they change the time of day.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

func benchPaired(b *testing.B, off, on *Image, n int, next func(*rand.Rand, int) int64) {
	const batch = 256
	r := rand.New(rand.NewPCG(11, 11))
	p := make([]byte, n)
	var took [2]time.Duration
	var offs [batch]int64
	i, turn := 0, 0
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b.ReportAllocs()
	for b.Loop() {
		for j := range offs {
			offs[j] = next(r, i)
			i++
		}
		for k := range 2 {
			which := (k + turn) % 2
			im := [2]*Image{off, on}[which]
			begin := threadTime()
			for _, at := range offs {
				if _, err := im.ReadAt(p, at); err != nil {
					b.Fatal(err)
				}
			}
			took[which] += threadTime() - begin
		}
		turn++
	}
	for k, name := range []string{"off-µs/read", "on-µs/read"} {
		b.ReportMetric(float64(took[k].Nanoseconds())/1e3/float64(batch)/float64(b.N), name)
	}
	b.ReportMetric(took[0].Seconds()/took[1].Seconds(), "off/on")
}
