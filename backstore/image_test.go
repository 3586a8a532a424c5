package backstore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

const testDevice = 8 << 20

// testImage is a stack of layers as blobs, and the device that they make.
type testImage struct {
	origins []*origin
	device  []byte
}

// newTestImage writes layers at random, and a model of them.
func newTestImage(t testing.TB, layers int, o *zfile.Options) *testImage {
	t.Helper()
	im := &testImage{device: make([]byte, testDevice)}
	r := rand.New(rand.NewPCG(7, uint64(layers)))
	for range layers {
		im.origins = append(im.origins, &origin{data: im.addLayer(t, r, o)})
	}
	return im
}

func (im *testImage) addLayer(t testing.TB, r *rand.Rand, o *zfile.Options) []byte {
	f, err := os.Create(filepath.Join(t.TempDir(), "upper"))
	require.NoError(t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: testDevice})
	require.NoError(t, err)
	defer w.Close()
	for range 40 {
		n := (1 + r.Int64N(60)) * 4096
		off := r.Int64N((testDevice-n)/4096) * 4096
		p := im.device[off : off+n]
		if r.IntN(5) == 0 {
			clear(p)
			require.NoError(t, w.Discard(off, n))
			continue
		}
		for i := range p {
			p[i] = byte(r.IntN(4)) // compressible
		}
		_, err := w.WriteAt(p, off)
		require.NoError(t, err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	require.NoError(t, err)
	defer out.Close()
	z, err := zfile.NewWriter(out, o)
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), z, lsmt.CommitOptions{}))
	require.NoError(t, z.Close())
	p, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	return p
}

func (im *testImage) open(t testing.TB, c *Cache) *Image {
	t.Helper()
	var sources []LayerSource
	for _, o := range im.origins {
		b, err := c.Blob(digest.FromBytes(o.data), int64(len(o.data)), o)
		require.NoError(t, err)
		sources = append(sources, LayerSource{Blob: b})
	}
	open, err := OpenImage(t.Context(), sources)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, open.Close()) })
	return open
}

func (im *testImage) requests() (n int64) {
	for _, o := range im.origins {
		n += o.requests.Load()
	}
	return n
}

func TestImageReadsWhatWasWritten(t *testing.T) {
	for name, o := range map[string]*zfile.Options{
		"lz4 4 KiB in tar": {Tar: true},
		"zstd 16 KiB":      {Algo: zfile.Zstd, BlockSize: 16 << 10},
		"lz4 no checksums": {NoVerify: true},
	} {
		t.Run(name, func(t *testing.T) {
			model := newTestImage(t, 4, o)
			im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
			require.EqualValues(t, testDevice, im.Size())
			r := rand.New(rand.NewPCG(1, 1))
			var wg sync.WaitGroup
			for range 4 {
				seed := r.Uint64()
				wg.Add(1)
				go func() {
					defer wg.Done()
					r := rand.New(rand.NewPCG(seed, 1))
					for range 100 {
						off := r.Int64N(testDevice)
						p := make([]byte, min(r.Int64N(200_000), testDevice-off))
						if _, err := im.ReadAt(p, off); err != nil || !bytes.Equal(p, model.device[off:off+int64(len(p))]) {
							t.Errorf("read %d at %d: %v", len(p), off, err)
							return
						}
					}
				}()
			}
			wg.Wait()
			all := make([]byte, testDevice)
			_, err := im.ReadAt(all, 0)
			require.NoError(t, err)
			require.True(t, bytes.Equal(model.device, all))
			_, err = im.ReadAt(make([]byte, 10), testDevice-5)
			require.ErrorIs(t, err, io.EOF)
			require.NoError(t, im.Verify(t.Context()))
		})
	}
}

func TestOpeningALayerIsOneRequest(t *testing.T) {
	model := newTestImage(t, 6, &zfile.Options{Tar: true})
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	require.Len(t, im.Layers(), 6)
	for i, o := range model.origins {
		require.EqualValues(t, 1, o.requests.Load(), "layer %d", i)
	}
}

func TestTailIsWhatOpeningReads(t *testing.T) {
	for name, model := range map[string]*testImage{"small": newTestImage(t, 1, &zfile.Options{Tar: true}), "big": bigImage(t)} {
		t.Run(name, func(t *testing.T) {
			o := model.origins[0]
			size := int64(len(o.data))
			tail, err := TailOf(bytes.NewReader(o.data), size)
			require.NoError(t, err)
			c := openTestCache(t, t.TempDir(), CacheOptions{})
			b := openTestBlob(t, c, o)
			im, err := OpenImage(t.Context(), []LayerSource{{Blob: b, Tail: tail}})
			require.NoError(t, err)
			require.EqualValues(t, 1, o.requests.Load())
			require.NoError(t, im.Close())
		})
	}
	_, err := TailOf(bytes.NewReader(testData(5000)), 5000)
	require.Error(t, err)
}

type events struct {
	mu   sync.Mutex
	list []ReadEvent
}

func (e *events) ObserveRead(v ReadEvent) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, v)
}

// bigImage is one layer whose blob is far longer than the tail.
func bigImage(t testing.TB) *testImage { return oneLayer(t, testData(testDevice), nil) }

// oneLayer is an image of one layer with this content.
func oneLayer(t testing.TB, device []byte, o *zfile.Options) *testImage {
	im := &testImage{device: device}
	f, err := os.Create(filepath.Join(t.TempDir(), "upper"))
	require.NoError(t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: testDevice})
	require.NoError(t, err)
	defer w.Close()
	_, err = w.WriteAt(im.device, 0)
	require.NoError(t, err)
	out, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	require.NoError(t, err)
	defer out.Close()
	z, err := zfile.NewWriter(out, o)
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), z, lsmt.CommitOptions{}))
	require.NoError(t, z.Close())
	p, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	im.origins = []*origin{{data: p}}
	return im
}

func TestPrefetchIsSeenByDemand(t *testing.T) {
	model := bigImage(t)
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	var seen events
	im.SetObserver(&seen)
	off, n := im.BlobRange(0, 1<<20, 512<<10)
	got, err := im.Prefetch(t.Context(), []Want{{Layer: 0, Off: off, Len: n}}, nil)
	require.NoError(t, err)
	require.Equal(t, 1, got.Requests)
	p := make([]byte, 64<<10)
	_, err = im.ReadAt(p, 1<<20)
	require.NoError(t, err)
	require.Equal(t, model.device[1<<20:1<<20+len(p)], p)
	_, err = im.ReadAt(p, 4<<20)
	require.NoError(t, err)
	require.Len(t, seen.list, 2)
	require.Equal(t, FromPrefetch, seen.list[0].Origin)
	require.Equal(t, FromFetch, seen.list[1].Origin)
	require.Positive(t, seen.list[1].Wait)
	require.EqualValues(t, 1<<20+4096, seen.list[0].Off, "layer space begins with a header")
	s := im.Stats()
	require.InDelta(t, 0.5, s.Coverage(), 0.01)
	require.Positive(t, s.Used)
	require.Less(t, s.Accuracy(), 0.3)

	again, err := im.Prefetch(t.Context(), []Want{{Layer: 0, Off: off, Len: n}}, nil)
	require.NoError(t, err)
	require.Zero(t, again.Requests)
	require.Equal(t, n, again.Here)
	for _, w := range []Want{{Layer: 1, Len: 1}, {Layer: -1}, {Off: -1, Len: 5}, {Off: 1 << 40, Len: 1}, {Len: 1 << 62, Off: 1 << 62}} {
		_, err := im.Prefetch(t.Context(), []Want{w}, nil)
		require.Error(t, err, "%+v", w)
	}
}

func TestDemandJoinsAPrefetch(t *testing.T) {
	model := bigImage(t)
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	gate, asked := make(chan struct{}), make(chan struct{})
	model.origins[0].before = func(int64, int64, Lane) error { close(asked); <-gate; return nil }
	off, n := im.BlobRange(0, 1<<20, 64<<10)
	done := make(chan error)
	go func() {
		_, err := im.Prefetch(context.Background(), []Want{{Off: off, Len: n}}, nil)
		done <- err
	}()
	<-asked
	var seen events
	im.SetObserver(&seen)
	read := make(chan error)
	go func() {
		_, err := im.ReadAt(make([]byte, 4096), 1<<20)
		read <- err
	}()
	b := im.layers[0].blob
	require.Eventually(t, func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.flights) == 1 && b.flights[0].isWanted()
	}, 5*time.Second, time.Millisecond)
	close(gate)
	require.NoError(t, <-read)
	require.NoError(t, <-done)
	require.Equal(t, FromFlight, seen.list[0].Origin)
	require.EqualValues(t, 2, model.origins[0].requests.Load(), "the tail and the prefetch")
}

// A replay whose every request fails leaves a lazy start.
func TestFailingPrefetchHarmsNoRead(t *testing.T) {
	model := bigImage(t)
	synctest.Test(t, func(t *testing.T) {
		im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		broken := errors.New("broken")
		model.origins[0].before = func(_, _ int64, l Lane) error {
			if l == Background {
				return broken
			}
			return nil
		}
		got, err := im.Prefetch(t.Context(), []Want{{Off: 0, Len: 1 << 20}, {Off: 2 << 20, Len: 1 << 20}}, nil)
		require.ErrorIs(t, err, broken)
		require.Equal(t, 2, got.Failed)
		p := make([]byte, testDevice)
		_, err = im.ReadAt(p, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(model.device, p))
	})
}

func TestBadBlockIsFetchedAgain(t *testing.T) {
	model := bigImage(t)
	o := model.origins[0]
	good := o.data
	spoiled := bytes.Clone(good)
	spoiled[5<<20] ^= 0xff
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	o.data = spoiled
	first := true
	o.before = func(off, n int64, _ Lane) error {
		if off <= 5<<20 && 5<<20 < off+n {
			if !first {
				o.data = good
			}
			first = false
		}
		return nil
	}
	p := make([]byte, testDevice)
	_, err := im.ReadAt(p, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(model.device, p))
	require.Positive(t, im.Stats().Corrupt)
}

// What opening a layer reads is fetched again where it was bad, and does not
// stay in the cache where it stays bad.
func TestBadTailIsFetchedAgain(t *testing.T) {
	model := newTestImage(t, 1, &zfile.Options{Algo: zfile.LZ4, Tar: true})
	o := model.origins[0]
	bad := math.MaxInt // so many requests
	o.body = func(p []byte) io.Reader {
		if bad > 0 {
			bad--
			p = bytes.Clone(p)
			for i := range p {
				p[i] = ^p[i]
			}
		}
		return bytes.NewReader(p)
	}
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b, err := c.Blob(digest.FromBytes(o.data), int64(len(o.data)), o)
	require.NoError(t, err)
	_, err = OpenImage(t.Context(), []LayerSource{{Blob: b}})
	require.Error(t, err)
	bad = 0
	require.NoError(t, model.open(t, c).Close())

	bad = 1
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	p := make([]byte, testDevice)
	_, err = im.ReadAt(p, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(model.device, p))
}

func TestBlockThatStaysBadIsAnError(t *testing.T) {
	model := bigImage(t)
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	o := model.origins[0]
	o.data = bytes.Clone(o.data)
	o.data[5<<20] ^= 0xff
	_, err := im.ReadAt(make([]byte, testDevice), 0)
	var bad *zfile.CorruptError
	require.ErrorAs(t, err, &bad)
	require.ErrorContains(t, err, im.Layers()[0].Digest.String())
	require.LessOrEqual(t, bad.Off, int64(5<<20))
	require.Greater(t, bad.Off+bad.Len, int64(5<<20))
}

func TestWritableImage(t *testing.T) {
	model := newTestImage(t, 3, nil)
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	_, err := im.WriteAt(make([]byte, 4096), 0)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	f, err := os.Create(filepath.Join(t.TempDir(), "upper"))
	require.NoError(t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: testDevice})
	require.NoError(t, err)
	im.Writable(w)
	r := rand.New(rand.NewPCG(3, 3))
	for range 300 {
		n := (1 + r.Int64N(20)) * 4096
		off := r.Int64N((testDevice-n)/4096) * 4096
		p := model.device[off : off+n]
		switch r.IntN(4) {
		case 0:
			clear(p)
			require.NoError(t, im.Discard(off, n))
		case 1:
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			_, err := im.WriteAt(p, off)
			require.NoError(t, err)
		default:
			cut := r.Int64N(n) // neither end need be aligned
			got := make([]byte, n-cut-r.Int64N(n-cut))
			_, err := im.ReadAt(got, off+cut)
			require.NoError(t, err)
			require.True(t, bytes.Equal(p[cut:][:len(got)], got))
		}
	}
	require.NoError(t, im.Sync())
	all := make([]byte, testDevice)
	_, err = im.ReadAt(all, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(model.device, all))
}

// TestUpperSurvivesKills changes a writable image by the sector, opens it again
// and again as a killed process has left it, and commits.
func TestUpperSurvivesKills(t *testing.T) {
	model := newTestImage(t, 2, nil)
	dir := t.TempDir()
	path := filepath.Join(dir, "upper")
	w, err := CreateUpper(path, testDevice)
	require.NoError(t, err)
	c := openTestCache(t, filepath.Join(dir, "cache"), CacheOptions{})
	im := model.open(t, c)
	im.Writable(w)
	all := make([]byte, testDevice)
	r := rand.New(rand.NewPCG(5, 5))
	for round := range 6 {
		for range 150 {
			n := (1 + r.Int64N(1+r.Int64N(40))) * 512
			off := r.Int64N((testDevice-n)/512) * 512
			p := model.device[off : off+n]
			if r.IntN(3) == 0 {
				clear(p)
				require.NoError(t, im.Discard(off, n))
				continue
			}
			for i := range p {
				p[i] = byte(round + 10)
			}
			_, err := im.WriteAt(p, off)
			require.NoError(t, err)
		}
		im = model.open(t, c)
		w, err = OpenUpper(path)
		require.NoError(t, err)
		im.Writable(w)
		_, err = im.ReadAt(all, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(model.device, all), "round %d", round)
	}
	var committed bytes.Buffer
	require.NoError(t, w.Commit(t.Context(), &committed, lsmt.CommitOptions{}))
	model.origins = append(model.origins, &origin{data: committed.Bytes()})
	_, err = model.open(t, c).ReadAt(all, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(model.device, all), "committed")
}

func TestComplete(t *testing.T) {
	model := newTestImage(t, 3, nil)
	im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
	require.NoError(t, im.Complete(t.Context(), &CompleteOptions{Jitter: time.Millisecond, Rate: 1 << 30}))
	for _, l := range im.layers {
		require.True(t, l.blob.Verified())
	}
	before := model.requests()
	_, err := im.ReadAt(make([]byte, testDevice), 0)
	require.NoError(t, err)
	require.Equal(t, before, model.requests(), "nothing is left to fetch")
}

func TestOpenImageErrors(t *testing.T) {
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	_, err := OpenImage(t.Context(), nil)
	require.ErrorContains(t, err, "no layers")
	_, err = OpenImage(t.Context(), make([]LayerSource, 256))
	require.ErrorContains(t, err, "at most 255")
	junk := &origin{data: testData(100_000)}
	b := openTestBlob(t, c, junk)
	_, err = OpenImage(t.Context(), []LayerSource{{Blob: b}})
	require.ErrorContains(t, err, "open layer 0: "+b.digest.String())
	_, err = OpenImage(t.Context(), []LayerSource{{Path: filepath.Join(t.TempDir(), "missing")}})
	require.ErrorIs(t, err, os.ErrNotExist)
}

func BenchmarkImageRead4K(b *testing.B) {
	model := bigImage(b)
	im := model.open(b, openTestCache(b, b.TempDir(), CacheOptions{}))
	require.NoError(b, im.Complete(b.Context(), nil))
	p := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 1))
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := im.ReadAt(p, r.Int64N(testDevice/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

type discard struct{}

func (discard) ObserveRead(ReadEvent) {}

// BenchmarkObserve is what an observer costs: compare with the run without.
func BenchmarkObserve(b *testing.B) {
	model := bigImage(b)
	im := model.open(b, openTestCache(b, b.TempDir(), CacheOptions{}))
	require.NoError(b, im.Complete(b.Context(), nil))
	s := &scratch{segs: im.lookup(nil, 1<<20, 4096)}
	for name, o := range map[string]Observer{"without": nil, "with": discard{}} {
		im.SetObserver(o)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				im.report(s, 0)
			}
		})
	}
}
