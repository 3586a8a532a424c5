package backstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// away is an origin that can go away, in several ways.
type away struct {
	data []byte
	name string // of the host

	mu       sync.Mutex // guards the fields below
	mode     string     // "": it is there
	slow     time.Duration
	after    time.Duration // Retry-After of a 503
	attempts []time.Time
	lost     int // requests that never got an answer
}

func (a *away) Host() string { return a.name }

func (a *away) set(mode string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mode = mode
}

func (a *away) sent() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.attempts)
}

// answer503 is an error that says of itself what a registry's does.
type answer503 struct{ after time.Duration }

func (answer503) Error() string               { return "503" }
func (answer503) Answered() bool              { return true }
func (e answer503) RetryAfter() time.Duration { return e.after }

func (a *away) Fetch(context.Context, int64, int64, Lane) (io.ReadCloser, error) {
	return nil, errors.New("asked with patience")
}

func (a *away) FetchOnce(ctx context.Context, off, n int64, _ Lane) (io.ReadCloser, error) {
	a.mu.Lock()
	a.attempts = append(a.attempts, time.Now())
	mode, slow, after := a.mode, a.slow, a.after
	a.mu.Unlock()
	if err := sleep(ctx, slow); err != nil {
		return nil, err
	}
	switch mode {
	case "refuses":
		return nil, syscall.ECONNREFUSED
	case "busy":
		return nil, answer503{after}
	case "hangs": // also when it is back: the request is lost
		a.mu.Lock()
		a.lost++
		a.mu.Unlock()
		if err := sleep(ctx, 30*time.Second); err != nil {
			return nil, err
		}
		return nil, os.ErrDeadlineExceeded
	case "stalls":
		return io.NopCloser(io.MultiReader(bytes.NewReader(a.data[off:off+10]), stalled{ctx})), nil
	}
	return io.NopCloser(bytes.NewReader(a.data[off : off+n])), nil
}

type stalled struct{ ctx context.Context }

func (s stalled) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

func (a *away) open(t *testing.T, c *Cache) *Blob {
	t.Helper()
	b, err := c.Blob(digest.FromBytes(a.data), int64(len(a.data)), a)
	require.NoError(t, err)
	return b
}

// readAt reads 4 KiB in the background; the error comes over the channel.
func readAt(t *testing.T, b *Blob, a *away, off int64) <-chan error {
	got := make(chan error, 1)
	go func() {
		p := make([]byte, 4096)
		_, err := b.ReadAt(p, off)
		if err == nil && !bytes.Equal(p, a.data[off:off+4096]) {
			err = errors.New("wrong bytes")
		}
		got <- err
	}()
	return got
}

// TestOutage: readers wait while the host is away, few requests are sent, and
// all goes on soon after it is back.
func TestOutage(t *testing.T) {
	const readers = 16
	for _, mode := range []string{"refuses", "hangs", "busy", "stalls"} {
		for _, lasts := range []time.Duration{3 * time.Second, time.Minute, 10 * time.Minute} {
			t.Run(fmt.Sprint(mode, lasts), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a := &away{data: testData(32 << 20)}
					b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
					require.NoError(t, <-readAt(t, b, a, 0), "before")
					a.set(mode)
					before := a.sent()
					var got []<-chan error
					for i := range int64(readers) {
						got = append(got, readAt(t, b, a, (1+i)<<20))
					}
					time.Sleep(lasts)
					attempts := a.sent() - before
					back := time.Now()
					a.set("")
					for _, ch := range got {
						require.NoError(t, <-ch)
					}
					took := time.Since(back)
					t.Logf("%d attempts, %v after it was back", attempts, took)
					require.LessOrEqual(t, attempts, 2*readers+int(lasts/time.Second)+10)
					limit := 5 * time.Second
					if mode == "stalls" {
						limit = longestSilence + longestPause
					}
					require.LessOrEqual(t, took, limit)
					require.LessOrEqual(t, a.sent()-before-attempts, 3*readers, "no more than it takes")
					require.NoError(t, <-readAt(t, b, a, 20<<20), "afterwards")
					require.NoError(t, b.Close())
				})
			})
		}
	}
}

// A host that takes its time is not away.
func TestSlowHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: testData(8 << 20), slow: 20 * time.Second}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		start := time.Now()
		var got []<-chan error
		for i := range int64(4) {
			got = append(got, readAt(t, b, a, i<<20))
		}
		for _, ch := range got {
			require.NoError(t, <-ch)
		}
		require.Equal(t, 20*time.Second, time.Since(start), "the first request is left waiting")
		require.LessOrEqual(t, a.sent(), 16)
		require.NoError(t, b.Close())
	})
}

func TestOutageIsBounded(t *testing.T) {
	for _, tc := range []struct{ limit, least, most time.Duration }{
		{10 * time.Second, 10 * time.Second, 10 * time.Second},
		{-1, ordinary, ordinary},
		{time.Millisecond, ordinary, ordinary},
	} {
		synctest.Test(t, func(t *testing.T) {
			a := &away{data: testData(1 << 20), mode: "refuses"}
			b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{Outage: tc.limit}))
			start := time.Now()
			require.ErrorIs(t, <-readAt(t, b, a, 0), syscall.ECONNREFUSED)
			require.GreaterOrEqual(t, time.Since(start), tc.least)
			require.LessOrEqual(t, time.Since(start), tc.most)
			sent := a.sent()
			time.Sleep(time.Minute)
			require.LessOrEqual(t, a.sent(), sent+1, "nobody waits any more")
			a.set("")
			require.NoError(t, <-readAt(t, b, a, 0), "the next one is tried again")
			require.NoError(t, b.Close())
		})
	}
}

// Opening an image does not wait for ever.
func TestOpeningIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: testData(1 << 20), mode: "refuses"}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		start := time.Now()
		_, err := OpenImage(t.Context(), []LayerSource{{Blob: b}})
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.Equal(t, time.Minute, time.Since(start))
	})
}

func TestRetryAfterIsObeyed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: testData(1 << 20), mode: "busy", after: time.Minute}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		got := readAt(t, b, a, 0)
		time.Sleep(59 * time.Second)
		require.Equal(t, 1, a.sent())
		a.set("")
		require.NoError(t, <-got)
		require.Equal(t, 2, a.sent())
		require.NoError(t, b.Close())
	})
}

// Close ends what waits for a host, whatever the host does.
func TestCloseDuringAnOutage(t *testing.T) {
	for _, mode := range []string{"refuses", "hangs", "busy", "stalls"} {
		synctest.Test(t, func(t *testing.T) {
			a := &away{data: testData(8 << 20), mode: mode}
			b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
			var got []<-chan error
			for i := range int64(4) {
				got = append(got, readAt(t, b, a, i<<20))
			}
			time.Sleep(37 * time.Second)
			start := time.Now()
			require.NoError(t, b.Close())
			require.Zero(t, time.Since(start))
			for _, ch := range got {
				require.ErrorIs(t, <-ch, errClosed)
			}
		})
	}
}

// A Fetcher that does not heed its context holds up Close for two seconds.
func TestCloseWithADeafFetcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		deaf := make(chan struct{})
		o := &origin{data: testData(1 << 20), before: func(int64, int64, Lane) error { <-deaf; return nil }}
		b := openTestBlob(t, openTestCache(t, t.TempDir(), CacheOptions{}), o)
		got := make(chan error, 1)
		go func() {
			_, err := b.ReadAt(make([]byte, 10), 0)
			got <- err
		}()
		synctest.Wait()
		start := time.Now()
		require.ErrorIs(t, b.Close(), os.ErrDeadlineExceeded)
		require.Equal(t, closePatience, time.Since(start))
		require.ErrorIs(t, <-got, errClosed)
		close(deaf)
		synctest.Wait()
		_, err := b.file.Stat()
		require.ErrorIs(t, err, os.ErrClosed, "the files are closed once it has ended")
	})
}

// A prefetch asks a dead host hardly, and goes on when it is back.
func TestPrefetchDuringAnOutage(t *testing.T) {
	model := bigImage(t)
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: model.origins[0].data}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		im, err := OpenImage(t.Context(), []LayerSource{{Blob: b}})
		require.NoError(t, err)
		a.set("refuses")
		before := a.sent()
		type result struct {
			PrefetchResult
			err error
		}
		done := make(chan result, 1)
		go func() {
			var wants []Want
			for off := int64(0); off < 6<<20; off += 64 << 10 {
				wants = append(wants, Want{Off: off, Len: 60 << 10})
			}
			r, err := im.Prefetch(context.Background(), wants, nil)
			done <- result{r, err}
		}()
		read := make(chan error, 1)
		go func() {
			_, err := im.ReadAt(make([]byte, 4096), 4<<20)
			read <- err
		}()
		time.Sleep(time.Minute)
		require.LessOrEqual(t, a.sent()-before, 80)
		a.set("")
		require.NoError(t, <-read)
		r := <-done
		t.Logf("%+v", r)
		require.LessOrEqual(t, r.Failed, 60)
		require.True(t, b.has(5<<20, 60<<10), "what comes after the outage is fetched")
		require.NoError(t, im.Close())
	})
}

// A blob that the host fails to give does not hold up others.
func TestOneBadBlob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := openTestCache(t, t.TempDir(), CacheOptions{})
		bad := &away{data: testData(1 << 20), mode: "busy"}
		good := &away{data: testData(8 << 20)}
		b, g := bad.open(t, c), good.open(t, c)
		got := readAt(t, b, bad, 0)
		time.Sleep(time.Minute)
		start := time.Now()
		for i := range int64(8) {
			require.NoError(t, <-readAt(t, g, good, i<<20))
			synctest.Wait()
		}
		require.Zero(t, time.Since(start))
		sent := bad.sent()
		time.Sleep(10 * time.Second)
		require.LessOrEqual(t, bad.sent()-sent, 12)
		bad.set("")
		require.NoError(t, <-got)
		require.NoError(t, b.Close())
		require.NoError(t, g.Close())
	})
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	s  []string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.s = append(l.s, string(p))
	return len(p), nil
}

func (l *lines) count(part string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.s {
		if strings.Contains(s, part) {
			n++
		}
	}
	return n
}

func TestOutageIsReported(t *testing.T) {
	for _, mode := range []string{"refuses", "hangs"} {
		synctest.Test(t, func(t *testing.T) {
			var log lines
			c, err := OpenCache(t.TempDir(), &CacheOptions{Log: slog.New(slog.NewTextHandler(&log, nil))})
			require.NoError(t, err)
			a := &away{data: testData(1 << 20), mode: mode, name: "registry.example"}
			b := a.open(t, c)
			got := readAt(t, b, a, 8192)
			time.Sleep(2 * time.Second)
			require.Zero(t, log.count(""), "that is nothing to speak of")
			time.Sleep(100 * time.Second)
			require.Equal(t, 1, log.count("registry is away"))
			require.InDelta(t, 3, log.count("registry is still away"), 1)
			require.Equal(t, 1, log.count("registry is away: reads wait for it\" host=registry.example blob="+b.digest.String()+" offset=8192"))
			a.set("")
			require.NoError(t, <-got)
			require.Equal(t, 1, log.count("registry is back\" host=registry.example after=1m4"))
			require.NoError(t, b.Close())
			require.NoError(t, c.Close())
		})
	}
}

func TestWaitingAndExplain(t *testing.T) {
	model := bigImage(t)
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: model.origins[0].data, name: "registry.example"}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		im, err := OpenImage(t.Context(), []LayerSource{{Blob: b}})
		require.NoError(t, err)
		require.Empty(t, im.Waiting())
		off, n := im.BlobRange(0, 4096+1<<20, 4096)
		require.Equal(t, fmt.Sprintf("[1048576, +4096) layer 0 %s blob [%d, +%d) not on this node", b.digest, off, n), im.Explain(1<<20, 4096))
		a.set("refuses")
		read := make(chan error, 1)
		go func() {
			_, err := im.ReadAt(make([]byte, 4096), 1<<20)
			read <- err
		}()
		start := time.Now()
		time.Sleep(10 * time.Second)
		ws := im.Waiting()
		require.Len(t, ws, 1)
		w := ws[0]
		require.Equal(t, "registry.example", w.Host)
		require.Equal(t, b.digest, w.Blob)
		require.Equal(t, start, w.Since)
		require.Equal(t, a.sent()-1, w.Attempts)
		require.ErrorIs(t, w.Err, syscall.ECONNREFUSED)
		require.True(t, w.Off <= off && w.Off+w.Len >= off+n)
		require.Contains(t, im.Explain(1<<20, 4096), "waits for registry.example for 10s: [")
		require.Contains(t, im.Explain(1<<20, 4096), "connection refused")
		a.set("")
		require.NoError(t, <-read)
		require.Empty(t, im.Waiting())
		require.Contains(t, im.Explain(1<<20, 4096), "on this node")
		require.Contains(t, im.Explain(testDevice, 1), "outside")
		require.NotContains(t, im.Explain(0, testDevice), "\n")
		require.NoError(t, im.Close())
	})
}

// A cache that cannot be written is read around, also during an outage.
func TestReadsAroundABrokenCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: testData(1 << 20)}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		f, err := os.Open(b.file.Name()) // not for writing
		require.NoError(t, err)
		require.NoError(t, b.file.Close())
		b.file = f
		require.NoError(t, <-readAt(t, b, a, 0))
		a.set("refuses")
		got := readAt(t, b, a, 8192)
		time.Sleep(time.Minute)
		a.set("")
		require.NoError(t, <-got)
		require.Zero(t, b.Present())
		require.NoError(t, b.Close())
	})
}
