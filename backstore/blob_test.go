package backstore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// origin is a blob in memory that counts what is asked of it.
type origin struct {
	data     []byte
	requests atomic.Int64
	bytes    atomic.Int64
	before   func(off, n int64, lane Lane) error // may fail or block a request
	body     func(p []byte) io.Reader            // may spoil an answer
}

func (o *origin) Host() string { return "origin.test" }

func (o *origin) Fetch(ctx context.Context, off, n int64, lane Lane) (io.ReadCloser, error) {
	o.requests.Add(1)
	if o.before != nil {
		if err := o.before(off, n, lane); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	o.bytes.Add(n)
	p := o.data[off : off+n]
	if o.body != nil {
		return io.NopCloser(o.body(p)), nil
	}
	return io.NopCloser(bytes.NewReader(p)), nil
}

func testData(n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(p)
	return p
}

var quiet = slog.New(slog.DiscardHandler)

func openTestCache(t testing.TB, dir string, o CacheOptions) *Cache {
	t.Helper()
	o.Log = quiet
	c, err := OpenCache(dir, &o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func openTestBlob(t *testing.T, c *Cache, o *origin) *Blob {
	t.Helper()
	b, err := c.Blob(digest.FromBytes(o.data), int64(len(o.data)), o)
	require.NoError(t, err)
	return b
}

func TestBlobReadsWhatTheOriginHas(t *testing.T) {
	o := &origin{data: testData(3<<20 + 123)}
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b := openTestBlob(t, c, o)
	defer func() { require.NoError(t, b.Close()) }()
	r := rand.New(rand.NewPCG(1, 2))
	var wg sync.WaitGroup
	for range 8 {
		seed := r.Uint64()
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := rand.New(rand.NewPCG(seed, 3))
			for range 200 {
				off := r.Int64N(b.size)
				p := make([]byte, min(r.Int64N(100_000), b.size-off))
				_, err := b.ReadAt(p, off)
				if err != nil || !bytes.Equal(p, o.data[off:off+int64(len(p))]) {
					t.Errorf("read %d at %d: %v", len(p), off, err)
					return
				}
			}
		}()
	}
	wg.Wait()
	require.LessOrEqual(t, o.bytes.Load(), b.size, "no byte is fetched twice")
	_, err := b.ReadAt(make([]byte, 10), b.size-5)
	require.ErrorIs(t, err, io.EOF)
	_, err = b.ReadAt(make([]byte, 1), b.size)
	require.ErrorIs(t, err, io.EOF)
	_, err = b.ReadAt(make([]byte, 1), -1)
	require.Error(t, err)
}

func TestEqualMissesMeetOnce(t *testing.T) {
	gate := make(chan struct{})
	o := &origin{data: testData(1 << 20)}
	o.before = func(int64, int64, Lane) error { <-gate; return nil }
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b := openTestBlob(t, c, o)
	defer b.Close()
	origins := make(chan Origin, 8)
	for range 8 {
		go func() {
			from, err := b.ensure(4096, 100, patience{})
			if err != nil {
				t.Error(err)
			}
			origins <- from
		}()
	}
	require.Eventually(t, func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.flights) == 1 && b.flights[0].waiters() == 8
	}, 5*time.Second, time.Millisecond)
	close(gate)
	for range 8 {
		require.Equal(t, FromFetch, <-origins)
	}
	require.EqualValues(t, 1, o.requests.Load())
}

func (f *flight) waiters() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wanted
}

// A reader gets its block while the rest of the range is still on its way.
func TestReaderDoesNotWaitForTheWholeRange(t *testing.T) {
	o := &origin{data: testData(1 << 20)}
	more := make(chan struct{})
	o.body = func(p []byte) io.Reader {
		head := min(len(p), 8192)
		return io.MultiReader(bytes.NewReader(p[:head]), gateReader{more}, bytes.NewReader(p[head:]))
	}
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b := openTestBlob(t, c, o)
	p := make([]byte, 8192)
	_, err := b.ReadAt(p, 0)
	require.NoError(t, err)
	require.Equal(t, o.data[:8192], p)
	require.False(t, b.has(8192, 1))
	close(more)
	require.NoError(t, b.Close())
}

type gateReader struct{ ch chan struct{} }

func (g gateReader) Read([]byte) (int, error) { <-g.ch; return 0, io.EOF }

func TestPresenceSurvivesReopening(t *testing.T) {
	dir := t.TempDir()
	o := &origin{data: testData(1<<20 + 77)}
	read := func() {
		c := openTestCache(t, dir, CacheOptions{})
		b := openTestBlob(t, c, o)
		p := make([]byte, len(o.data))
		_, err := b.ReadAt(p, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(o.data, p))
		require.NoError(t, b.Verify(context.Background()))
		require.NoError(t, b.Close())
	}
	read()
	first := o.requests.Load()
	read()
	require.Equal(t, first, o.requests.Load(), "the second time nothing is fetched")

	maps, err := filepath.Glob(filepath.Join(dir, "*", "*.map"))
	require.NoError(t, err)
	require.Len(t, maps, 1)
	for _, spoil := range []func(p []byte) []byte{
		func(p []byte) []byte { p[40] ^= 1; return p },
		func(p []byte) []byte { p[3] ^= 1; return p },
		func(p []byte) []byte { return p[:len(p)-8] },
		func([]byte) []byte { return nil },
	} {
		p, err := os.ReadFile(maps[0])
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(maps[0], spoil(p), 0o600))
		require.NoError(t, os.Remove(strings.TrimSuffix(maps[0], mapSuffix)+liveSuffix))
		before := o.requests.Load()
		read()
		require.Greater(t, o.requests.Load(), before, "a bad map is not trusted")
	}
}

func TestFailedFetches(t *testing.T) {
	flaky := errors.New("flaky")
	o := &origin{data: testData(4 << 20)}
	var n atomic.Int64
	o.before = func(int64, int64, Lane) error {
		if n.Add(1) == 1 {
			return flaky
		}
		return nil
	}
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b := openTestBlob(t, c, o)
	defer b.Close()
	p := make([]byte, 100)
	_, err := b.ReadAt(p, 5000)
	require.NoError(t, err, "one failure is tried again")

	o.before = func(int64, int64, Lane) error { return os.ErrNotExist }
	_, err = b.ReadAt(p, 3_900_000)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, b.digest.String())

	o.before = func(int64, int64, Lane) error { return refusal{} }
	_, err = b.ReadAt(p, 3_900_000)
	require.ErrorAs(t, err, &refusal{})

	o.before = nil
	o.body = func(p []byte) io.Reader { return bytes.NewReader(p[:len(p)/2]) }
	_, err = b.ReadAt(p[:1], 900_000)
	require.NoError(t, err, "a body that is cut short gives what it has")
}

// refusal is an error that says itself that it is final.
type refusal struct{}

func (refusal) Error() string   { return "refused" }
func (refusal) Permanent() bool { return true }

func TestCloseEndsWaitingReads(t *testing.T) {
	o := &origin{data: testData(1 << 20)}
	asked := make(chan struct{}, 8)
	hang := make(chan struct{})
	o.before = func(int64, int64, Lane) error { asked <- struct{}{}; <-hang; return nil }
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b := openTestBlob(t, c, o)
	got := make(chan error)
	go func() {
		_, err := b.ReadAt(make([]byte, 10), 0)
		got <- err
	}()
	<-asked
	closed := make(chan error)
	go func() { closed <- b.Close() }()
	<-b.ctx.Done()
	close(hang)
	require.Error(t, <-got)
	require.NoError(t, <-closed)
}

// Presence is written down now and then while blobs come and go. The race
// detector sees if one of them is closed under that.
func TestFlushMeetsClose(t *testing.T) {
	o := &origin{data: testData(64 << 10)}
	c := openTestCache(t, t.TempDir(), CacheOptions{FlushEvery: time.Microsecond})
	for i := range 200 {
		b, err := c.Blob(digest.FromBytes([]byte{byte(i)}), int64(len(o.data)), o)
		require.NoError(t, err)
		_, err = b.ReadAt(make([]byte, 4096), 0)
		require.NoError(t, err)
		require.NoError(t, b.Close())
	}
}

func TestEvictionKeepsTheBound(t *testing.T) {
	o := &origin{data: testData(8 << 20)}
	c := openTestCache(t, t.TempDir(), CacheOptions{MaxBytes: 3 << 20, FlushEvery: time.Hour})
	b := openTestBlob(t, c, o)
	defer b.Close()
	p := make([]byte, len(o.data))
	_, err := b.ReadAt(p, 0)
	require.NoError(t, err)
	require.True(t, b.Complete())
	require.NoError(t, c.trim())
	total, _, err := c.usage()
	require.NoError(t, err)
	require.LessOrEqual(t, total, int64(3<<20))
	_, err = b.ReadAt(p, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(o.data, p), "what was evicted is fetched again")

	idle := &origin{data: testData(1 << 20)[:1<<20-1]}
	other := openTestBlob(t, c, idle)
	_, err = other.ReadAt(p[:len(idle.data)], 0)
	require.NoError(t, err)
	require.NoError(t, other.Close())
	require.NoError(t, c.trim())
	_, err = os.Stat(other.file.Name())
	require.ErrorIs(t, err, os.ErrNotExist, "blobs that are not open go first")
}

func TestWrongDigestIsForgotten(t *testing.T) {
	o := &origin{data: testData(300_000)}
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	b, err := c.Blob(digest.FromString("something else"), int64(len(o.data)), o)
	require.NoError(t, err)
	defer b.Close()
	_, err = b.ReadAt(make([]byte, len(o.data)), 0)
	require.NoError(t, err)
	require.ErrorIs(t, b.Verify(context.Background()), ErrDigest)
	require.Zero(t, b.Present())
}

func TestBlobArguments(t *testing.T) {
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	o := &origin{data: []byte("x")}
	for name, tc := range map[string]struct {
		d    digest.Digest
		size int64
	}{
		"no digest":     {"", 1},
		"bad digest":    {"sha256:zz", 1},
		"path digest":   {"sha256:../../../../etc/passwd", 1},
		"negative size": {digest.FromString("a"), -1},
		"huge size":     {digest.FromString("a"), 1 << 60},
	} {
		_, err := c.Blob(tc.d, tc.size, o)
		require.Error(t, err, name)
	}
	_, err := OpenCache(t.TempDir(), &CacheOptions{ChunkSize: 3000})
	require.ErrorContains(t, err, "power of two")
}

func TestBitset(t *testing.T) {
	const n = 300
	r := rand.New(rand.NewPCG(4, 5))
	s, model := newBitset(n), [n]bool{}
	for range 2000 {
		from := r.Int64N(n)
		to := from + r.Int64N(n-from+1)
		switch r.IntN(3) {
		case 0:
			s.addAll(from, to)
			for i := from; i < to; i++ {
				model[i] = true
			}
		case 1:
			s.removeAll(from, to)
			for i := from; i < to; i++ {
				model[i] = false
			}
		}
		all, first, count := true, to, int64(0)
		for i := from; i < to; i++ {
			all = all && model[i]
			if model[i] && first == to {
				first = i
			}
		}
		for _, m := range model {
			if m {
				count++
			}
		}
		require.Equal(t, all, s.hasAll(from, to))
		require.Equal(t, first, s.next(from, to, true))
		require.Equal(t, count, s.count())
	}
}

func FuzzDecodeMap(f *testing.F) {
	s := newBitset(1000)
	s.addAll(10, 500)
	f.Add(encodeMap(1000*4096-5, 4096, 0, s))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		got := newBitset(1000)
		if _, err := decodeMap(p, 1000*4096-5, 4096, got); err == nil && got.count() > 1000 {
			t.Fatal("more chunks than the blob has")
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"lowers":[{"file":"a"}],"upper":{}}`))
	f.Add([]byte(`{"lowers":[{"dir":"a","digest":"sha256:x"}],"upper":{"index":"i"}}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		if c, err := parseConfig(p); err == nil {
			_, _ = c.Sources()
		}
	})
}
