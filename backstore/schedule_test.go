package backstore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// TestSchedule runs the scripts in testdata/schedule: the real scheduler over a
// modelled link, in virtual time. A script says, a line each, in KiB of blobs,
//
//	image NAME BLOB…                      an image of blobs of 16 MiB; images may share them
//	fail LANE every=N [after=D] [from=D] [to=D]
//	                                      what the lane asks for in each Nth MiB fails, the first
//	                                      time or with N = 1 always; with after it is a 429
//	at D replay IMAGE BLOB:OFF+LEN… [inflight=KiB] [requests=N] [rate=KiB] [perminute=N]
//	at D read BLOB:OFF+LEN…               one after the other, by one reader, 0.1 ms apart
//	at D cancel IMAGE                     its replay
//
// and gets a line for each request and each read with its time in ms: when it
// was sent, or how long it took. The directive's arguments are those of the
// link and the node.
func TestSchedule(t *testing.T) {
	defer func(f func(time.Duration) time.Duration) { random = f }(random)
	random = func(d time.Duration) time.Duration { return d / 2 }
	datadriven.Walk(t, "testdata/schedule", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			var out string
			synctest.Test(t, func(t *testing.T) { out = newSchedule(t, d).run(t, d.Input) })
			return out
		})
	})
}

// schedule is a running script.
type schedule struct {
	wire   wire
	o      CacheOptions
	quiet  bool // no requests, only what becomes of it
	blobs  map[string]*Blob
	images map[string]Stack
	wg     sync.WaitGroup

	mu   sync.Mutex // guards stop
	stop map[string]context.CancelFunc
}

func (s *schedule) cancel(image string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop[image]()
}

func newSchedule(t *testing.T, d *datadriven.TestData) *schedule {
	s := &schedule{blobs: map[string]*Blob{}, images: map[string]Stack{}, stop: map[string]context.CancelFunc{}}
	s.wire.asked = map[string]int{}
	s.wire.delay, s.wire.rate, s.wire.start = 10*time.Millisecond, 25e6, time.Now()
	for _, a := range d.CmdArgs {
		v := a.FirstVal(t)
		switch a.Key {
		case "delay":
			s.wire.delay = duration(t, v)
		case "rate": // megabits
			s.wire.rate = float64(number(t, v)) * 1e6 / 8
		case "perminute":
			s.o.Background.PerMinute = int(number(t, v))
		case "cache":
			s.o.MaxBytes = number(t, v) << 10
		case "show":
			s.quiet = v == "result"
		default:
			t.Fatalf("argument %s", a.Key)
		}
	}
	return s
}

func duration(t *testing.T, v string) time.Duration {
	d, err := time.ParseDuration(v)
	require.NoError(t, err)
	return d
}

func number(t *testing.T, v string) int64 {
	n, err := strconv.ParseInt(v, 10, 64)
	require.NoError(t, err)
	return n
}

// options takes the words with a = out of a line.
func options(line []string) (words []string, opts map[string]string) {
	opts = map[string]string{}
	for _, w := range line {
		if k, v, ok := strings.Cut(w, "="); ok {
			opts[k] = v
			continue
		}
		words = append(words, w)
	}
	return words, opts
}

func (s *schedule) run(t *testing.T, script string) string {
	c := openTestCache(t, t.TempDir(), s.o)
	for line := range strings.Lines(script) {
		words, opts := options(strings.Fields(line))
		switch words[0] {
		case "image":
			s.image(t, c, words[1], words[2:])
		case "fail":
			s.wire.fail(t, words[1], opts)
		case "at":
			at, what, args := duration(t, words[1]), words[2], words[3:]
			ctx, stop := context.WithCancel(t.Context())
			if what == "replay" {
				s.mu.Lock()
				s.stop[args[0]] = stop
				s.mu.Unlock()
			}
			s.wg.Go(func() {
				time.Sleep(at)
				switch what {
				case "replay":
					s.replay(ctx, t, args[0], args[1:], opts)
				case "read":
					s.read(t, args)
				case "cancel":
					s.cancel(args[0])
				}
				stop()
			})
		}
	}
	s.wg.Wait()
	for _, b := range s.blobs {
		for c.blobs[b.digest] != nil {
			require.NoError(t, b.Close())
		}
	}
	return s.wire.String(s.quiet)
}

const scheduleBlob = 16 << 20

func (s *schedule) image(t *testing.T, c *Cache, name string, blobs []string) {
	for _, n := range blobs {
		b, err := c.Blob(digest.FromString(n), scheduleBlob, &wired{&s.wire, n})
		require.NoError(t, err)
		s.blobs[n] = b
		s.images[name] = append(s.images[name], b)
	}
}

// place reads BLOB:OFF+LEN.
func (s *schedule) place(t *testing.T, v string) (b *Blob, off, n int64) {
	name, at, _ := strings.Cut(v, ":")
	_, err := fmt.Sscanf(at, "%d+%d", &off, &n)
	require.NoError(t, err, v)
	return s.blobs[name], off << 10, n << 10
}

func (s *schedule) replay(ctx context.Context, t *testing.T, image string, ranges []string, opts map[string]string) {
	stack := s.images[image]
	plan := &list{}
	for _, v := range ranges {
		b, off, n := s.place(t, v)
		plan.wants = append(plan.wants, Want{Layer: slices.Index(stack, b), Off: off, Len: n})
	}
	var o PrefetchOptions
	for k, v := range opts {
		n := number(t, v)
		switch k {
		case "inflight":
			o.Limits.InFlight = n << 10
		case "requests":
			o.Limits.Requests = int(n)
		case "rate":
			o.Limits.Rate = n << 10
		case "perminute":
			o.Limits.PerMinute = int(n)
		}
	}
	begun := time.Now()
	r, err := stack.Prefetch(ctx, plan, &o)
	s.wire.note(time.Now(), false, "replay %s ends after %s ms: %d requests, %d KiB, here %d KiB, failed %d%s",
		image, millis(time.Since(begun)), r.Requests, r.Bytes>>10, r.Here>>10, r.Failed, because(err))
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + strings.ReplaceAll(err.Error(), digest.FromString("a").String(), "a")
}

// thinks is what a reader takes between two reads. It is not nothing, so that
// whether a stream sees the one or the other is no matter of chance.
const thinks = 100 * time.Microsecond

func (s *schedule) read(t *testing.T, ranges []string) {
	for _, v := range ranges {
		b, off, n := s.place(t, v)
		begun, from := time.Now(), FromCache
		if !b.has(off, n) {
			var err error
			from, err = b.ensure(off, n, newPatience(0))
			require.NoError(t, err)
		}
		p := make([]byte, n)
		_, err := b.file.ReadAt(p, off)
		require.NoError(t, err)
		require.True(t, bytes.Equal(p, wiredBytes(off, n)), v)
		time.Sleep(thinks)
		s.wire.note(begun, false, "read %s took %s ms, %s", v, millis(time.Since(begun)-thinks), from)
	}
}

func millis(d time.Duration) string {
	return strconv.FormatFloat(float64(d.Round(100*time.Microsecond))/1e6, 'f', 1, 64)
}

// wire is a link: an answer comes after delay, and the bytes of all answers
// share the rate, 16 KiB in turn.
type wire struct {
	delay time.Duration
	rate  float64 // bytes a second
	start time.Time

	mu    sync.Mutex // guards the fields below
	free  time.Time
	first time.Time // the first byte
	busy  time.Duration
	fails []fault
	asked map[string]int // how often, by place
	lines []noted
}

type fault struct {
	lane            Lane
	every           int
	after, from, to time.Duration
}

func (f *fault) hits(place int64, asked int) bool {
	return f.every == 1 || asked == 1 && place%int64(f.every) == int64(f.every)-1
}

type noted struct {
	at      time.Time
	request bool
	text    string
}

func (w *wire) note(at time.Time, request bool, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, noted{at, request, fmt.Sprintf(format, args...)})
}

func (w *wire) String(quiet bool) string {
	slices.SortStableFunc(w.lines, func(a, b noted) int {
		return cmp.Or(a.at.Compare(b.at), strings.Compare(a.text, b.text))
	})
	var b strings.Builder
	for _, l := range w.lines {
		if !quiet || !l.request {
			fmt.Fprintf(&b, "%7s %s\n", millis(l.at.Sub(w.start)), l.text)
		}
	}
	fmt.Fprintf(&b, "link: %.0f %% used from the first byte to the last\n", 100*w.busy.Seconds()/w.free.Sub(w.first).Seconds())
	return b.String()
}

func (w *wire) fail(t *testing.T, lane string, opts map[string]string) {
	f := fault{every: 1, to: time.Hour}
	if lane == "background" {
		f.lane = Background
	}
	for k, v := range opts {
		switch k {
		case "every":
			f.every = int(number(t, v))
		case "after":
			f.after = duration(t, v)
		case "from":
			f.from = duration(t, v)
		case "to":
			f.to = duration(t, v)
		}
	}
	w.fails = append(w.fails, f)
}

var laneNames = []string{"demand", "background"}

// send notes a request and says when its answer comes, or with which error.
func (w *wire) send(name string, off, n int64, lane Lane) (ready time.Time, err error) {
	now := time.Now()
	w.note(now, true, "%s %s:%d+%d", laneNames[lane], name, off>>10, n>>10)
	w.mu.Lock()
	defer w.mu.Unlock()
	place := fmt.Sprint(name, off)
	w.asked[place]++
	for _, f := range w.fails {
		if at := now.Sub(w.start); f.lane == lane && f.hits(off>>20, w.asked[place]) && f.from <= at && at < f.to {
			if err = errors.New("503"); f.after > 0 {
				err = answer503{f.after}
			}
		}
	}
	return now.Add(w.delay + apart(name, off)), err
}

// apart keeps what happens to different ranges from happening at the same time,
// so that a script always has the same end.
func apart(name string, off int64) time.Duration {
	return time.Duration(off>>10)*time.Nanosecond + time.Duration(name[0]-'a')*20*time.Microsecond
}

// take puts n bytes on the wire that are ready at that time.
func (w *wire) take(ready time.Time, n int) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first.IsZero() {
		w.first = ready
	}
	if w.free.Before(ready) {
		w.free = ready
	}
	d := time.Duration(float64(n) / w.rate * float64(time.Second))
	w.busy += d
	w.free = w.free.Add(d)
	return w.free
}

// wired is a blob behind a wire.
type wired struct {
	w    *wire
	name string
}

func (o *wired) Host() string { return "wire.test" }

func (o *wired) Fetch(ctx context.Context, off, n int64, lane Lane) (io.ReadCloser, error) {
	ready, err := o.w.send(o.name, off, n, lane)
	if e := sleep(ctx, time.Until(ready)); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, err
	}
	return &wiredBody{w: o.w, ctx: ctx, off: off, end: off + n, ready: ready, apart: apart(o.name, off)}, nil
}

type wiredBody struct {
	w        *wire
	ctx      context.Context
	off, end int64
	ready    time.Time
	apart    time.Duration
}

func wiredBytes(off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte((off + int64(i)) >> 8)
	}
	return p
}

func (r *wiredBody) Read(p []byte) (int, error) {
	n := min(int64(len(p)), 16<<10, r.end-r.off)
	if n == 0 {
		return 0, io.EOF
	}
	if now := time.Now(); r.ready.Before(now) { // the reader has paused
		r.ready = now.Add(r.apart)
		if err := sleep(r.ctx, r.apart); err != nil {
			return 0, err
		}
	}
	r.ready = r.w.take(r.ready, int(n))
	if err := sleep(r.ctx, time.Until(r.ready)); err != nil {
		return 0, err
	}
	copy(p, wiredBytes(r.off, n))
	r.off += n
	return int(n), nil
}

func (r *wiredBody) Close() error { return nil }
