// Package recorder turns the demand reads of an image into a trace file.
//
// A [Recorder] is a backstore.Observer. ObserveRead only puts the event into a
// buffer; one goroutine empties the buffer ten times a second, keeps what
// touches bytes of a layer for the first time, appends that to the trace file
// and flushes it once a second. A process that is killed therefore loses the
// last second, and the file reads up to there.
//
// The recording stops by itself when one of the rules in [Options] says so, or
// when the caller says so. Rules compose, the first one wins:
//
//   - ready: the caller has called Ready, and Tail has passed since, or for
//     Settle nothing was a first touch, or it has called Over;
//   - quiet: reads have begun, and for Quiet none was a first touch; this is
//     a guess at being ready and counts only until Ready is called;
//   - duration, bytes, events: a limit is reached;
//   - stop: the caller has called Stop, or Over before Ready, or Wait's context
//     has ended.
//
// The time in which a read waits for its bytes is not quiet, if Options.Stalled
// tells of it.
//
// The reason, one line that begins with one of these words, is returned by
// Wait and written into the end of the trace.
//
// [Files] tells which files of the image the bytes of layers belong to; it is
// made from the mounted image, by [MapFiles] or a [Mapper], and names the files
// in a trace. [Attribute] names the processes, from what a probe has seen of the
// device, and [FromDevice] turns such a trace of a device into one of layers. A
// [DeviceMap] is what all of them need to know of the image.
//
// All methods are safe for concurrent use. A Recorder needs no closing beyond
// Stop and Wait: after Wait its goroutine is gone and nothing is written any
// more, so that the file can be closed. Reads observed after that are ignored;
// the image may be closed before or after the recorder.
package recorder

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// Options are the stop rules.
type Options struct {
	// Tail is how long recording goes on after the workload is ready.
	// Default 0.
	Tail time.Duration

	// Settle ends the tail when nothing new has been touched for so long: for
	// services that listen before they have loaded all they need. Default 0:
	// the tail lasts as long as Tail says.
	Settle time.Duration

	// Quiet stops the recording when, after the first read, nothing new has
	// been touched for so long. Without Stalled it must be longer than the
	// longest wait for a fetch, since a read is observed only when its bytes have
	// come. Default 5 s; negative: never.
	Quiet time.Duration

	// Stalled tells, whenever it is asked, for how long at least one read has
	// waited for its bytes, so far. That time counts neither as quiet nor as
	// settled. It is called by one goroutine at a time. Default: nobody knows.
	Stalled func() time.Duration

	// Given gives the reads that have come since it was last called and that
	// nobody observes, those of a probe on a device, with all that is known of
	// them. One goroutine calls it, ten times a second and, with last set, once at
	// the end. Stats.Reads does not count them. It is for a header without layers.
	// Default: none.
	Given func(last bool) []tracefmt.Event

	// MaxDuration stops the recording so long after Header.Start.
	// Default 60 s; negative: never.
	MaxDuration time.Duration

	// MaxBytes stops the recording when so many distinct bytes have been
	// read. Default 0: no limit.
	MaxBytes int64

	// MaxEvents stops the recording when the trace has so many events.
	// Default, and at most, tracefmt.MaxEvents.
	MaxEvents int
}

func (o *Options) filled() Options {
	var f Options
	if o != nil {
		f = *o
	}
	f.Tail, f.Settle = max(f.Tail, 0), max(f.Settle, 0)
	if f.Stalled == nil {
		f.Stalled = func() time.Duration { return 0 }
	}
	f.Quiet = durationOr(f.Quiet, 5*time.Second)
	f.MaxDuration = durationOr(f.MaxDuration, time.Minute)
	if f.MaxBytes <= 0 {
		f.MaxBytes = math.MaxInt64
	}
	if f.MaxEvents <= 0 || f.MaxEvents > tracefmt.MaxEvents {
		f.MaxEvents = tracefmt.MaxEvents
	}
	return f
}

// durationOr returns def for zero, and for ever for a negative d.
func durationOr(d, def time.Duration) time.Duration {
	switch {
	case d == 0:
		return def
	case d < 0:
		return math.MaxInt64
	}
	return d
}

// Timing of the writing goroutine. Together they are well below the second
// that a kill may lose.
const (
	drainEvery = 100 * time.Millisecond
	flushEvery = 500 * time.Millisecond
)

// A Recorder records one start.
type Recorder struct {
	opts   Options
	header tracefmt.Header
	in     inbox
	rules  rules
	wake   chan struct{} // nudges run: the inbox fills, or a rule has news
	done   chan struct{} // closed when run has ended

	// Of the goroutine run alone, until done is closed.
	out     *tracefmt.Writer
	touched tracefmt.Touched
	parts   []tracefmt.Event // scratch
	flushed time.Duration    // when
	last    bool             // the recording has ended, but for what is still to be kept
	reason  string
	err     error

	events, bytes, invalid atomic.Int64
	cpu                    atomic.Int64 // ns, of run
}

// Stats are counts so far.
type Stats struct {
	Reads   int64 // that were observed
	Events  int64 // first touches in the trace
	Bytes   int64 // distinct bytes in the trace
	Dropped int64 // reads that were lost: too many at once, or outside their layer

	// CPU is the processor time that the recording took, at most: that of the
	// goroutine that writes, measured, and ObserveCost for each read.
	CPU time.Duration
}

// ObserveCost is what a read pays at most for being observed, when the recorder
// keeps up; see BenchmarkObserveRead.
const ObserveCost = 200 * time.Nanosecond

// New begins to record into w and starts the goroutine that writes. Each frame
// is one call of w.Write.
//
// h.Start is the zero of all times of the trace and has to be the moment that
// ReadEvent.At counts from, when the image was opened; the zero time means now.
// Reads beyond the Decoded size of a layer of h are cut off there.
func New(w io.Writer, h tracefmt.Header, o *Options) (*Recorder, error) {
	if h.Start.IsZero() {
		h.Start = time.Now()
	}
	out, err := tracefmt.NewWriter(w, h)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	opts := o.filled()
	r := &Recorder{
		opts:   opts,
		header: h,
		rules:  rules{opts: opts, last: never},
		out:    out,
		wake:   make(chan struct{}, 1),
		done:   make(chan struct{}),
	}
	r.in.init()
	go r.run()
	return r, nil
}

// ObserveRead takes one demand read. It does not allocate, and waits for
// nothing but a short critical section.
func (r *Recorder) ObserveRead(e backstore.ReadEvent) {
	if r.in.put(e) {
		r.nudge()
	}
}

func (r *Recorder) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Ready says that the workload is ready now, and how that was seen: "port
// 8080", "exit 0". Only the first call counts.
func (r *Recorder) Ready(how string) { r.ReadyAt(time.Now(), how) }

// ReadyAt is Ready for a moment that has passed.
func (r *Recorder) ReadyAt(at time.Time, how string) {
	r.rules.setReady(min(max(at.Sub(r.header.Start), 0), r.now()), how)
	r.nudge()
}

// Over says that nothing more will be read, because the container has ended,
// say. A workload that was ready needs no tail then.
func (r *Recorder) Over(why string) {
	r.rules.setOver(why)
	r.nudge()
}

// Stop ends the recording for a reason of the caller's. It does not wait.
func (r *Recorder) Stop(why string) {
	r.rules.setStop(why)
	r.nudge()
}

// Done is closed when the recording has ended and the trace is complete.
func (r *Recorder) Done() <-chan struct{} { return r.done }

// Wait waits until the recording has ended and returns why. If ctx ends first,
// it stops the recording. The error is of the trace file, which then has no
// end and reads up to what could be written.
func (r *Recorder) Wait(ctx context.Context) (reason string, err error) {
	select {
	case <-r.done:
	case <-ctx.Done():
		r.Stop(context.Cause(ctx).Error())
		<-r.done
	}
	return r.reason, r.err
}

// Stats may be called at any time.
func (r *Recorder) Stats() Stats {
	reads, dropped := r.in.counts()
	return Stats{
		Reads:   reads,
		Events:  r.events.Load(),
		Bytes:   r.bytes.Load(),
		Dropped: dropped + r.invalid.Load(),
		CPU:     time.Duration(r.cpu.Load()) + time.Duration(reads)*ObserveCost,
	}
}

// now is the time since Header.Start.
func (r *Recorder) now() time.Duration { return max(time.Since(r.header.Start), 0) }

// run writes the trace until a rule ends it.
func (r *Recorder) run() {
	defer close(r.done)
	runtime.LockOSThread() // whose time is the goroutine's
	defer runtime.UnlockOSThread()
	begun := threadTime()
	defer func() { r.cpu.Store(int64(threadTime() - begun)) }()
	timer := time.NewTimer(drainEvery)
	defer timer.Stop()
	for {
		select {
		case <-r.wake:
		case <-timer.C:
		}
		now := r.now()
		r.keep(r.in.take(), now)
		reason, next := r.check(now)
		if reason != "" {
			r.finish(reason)
			return
		}
		timer.Reset(min(next, drainEvery))
	}
}

// threadTime is the processor time of the calling thread.
func threadTime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// check flushes if it is time to, and asks the rules: the reason to stop, or
// how long nothing can happen.
func (r *Recorder) check(now time.Duration) (reason string, next time.Duration) {
	if r.err == nil && now-r.flushed >= flushEvery {
		r.err = r.out.Flush()
		r.flushed = now
	}
	if r.err != nil {
		return "error: " + r.err.Error(), 0
	}
	return r.rules.check(now, r.opts.Stalled(), r.events.Load(), r.bytes.Load())
}

// finish takes the reads up to now and writes the end.
func (r *Recorder) finish(reason string) {
	r.in.close()
	r.last = true
	now := r.now()
	r.keep(r.in.take(), now)
	r.reason = reason
	if r.err != nil {
		r.err = fmt.Errorf("record: %w", r.err)
		return
	}
	end := tracefmt.End{Reason: reason, Ready: r.rules.readyTime(), Duration: now}
	if err := r.out.Finish(end); err != nil {
		r.err = fmt.Errorf("record: %w", err)
	}
}

// keep appends the first touches among reads, which it sorts, to the trace.
func (r *Recorder) keep(reads []backstore.ReadEvent, now time.Duration) {
	if !slices.IsSortedFunc(reads, byTime) {
		slices.SortStableFunc(reads, byTime)
	}
	before := r.events.Load()
	for i := range reads {
		e, ok := r.event(&reads[i])
		if !ok {
			r.invalid.Add(1)
			continue
		}
		r.parts = r.touched.Add(r.parts[:0], e)
		for j := range r.parts {
			r.add(&r.parts[j])
		}
	}
	r.keepGiven()
	if r.events.Load() != before {
		r.rules.touched(now, r.opts.Stalled())
	}
}

func (r *Recorder) add(e *tracefmt.Event) {
	if r.err != nil || r.events.Load() >= int64(r.opts.MaxEvents) || r.bytes.Load() >= r.opts.MaxBytes {
		return
	}
	if r.err = r.out.Add(*e); r.err == nil {
		r.events.Add(1)
		r.bytes.Add(e.Len)
	}
}

// event translates a read, and cuts it off at the end of its layer.
func (r *Recorder) event(e *backstore.ReadEvent) (tracefmt.Event, bool) {
	v := tracefmt.Event{
		At: max(e.At, 0), Wait: max(e.Wait, 0),
		Layer: e.Layer, Off: e.Off, Len: e.Len, Origin: uint8(e.Origin),
		BlobOff: e.BlobOff, BlobLen: e.BlobLen,
	}
	layers := r.header.Layers
	if e.Layer < 0 || e.Off < 0 || e.Len <= 0 || e.Off > math.MaxInt64-e.Len {
		return v, false
	}
	if len(layers) == 0 {
		return v, e.Layer < tracefmt.MaxLayers
	}
	if e.Layer >= len(layers) {
		return v, false
	}
	if size := layers[e.Layer].Decoded; size > 0 {
		v.Len = min(v.Len, size-v.Off)
	}
	return v, v.Len > 0
}

func byTime(a, b backstore.ReadEvent) int { return cmp.Compare(a.At, b.At) }
