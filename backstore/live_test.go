package backstore

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/zfile"
)

const (
	childDir  = "REPRISE_TEST_KILLED_DIR"
	childSize = 3<<20 + 77
)

var childRanges = []span{{0, 10}, {1 << 20, 1<<20 + 300_000}, {childSize - 5, childSize}}

// TestKilledChild is not a test of its own: it reads until it is killed.
func TestKilledChild(t *testing.T) {
	dir := os.Getenv(childDir)
	if dir == "" {
		t.Skip("it is started by TestKilledProcessLosesNothing")
	}
	o := &origin{data: testData(childSize)}
	c, err := OpenCache(dir, &CacheOptions{FlushEvery: time.Hour, Log: quiet})
	require.NoError(t, err)
	b := openTestBlob(t, c, o)
	for _, s := range childRanges {
		_, err := b.ReadAt(make([]byte, s.end-s.off), s.off)
		require.NoError(t, err)
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent has ended
}

func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledChild$", "-test.v")
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	for s := bufio.NewScanner(stdout); s.Scan() && s.Text() != "ready"; {
	}
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())

	o := &origin{data: testData(childSize), before: func(int64, int64, Lane) error { return os.ErrNotExist }}
	b := openTestBlob(t, openTestCache(t, dir, CacheOptions{}), o)
	for _, s := range childRanges {
		p := make([]byte, s.end-s.off)
		_, err := b.ReadAt(p, s.off)
		require.NoError(t, err)
		require.True(t, bytes.Equal(o.data[s.off:s.end], p))
	}
	require.Zero(t, o.requests.Load())
	require.NoError(t, b.Close())
}

// liveFixture is a cache directory whose blob was read whole, and not closed.
type liveFixture struct {
	dir string
	o   *origin
	b   *Blob
}

func newLiveFixture(t *testing.T) *liveFixture {
	f := &liveFixture{dir: t.TempDir(), o: &origin{data: testData(1 << 20)}}
	f.b = openTestBlob(t, openTestCache(t, f.dir, CacheOptions{FlushEvery: time.Hour}), f.o)
	_, err := f.b.ReadAt(make([]byte, len(f.o.data)), 0)
	require.NoError(t, err)
	f.o.requests.Store(0)
	return f
}

// another opens the blob as another process would.
func (f *liveFixture) another(t *testing.T, o CacheOptions) *Blob {
	return openTestBlob(t, openTestCache(t, f.dir, o), f.o)
}

// readAll reads the blob and returns how many requests that took.
func (f *liveFixture) readAll(t *testing.T, b *Blob) int64 {
	t.Helper()
	before := f.o.requests.Load()
	p := make([]byte, len(f.o.data))
	_, err := b.ReadAt(p, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(f.o.data, p))
	return f.o.requests.Load() - before
}

func TestProcessesSeeEachOthersChunks(t *testing.T) {
	o := &origin{data: testData(1 << 20)}
	dir := t.TempDir()
	a := openTestBlob(t, openTestCache(t, dir, CacheOptions{}), o)
	b := openTestBlob(t, openTestCache(t, dir, CacheOptions{}), o)
	p := make([]byte, len(o.data))
	_, err := a.ReadAt(p, 0)
	require.NoError(t, err)
	before := o.requests.Load()
	from, err := b.ensure(0, 1<<20, patience{})
	require.NoError(t, err)
	require.Equal(t, FromCache, from)
	require.Equal(t, before, o.requests.Load())
	require.NoError(t, a.Verify(t.Context()))
	require.NoError(t, b.Verify(t.Context()))

	b.Invalidate(0, 4096) // a has read it, whoever comes next has not
	c := openTestBlob(t, openTestCache(t, dir, CacheOptions{}), o)
	require.False(t, c.has(0, 1))
	require.True(t, c.has(4096, 1<<20-4096))
	require.False(t, c.Verified())
	for _, b := range []*Blob{a, b, c} {
		require.NoError(t, b.Close())
	}
}

func TestLiveMapOfSomethingElse(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil    func(t *testing.T, base string)
		requests bool
	}{
		"as it was": {func(*testing.T, string) {}, false},
		"another boot": {func(t *testing.T, base string) {
			p, err := os.ReadFile(base + liveSuffix)
			require.NoError(t, err)
			p[40] ^= 1
			binary.LittleEndian.PutUint32(p[60:], crc32.Checksum(p[:60], castagnoli))
			require.NoError(t, os.WriteFile(base+liveSuffix, p, 0o600))
		}, true},
		"bad checksum": {func(t *testing.T, base string) {
			p, err := os.ReadFile(base + liveSuffix)
			require.NoError(t, err)
			p[60] ^= 1
			require.NoError(t, os.WriteFile(base+liveSuffix, p, 0o600))
		}, true},
		"cut": {func(t *testing.T, base string) { require.NoError(t, os.Truncate(base+liveSuffix, 70)) }, true},
		"other data": {func(t *testing.T, base string) {
			fi, err := os.Stat(base + dataSuffix)
			require.NoError(t, err)
			require.NoError(t, os.Remove(base+dataSuffix))
			require.NoError(t, os.WriteFile(base+dataSuffix, nil, 0o600))
			require.NoError(t, os.Truncate(base+dataSuffix, fi.Size()))
		}, true},
		"data cut": {func(t *testing.T, base string) { require.NoError(t, os.Truncate(base+dataSuffix, 100)) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newLiveFixture(t)
			require.NoError(t, f.b.Close())
			require.NoError(t, os.Remove(f.b.base+mapSuffix))
			tc.spoil(t, f.b.base)
			b := f.another(t, CacheOptions{})
			require.Equal(t, tc.requests, f.readAll(t, b) > 0)
			require.NoError(t, b.Close())
			b = f.another(t, CacheOptions{})
			require.Zero(t, f.readAll(t, b), "it was made anew")
			require.NoError(t, b.Close())
			left, err := filepath.Glob(f.b.base + "*.tmp")
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// A process with another chunk size works without the live map, and does not
// leave one that speaks of what it has taken away.
func TestLiveMapOfAnotherChunkSize(t *testing.T) {
	f := newLiveFixture(t)
	b := f.another(t, CacheOptions{ChunkSize: 16 << 10})
	require.Nil(t, b.live)
	require.Positive(t, f.readAll(t, b))
	_, err := b.evict(0)
	require.NoError(t, err)
	require.True(t, b.Complete(), "another one has it open")
	require.NoError(t, f.b.Close())
	_, err = b.evict(0)
	require.NoError(t, err)
	require.NoFileExists(t, b.base+liveSuffix)
	require.NoError(t, b.Close())
	c := f.another(t, CacheOptions{})
	require.Positive(t, f.readAll(t, c))
	require.NoError(t, c.Close())
}

func TestEvictionClearsTheLiveMap(t *testing.T) {
	f := newLiveFixture(t)
	freed, err := f.b.evict(0)
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, freed)
	b := f.another(t, CacheOptions{})
	require.Zero(t, b.Present())
	require.NoError(t, b.Close())
	require.NoError(t, f.b.Close())
}

// A live map whose pages cannot be had harms no read.
func TestLiveMapIsLost(t *testing.T) {
	f := newLiveFixture(t)
	require.NoError(t, os.Truncate(f.b.base+liveSuffix, 0))
	f.b.Invalidate(0, 1<<20)
	require.NoFileExists(t, f.b.base+liveSuffix, "it would have spoken of what was taken away")
	require.Positive(t, f.readAll(t, f.b))
	require.ErrorIs(t, f.b.live.add(0, 1), errLiveLost)
	require.NoError(t, f.b.Close())
}

func TestSweepAndRemove(t *testing.T) {
	f := newLiveFixture(t)
	require.NoError(t, os.WriteFile(f.b.base+".map.123.tmp", nil, 0o600))
	require.NoError(t, f.b.Close())
	c := openTestCache(t, f.dir, CacheOptions{MaxBytes: 1})
	b := openTestBlob(t, c, f.o)
	require.NoFileExists(t, f.b.base+".map.123.tmp")
	require.NoError(t, b.Close())
	require.NoError(t, c.trim())
	left, err := filepath.Glob(f.b.base + "*")
	require.NoError(t, err)
	require.Empty(t, left)
}

// What opening a layer reads stays while the image is open, so that it can be
// opened again whatever the bound.
func TestTailsAreNotEvicted(t *testing.T) {
	for name, o := range map[string]*zfile.Options{"tar": {Tar: true}, "bare": nil} {
		t.Run(name, func(t *testing.T) {
			model := bigImage(t)
			if o != nil {
				model = newTestImage(t, 3, o)
			}
			dir := t.TempDir()
			c := openTestCache(t, dir, CacheOptions{FlushEvery: time.Hour, MaxBytes: 1})
			im := model.open(t, c)
			_, err := im.ReadAt(make([]byte, testDevice), 0)
			require.NoError(t, err)
			require.NoError(t, c.trim())
			if o == nil {
				require.Less(t, im.layers[0].blob.Present(), int64(3<<20))
			}
			before := model.requests()
			again := model.open(t, openTestCache(t, dir, CacheOptions{}))
			require.Equal(t, before, model.requests())
			require.Equal(t, im.Size(), again.Size())
		})
	}
}

func TestNoBootIDNoLiveMap(t *testing.T) {
	_, err := openLive(filepath.Join(t.TempDir(), "x"), liveKey{size: 1, chunk: 4096})
	require.ErrorIs(t, err, errNoLive)
	id, err := bootID()
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("no boot id")
	}
	require.NoError(t, err)
	require.NotZero(t, id)
}

// BenchmarkKeepChunk is what the live map costs for each run of chunks that
// arrives, beside the process's own set. Each is added and taken out again.
func BenchmarkKeepChunk(b *testing.B) {
	o := &origin{data: testData(1 << 20)}
	c := openTestCache(b, b.TempDir(), CacheOptions{})
	blob, err := c.Blob(digest.FromBytes(o.data), 1<<20, o)
	require.NoError(b, err)
	defer blob.Close()
	b.Run("own", func(b *testing.B) {
		for b.Loop() {
			blob.present.addAll(7, 8)
			blob.present.removeAll(7, 8)
		}
	})
	b.Run("live", func(b *testing.B) {
		for b.Loop() {
			if blob.live.add(7, 8) != nil || blob.live.remove(7, 8) != nil {
				b.Fatal("lost")
			}
		}
	})
}
