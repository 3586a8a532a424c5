package recorder

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("RECORDER_TEST_FILE"); path != "" {
		recordForEver(path)
	}
	goleak.VerifyTestMain(m)
}

// A start is a recording under test, in a bubble of testing/synctest.
type start struct {
	*Recorder
	t    *testing.T
	file lockedBuffer
	at   time.Time
	next int64
	when []time.Time // touch was called
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}

func begin(t *testing.T, o *Options) *start {
	s := &start{t: t, at: time.Now()}
	r, err := New(&s.file, tracefmt.Header{Start: s.at, Workload: "test"}, o)
	require.NoError(t, err)
	s.Recorder = r
	return s
}

// touch reads 4 KiB that were not read before.
func (s *start) touch() {
	s.ObserveRead(backstore.ReadEvent{At: time.Since(s.at), Off: s.next, Len: 4096})
	s.next += 8192
	s.when = append(s.when, time.Now())
}

// again reads what was read first.
func (s *start) again() {
	s.ObserveRead(backstore.ReadEvent{At: time.Since(s.at), Off: 0, Len: 4096})
}

// ends waits for the end of the recording and returns its trace.
func (s *start) ends(reason string, after time.Duration) *tracefmt.Trace {
	s.t.Helper()
	got, err := s.Wait(context.Background())
	require.NoError(s.t, err)
	require.Equal(s.t, reason, got)
	tr, err := tracefmt.Read(bytes.NewReader(s.file.bytes()))
	require.NoError(s.t, err)
	require.NotNil(s.t, tr.End)
	require.Equal(s.t, reason, tr.End.Reason)
	require.InDelta(s.t, after.Seconds(), tr.End.Duration.Seconds(), 0.2)
	return tr
}

func TestStopRules(t *testing.T) {
	for _, c := range []struct {
		name   string
		opts   *Options
		run    func(s *start)
		reason string
		after  time.Duration
		ready  time.Duration
		events int
	}{
		{"quiet", nil, func(s *start) {
			for range 4 {
				s.touch()
				time.Sleep(4 * time.Second)
			}
		}, "quiet: nothing new for 5s", 17 * time.Second, 0, 4},
		{"quiet although the same is read again", nil, func(s *start) {
			s.touch()
			for range 10 {
				time.Sleep(time.Second)
				s.again()
			}
		}, "quiet: nothing new for 5s", 5 * time.Second, 0, 1},
		{"not quiet before anything was read", nil, func(s *start) {},
			"duration: 1m0s", time.Minute, 0, 0},
		{"never quiet", &Options{Quiet: -1}, func(s *start) { s.touch() },
			"duration: 1m0s", time.Minute, 0, 1},
		{"duration", &Options{MaxDuration: 3 * time.Second}, func(s *start) { s.touch() },
			"duration: 3s", 3 * time.Second, 0, 1},
		{"no duration", &Options{MaxDuration: -1}, func(s *start) {
			time.Sleep(time.Hour)
			s.touch()
		}, "quiet: nothing new for 5s", time.Hour + 5*time.Second, 0, 1},
		{"ready", nil, func(s *start) {
			s.touch()
			time.Sleep(2 * time.Second)
			s.Ready("port 80")
			s.Ready("log")
		}, "ready: port 80", 2 * time.Second, 2 * time.Second, 1},
		{"ready, tail", &Options{Tail: 8 * time.Second}, func(s *start) {
			s.touch()
			time.Sleep(time.Second)
			s.Ready("log")
			time.Sleep(7 * time.Second)
			s.touch()
		}, "ready: log", 9 * time.Second, time.Second, 2},
		{"ready, tail longer than the maximum", &Options{Tail: time.Hour}, func(s *start) {
			time.Sleep(time.Second)
			s.Ready("log")
		}, "duration: 1m0s", time.Minute, time.Second, 0},
		{"ready at once", nil, func(s *start) { s.Ready("exit 0") },
			"ready: exit 0", 0, time.Microsecond, 0},
		{"ready, settled", &Options{Tail: time.Minute, Settle: time.Second}, func(s *start) {
			s.touch()
			time.Sleep(2 * time.Second)
			s.Ready("port 80")
			for range 5 { // it goes on loading
				s.touch()
				time.Sleep(500 * time.Millisecond)
			}
			s.again()
		}, "ready: port 80", 5 * time.Second, 2 * time.Second, 6},
		{"ready, settled at once", &Options{Tail: time.Minute, Settle: time.Second}, func(s *start) {
			s.touch()
			time.Sleep(3 * time.Second)
			s.Ready("port 80")
		}, "ready: port 80", 4 * time.Second, 3 * time.Second, 1},
		{"ready, never settled", &Options{Tail: 3250 * time.Millisecond, Settle: time.Second}, func(s *start) {
			s.Ready("log")
			for range 10 {
				s.touch()
				time.Sleep(500 * time.Millisecond)
			}
		}, "ready: log", 3250 * time.Millisecond, time.Microsecond, 7},
		{"over, ready", &Options{Tail: time.Minute}, func(s *start) {
			s.touch()
			time.Sleep(time.Second)
			s.ReadyAt(s.at.Add(time.Millisecond), "exit 0")
			s.Over("the container ended")
		}, "ready: exit 0", time.Second, time.Millisecond, 1},
		{"over, not ready", nil, func(s *start) {
			s.touch()
			time.Sleep(time.Second)
			s.Over("the container ended")
		}, "stop: the container ended", time.Second, 0, 1},
		{"bytes", &Options{MaxBytes: 10_000}, func(s *start) {
			for range 9 {
				s.touch()
				time.Sleep(time.Second)
			}
		}, "bytes: 12288", 2 * time.Second, 0, 3},
		{"events", &Options{MaxEvents: 2}, func(s *start) {
			for range 9 {
				s.touch()
			}
		}, "events: 2", 0, 0, 2},
		{"stop", nil, func(s *start) {
			s.touch()
			s.Stop("interrupt")
			s.Stop("again")
		}, "stop: interrupt", 0, 0, 1},
		{"stop wins over ready", nil, func(s *start) {
			s.Stop("interrupt")
			s.Ready("log")
		}, "stop: interrupt", 0, time.Microsecond, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := begin(t, c.opts)
				c.run(s)
				tr := s.ends(c.reason, c.after)
				require.Equal(t, c.ready, tr.End.Ready)
				require.Len(t, tr.Events, c.events)
				require.Equal(t, c.events, tr.End.Events)
			})
		})
	}
}

// A read that waits is not quiet, however long it takes.
func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		waits := backstoreWait{}
		s := begin(t, &Options{Stalled: waits.total, Tail: time.Minute, Settle: time.Second})
		s.touch()
		time.Sleep(2 * time.Second)
		waits.begin()
		time.Sleep(20 * time.Second)
		waits.end()
		s.touch()
		time.Sleep(4 * time.Second)
		waits.begin()
		time.Sleep(10 * time.Second) // and nothing comes of it
		waits.end()
		time.Sleep(500 * time.Millisecond)
		s.Ready("port 80")
		waits.begin()
		time.Sleep(5 * time.Second)
		waits.end()
		s.touch()
		s.ends("ready: port 80", 42500*time.Millisecond)
	})
	synctest.Test(t, func(t *testing.T) {
		waits := backstoreWait{}
		s := begin(t, &Options{Stalled: waits.total})
		s.touch()
		time.Sleep(3 * time.Second)
		waits.begin()
		time.Sleep(10 * time.Second)
		waits.end()
		s.ends("quiet: nothing new for 5s", 15*time.Second)
	})
}

// backstoreWait is the stall of an image.
type backstoreWait struct {
	mu    sync.Mutex
	since time.Time
	sum   time.Duration
}

func (w *backstoreWait) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.since = time.Now()
}

func (w *backstoreWait) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sum += time.Since(w.since)
	w.since = time.Time{}
}

func (w *backstoreWait) total() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.since.IsZero() {
		return w.sum
	}
	return w.sum + time.Since(w.since)
}

func TestContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := begin(t, nil)
		s.touch()
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(time.Second, func() { cancel(errors.New("signal: terminated")) })
		reason, err := s.Wait(ctx)
		require.NoError(t, err)
		require.Equal(t, "stop: signal: terminated", reason)
		<-s.Done()
		s.ends(reason, time.Second)
		s.touch() // is ignored
		require.EqualValues(t, 1, s.Stats().Reads)
	})
}

// TestLosesAtMostASecond looks at the file at random moments, as it would be
// after a kill.
func TestLosesAtMostASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := begin(t, &Options{Quiet: -1, MaxDuration: -1})
		rnd := rand.New(rand.NewPCG(1, 1))
		for range 200 {
			s.touch()
			time.Sleep(time.Duration(rnd.Int64N(int64(300 * time.Millisecond))))
			synctest.Wait()
			tr, err := tracefmt.Read(bytes.NewReader(s.file.bytes()))
			require.NoError(t, err)
			require.Nil(t, tr.End)
			if n := len(tr.Events); n < len(s.when) {
				require.Less(t, time.Since(s.when[n]), time.Second)
			}
		}
		s.Stop("enough")
		require.Len(t, s.ends("stop: enough", time.Since(s.at)).Events, 200)
	})
}

func TestFirstTouchOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := tracefmt.Header{Layers: []tracefmt.Layer{{Digest: digest.FromString("0"), Decoded: 10_000}, {}}}
		var file bytes.Buffer
		r, err := New(&file, h, nil)
		require.NoError(t, err)
		for _, e := range []backstore.ReadEvent{
			{At: 3, Off: 4096, Len: 4096, Origin: backstore.FromFetch, Wait: time.Millisecond},
			{At: 4, Off: 0, Len: 100_000},                 // cut off at the end of the layer
			{At: 5, Layer: 1, Off: 1 << 40, Len: 1 << 30}, // of unknown size
			{At: 6, Layer: 2, Len: 1},                     // no such layer
			{At: 7, Layer: -1, Len: 1},
			{At: 8, Off: 10_000, Len: 1},
			{At: 9, Off: -1, Len: 1},
			{At: 9, Off: math.MaxInt64, Len: 1},
			{At: 9, Off: 5, Len: 0},
			{At: -9, Wait: -1, Layer: 1, Off: 512, Len: 512}, // clocks
		} {
			e.At *= time.Millisecond
			r.ObserveRead(e)
		}
		r.Stop("test")
		_, err = r.Wait(context.Background())
		require.NoError(t, err)
		got := r.Stats()
		require.GreaterOrEqual(t, got.CPU, 10*ObserveCost)
		got.CPU = 0
		require.Equal(t, Stats{Reads: 10, Events: 5, Bytes: 10_000 + 1<<30 + 512, Dropped: 6}, got)
		tr, err := tracefmt.Read(&file)
		require.NoError(t, err)
		require.Equal(t, []tracefmt.Event{
			{Layer: 1, Off: 512, Len: 512},
			{At: 3 * time.Millisecond, Off: 4096, Len: 4096, Origin: 4, Wait: time.Millisecond},
			{At: 4 * time.Millisecond, Off: 0, Len: 4096},
			{At: 4 * time.Millisecond, Off: 8192, Len: 10_000 - 8192},
			{At: 5 * time.Millisecond, Layer: 1, Off: 1 << 40, Len: 1 << 30},
		}, tr.Events)
	})
}

// TestOrigins holds the numbers to those in tracefmt/FORMAT.md.
func TestOrigins(t *testing.T) {
	require.Equal(t, []backstore.Origin{0, 1, 2, 3, 4}, []backstore.Origin{
		backstore.FromLocal, backstore.FromCache, backstore.FromPrefetch, backstore.FromFlight, backstore.FromFetch,
	})
}

var errFull = errors.New("disk full")

type full struct{ left int }

func (f *full) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var head bytes.Buffer
		_, err := tracefmt.NewWriter(&head, tracefmt.Header{Start: time.Now()})
		require.NoError(t, err)
		r, err := New(&full{left: head.Len()}, tracefmt.Header{}, nil)
		require.NoError(t, err)
		r.ObserveRead(backstore.ReadEvent{Len: 1})
		reason, err := r.Wait(context.Background())
		require.ErrorIs(t, err, errFull)
		require.Contains(t, reason, "error: ")
		r.ObserveRead(backstore.ReadEvent{Len: 1})
	})
	_, err := New(&full{}, tracefmt.Header{}, nil)
	require.ErrorIs(t, err, errFull)
}

func TestConcurrentReads(t *testing.T) {
	var file bytes.Buffer
	r, err := New(&file, tracefmt.Header{}, nil)
	require.NoError(t, err)
	const readers, each = 8, 10_000 // fewer than the inbox holds, should nobody take them out
	var wg sync.WaitGroup
	for g := range readers {
		wg.Go(func() {
			for i := range int64(each) {
				r.ObserveRead(backstore.ReadEvent{At: time.Duration(i), Layer: g % 2, Off: i * 8192, Len: 4096})
			}
		})
	}
	wg.Wait()
	r.Ready("test")
	_, err = r.Wait(context.Background())
	require.NoError(t, err)
	got := r.Stats()
	require.Greater(t, got.CPU, readers*each*ObserveCost, "and the time of the writer")
	got.CPU = 0
	require.Equal(t, Stats{Reads: readers * each, Events: 2 * each, Bytes: 2 * each * 4096}, got)
	tr, err := tracefmt.Read(&file)
	require.NoError(t, err)
	require.Len(t, tr.Events, 2*each)
}

func TestNoAllocation(t *testing.T) {
	r, err := New(&bytes.Buffer{}, tracefmt.Header{}, nil)
	require.NoError(t, err)
	defer func() {
		r.Stop("test")
		<-r.Done()
	}()
	i := int64(0)
	require.Zero(t, testing.AllocsPerRun(2000, func() {
		r.ObserveRead(backstore.ReadEvent{Off: i % 64 * 8192, Len: 4096})
		i++
	}))
}

// recordForEver is a process that records until it is killed, and prints a
// line for each write.
func recordForEver(path string) {
	f, err := os.Create(path)
	if err != nil {
		panic(err)
	}
	w := writeFunc(func(p []byte) (int, error) {
		n, err := f.Write(p)
		fmt.Println(n)
		return n, err
	})
	r, err := New(w, tracefmt.Header{}, &Options{Quiet: -1, MaxDuration: -1})
	if err != nil {
		panic(err)
	}
	i := int64(0)
	for range time.Tick(time.Millisecond) {
		r.ObserveRead(backstore.ReadEvent{Off: i * 8192, Len: 4096})
		i++
	}
}

type writeFunc func(p []byte) (int, error)

func (f writeFunc) Write(p []byte) (int, error) { return f(p) }

func TestKilled(t *testing.T) {
	for n := range 3 {
		path := filepath.Join(t.TempDir(), "trace")
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "RECORDER_TEST_FILE="+path)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		written := 0
		s := bufio.NewScanner(out)
		for i := 0; i < n+2 && s.Scan(); i++ {
			var size int
			_, err := fmt.Sscan(s.Text(), &size)
			require.NoError(t, err)
			written += size
		}
		require.NoError(t, cmd.Process.Kill())
		require.Error(t, cmd.Wait())
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.GreaterOrEqual(t, info.Size(), int64(written))
		tr, err := tracefmt.Open(path)
		require.NoError(t, err)
		require.Nil(t, tr.End)
		require.NotEmpty(t, tr.Events)
	}
}
