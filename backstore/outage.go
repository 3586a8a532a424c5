package backstore

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// How fetches go on while a registry is away.
const (
	// firstPause is the time from the first failure to the next attempt at a
	// host; it doubles up to longestPause. Each varies at random from half of
	// it to the whole.
	firstPause   = 100 * time.Millisecond
	longestPause = 2 * time.Second
	// ordinary is for how long failures are nothing to speak of, and no read
	// is given up for them.
	ordinary = 3 * time.Second
	// goesOn is how often a lasting outage is reported.
	goesOn = 30 * time.Second
	// certain is after how long without any answer a host counts as away
	// though no request has failed yet.
	certain = 10 * time.Second
	// ramp is how many fetches each success lets through that had been
	// waiting for it.
	ramp = 4
)

// An outage is what keeps the fetches from a host from succeeding, if
// anything does. While it lasts fetches wait in a queue, and one at a time is
// let through to try; those who have sent a request and hear nothing queue for
// permission to send another one. The first success ends the outage and lets
// the queue go, [ramp] for each success.
//
// A host that answers, but with errors, holds up only the blobs that it has
// failed to give.
type outage struct {
	host string
	log  *slog.Logger

	mu       sync.Mutex // guards the fields below
	since    time.Time  // when the first of the failures was begun; zero while all is well
	good     time.Time  // of the last success
	answered bool       // what failed was answered
	told     time.Time  // when the host has said that it wants to be left alone
	asked    time.Time  // until when
	failing  map[digest.Digest]bool
	err      error // the last one
	failures int   // attempts since the outage began
	reported time.Time
	pause    time.Duration
	next     time.Time // when the next fetch may be let through
	queue    []*queued
	timer    *time.Timer // lets the next one through; nil while the queue is empty
	due      time.Time   // when timer fires
	armed    int         // how often it was made

	outages, throttled int64 // begun, and answers with a Retry-After, ever
}

// queued is a fetch that waits to be let through.
type queued struct {
	f    *flight
	sent time.Time // of a request that it hears nothing of; zero if there is none
	ok   chan struct{}
}

// enter waits until f may send a request: at once where all is well.
func (o *outage) enter(ctx context.Context, f *flight) error {
	o.mu.Lock()
	if o.since.IsZero() || o.answered && !o.failing[f.blob] && !time.Now().Before(o.asked) {
		o.mu.Unlock()
		return ctx.Err()
	}
	q := o.join(f, time.Time{})
	f.hold()
	o.mu.Unlock()
	f.grant.release((*grant).park)
	select {
	case <-q.ok:
		return f.proceed()
	case <-ctx.Done():
		o.leave(q)
		return ctx.Err()
	}
}

// doubt queues f, which hears nothing of what it has sent, for another try.
func (o *outage) doubt(f *flight, sent time.Time) *queued {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.join(f, sent)
}

// join adds to the queue. o.mu is held.
func (o *outage) join(f *flight, sent time.Time) *queued {
	q := &queued{f: f, sent: sent, ok: make(chan struct{})}
	o.queue = append(o.queue, q)
	o.arm()
	return q
}

// leave takes q out of the queue. It may be nil, or gone already.
func (o *outage) leave(q *queued) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.queue = slices.DeleteFunc(o.queue, func(p *queued) bool { return p == q })
	o.arm()
}

// arm sets the timer for the head of the queue. o.mu is held.
func (o *outage) arm() {
	if o.timer != nil && (len(o.queue) == 0 || !o.due.Equal(o.next)) {
		o.timer.Stop()
		o.timer = nil
	}
	if len(o.queue) > 0 && o.timer == nil {
		o.due = o.next
		o.armed++
		n := o.armed
		o.timer = time.AfterFunc(time.Until(o.next), func() { o.turn(n) })
	}
}

// turn lets one through, when the n-th timer has fired: demand before
// background.
func (o *outage) turn(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.timer == nil || n != o.armed {
		return // stopped too late
	}
	o.timer = nil
	if wait := time.Until(o.next); wait > 0 || len(o.queue) == 0 {
		o.arm() // it was put off meanwhile
		return
	}
	i := max(0, slices.IndexFunc(o.queue, func(q *queued) bool { return q.f.isWanted() }))
	q := o.queue[i]
	o.queue = slices.Delete(o.queue, i, i+1)
	close(q.ok)
	if o.since.IsZero() && o.good.Before(q.sent) && time.Since(q.sent) >= certain {
		o.begin(q.sent, q.f, errSilent)
	}
	if o.since.IsZero() {
		o.next = time.Now().Add(longestPause)
	} else {
		o.putOff(0)
		o.report(q.f)
	}
	o.arm()
}

// begin starts an outage. o.mu is held.
func (o *outage) begin(at time.Time, f *flight, err error) {
	o.since, o.reported = at, time.Time{}
	o.err, o.answered = err, isAnswer(err)
	o.failures, o.failing = 0, map[digest.Digest]bool{f.blob: true}
	o.outages++
	o.pause = 0
}

// putOff sets the time of the next try, least from now or later. o.mu is held.
func (o *outage) putOff(least time.Duration) {
	o.pause = min(max(2*o.pause, firstPause), longestPause)
	o.next = time.Now().Add(max(jitter(o.pause), least))
}

// jitter is a random time from half of d to d.
func jitter(d time.Duration) time.Duration { return d/2 + random(d/2) }

// random is a random time from 0 to d. Tests may know it beforehand.
var random = func(d time.Duration) time.Duration { return rand.N(d + 1) }

// failed notes that an attempt of f, begun at that time, has failed. It
// reports whether that speaks against the host: not where the host has answered
// others since.
func (o *outage) failed(f *flight, begun time.Time, err error) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if retryAfter(err) > 0 {
		o.throttled++
	}
	if begun.Before(o.good) {
		return false
	}
	if o.since.IsZero() {
		o.begin(begun, f, err)
		o.putOff(0)
	}
	o.err, o.answered = err, isAnswer(err)
	o.failing[f.blob] = true
	o.failures++
	if after := retryAfter(err); after > time.Until(o.next) {
		// All who were told so come back a little apart.
		o.next = time.Now().Add(after + random(min(after/8, longestPause)))
		o.told, o.asked = time.Now(), o.next
	}
	o.arm()
	o.report(f)
	return true
}

// succeeded notes that the host has given bytes to a request begun at that
// time.
func (o *outage) succeeded(begun time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.good = time.Now()
	if begun.Before(o.told) && o.good.Before(o.asked) {
		return // it was let in before that
	}
	if !o.since.IsZero() {
		if !o.reported.IsZero() {
			o.log.Warn("registry is back", "host", o.host, "after", time.Since(o.since).Round(time.Millisecond), "attempts", o.failures)
		}
		o.since, o.failing, o.pause = time.Time{}, nil, 0
		o.next = o.good // for the rest of the queue; each success lets more of it go
	}
	n := 0
	o.queue = slices.DeleteFunc(o.queue, func(q *queued) bool {
		// Who was overtaken by a later request has lost its own.
		if n == ramp || !q.sent.IsZero() && !q.sent.Before(begun) {
			return false
		}
		n++
		close(q.ok)
		return true
	})
	if len(o.queue) > 0 {
		o.next = o.good.Add(longestPause)
	}
	o.arm()
}

// report says now and then that the outage goes on; f is waiting. o.mu is
// held.
func (o *outage) report(f *flight) {
	lasts := time.Since(o.since)
	args := []any{"host", o.host, "blob", f.blob, "offset", f.off, "for", lasts.Round(time.Second), "attempts", o.failures, "err", o.err}
	switch {
	case lasts < ordinary:
		return
	case o.reported.IsZero():
		o.log.Warn("registry is away: reads wait for it", args...)
	case time.Since(o.reported) < goesOn:
		return
	default:
		o.log.Warn("registry is still away", args...)
	}
	o.reported = time.Now()
}

// read returns the counts, and whether there is an outage now.
func (o *outage) read() (throttled, outages int64, away bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.throttled, o.outages, !o.since.IsZero()
}

// lasting returns the error of the outage, nil if there is none.
func (o *outage) lasting() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		return nil
	}
	return o.err
}

// isAnswer reports whether err says that the host has answered.
func isAnswer(err error) bool {
	var e interface{ Answered() bool }
	return errors.As(err, &e) && e.Answered()
}

// retryAfter is how long the host asks to be left alone; 0 if it does not say.
func retryAfter(err error) time.Duration {
	var e interface{ RetryAfter() time.Duration }
	if errors.As(err, &e) {
		return max(0, e.RetryAfter())
	}
	return 0
}

// patience is how long a read goes on waiting for fetches that fail.
type patience struct {
	limit time.Duration // 0: for ever
	since time.Time
}

// newPatience begins a wait: limit 0 is for ever, a negative one is no longer
// than ordinary failures take.
func newPatience(limit time.Duration) patience {
	if limit != 0 {
		limit = max(limit, ordinary)
	}
	return patience{limit: limit, since: time.Now()}
}

// left is how long a flight that has been failing since then is still waited
// for; ok is false if there is no end to it.
func (p patience) left(failing time.Time) (d time.Duration, ok bool) {
	if p.limit == 0 || failing.IsZero() {
		return 0, false
	}
	if failing.Before(p.since) {
		failing = p.since
	}
	return time.Until(failing.Add(p.limit)), true
}
