package backstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// silence is how long nothing is heard of a request before another one
	// may be sent beside it, or in its place where bytes had begun to come. It
	// doubles, up to longestSilence, with each failure in a row.
	silence        = 3 * time.Second
	longestSilence = 20 * time.Second
	// backgroundTries is how often in a row a request that nobody waits for
	// may fail, and backgroundWait how long it waits for a host that is away.
	backgroundTries = 3
	backgroundWait  = 2 * time.Minute
)

// errSilent is an attempt of which nothing has been heard for too long.
var errSilent = errors.New("no bytes for too long")

// transfer brings a flight's bytes into the cache, with as many requests as it
// takes.
func (b *Blob) transfer(f *flight) error {
	for {
		if err := b.enter(f); err != nil {
			return err
		}
		begun := time.Now()
		err := b.attempt(f)
		switch {
		case err == nil:
			return nil
		case b.ctx.Err() != nil:
			return errClosed
		case f.ctx.Err() != nil:
			return errAbandoned
		case !retryable(err):
			return err
		}
		if err := b.putUpWith(f, begun, err); err != nil {
			return err
		}
	}
}

// enter waits until the host is worth a request. Background fetches also wait
// for what others of their kind have found out.
func (b *Blob) enter(f *flight) error {
	ctx, l := f.ctx, b.link
	if f.lane == Background {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, backgroundWait)
		defer cancel()
	}
	var err error
	if f.lane == Background {
		err = l.behind.enter(ctx, f)
	}
	if err == nil {
		err = l.outage.enter(ctx, f)
	}
	switch {
	case err == nil && !f.givenUp():
		return nil
	case b.ctx.Err() != nil:
		return errClosed
	case f.ctx.Err() != nil:
		return errAbandoned
	}
	for _, err := range []error{f.lastError(), l.outage.lasting(), l.behind.lasting()} {
		if err != nil {
			return err
		}
	}
	return nil
}

// givenUp reports whether a flight that has failed is of no use to anybody.
func (f *flight) givenUp() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last != nil && f.wanted == 0 && (f.lane == Demand || f.failures >= backgroundTries)
}

func (f *flight) lastError() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

// putUpWith notes a failure that may pass. It returns err where the flight is
// given up for it. A background flight that somebody waits for is: he fetches
// the rest himself, and at once.
func (b *Blob) putUpWith(f *flight, begun time.Time, err error) error {
	n := f.failed(begun, err)
	if retryAfter(err) > 0 {
		b.link.throttle()
	}
	o := &b.link.outage
	if f.lane == Background && retryAfter(err) == 0 {
		o = &b.link.behind // nothing that readers need to be held up for
	}
	away := o.failed(f, begun, err)
	if f.givenUp() || f.lane == Background && f.isWanted() {
		return err
	}
	f.grant.release((*grant).park)
	if away {
		return nil // enter waits
	}
	f.hold()
	pause := jitter(min(firstPause<<min(n-1, 8), longestPause))
	if sleep(f.ctx, max(pause, retryAfter(err))) != nil {
		return errClosed
	}
	return f.proceed()
}

// attempt asks for what is missing of a flight and streams it into the cache.
func (b *Blob) attempt(f *flight) error {
	if f.lane == Demand {
		select {
		case b.link.demand <- struct{}{}:
			defer func() { <-b.link.demand }()
		case <-b.ctx.Done():
			return errClosed
		}
	}
	f.asks(true)
	defer f.asks(false)
	t, err := b.ask(f)
	if err != nil {
		return err
	}
	defer t.cancel(nil)
	defer t.body.Close()
	s := stream{b: b, f: f, try: t}
	return s.copy(f.ctx)
}

// A try is one request.
type try struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	off    int64
	begun  time.Time
	alone  bool // nothing was coming from the host then
	body   io.ReadCloser
	err    error
}

// onceFetcher is a Fetcher that can be asked without tries of its own.
type onceFetcher interface {
	FetchOnce(ctx context.Context, off, n int64, lane Lane) (io.ReadCloser, error)
}

// send starts a request for what is missing of f. It is given to answers unless
// it is cancelled before.
func (b *Blob) send(f *flight, answers chan<- *try) *try {
	f.mu.Lock()
	t := &try{off: f.pos, begun: time.Now()}
	f.attempts++
	lane, granted := f.lane, f.grant != nil && f.attempts == 1
	f.mu.Unlock()
	if !granted {
		b.link.requested()
	}
	t.alone = b.link.quiet()
	t.ctx, t.cancel = context.WithCancelCause(f.ctx)
	if lane == Background {
		b.stats.backgroundRequests.Add(1)
	} else {
		b.stats.demandRequests.Add(1)
	}
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		fetch := b.origin.Fetch
		if o, ok := b.origin.(onceFetcher); ok {
			fetch = o.FetchOnce
		}
		t.body, t.err = fetch(t.ctx, t.off, f.end-t.off, lane)
		select {
		case answers <- t:
		case <-t.ctx.Done():
			if t.err == nil {
				_ = t.body.Close()
			}
		}
	}()
	return t
}

// asking is one ask: the requests that are out, the oldest first, never more
// than two.
type asking struct {
	b       *Blob
	f       *flight
	answers chan *try
	out     []*try
	doubt   *queued // nil, or waiting for permission to send another one
	timer   *time.Timer
}

// ask sends a request for what is missing of f, and where nothing is heard of
// it others beside it, and returns the first that is answered. The first one is
// left waiting, since the host may just be slow; of the others only the latest.
func (b *Blob) ask(f *flight) (*try, error) {
	quiet := f.patienceWithHost()
	if b.link.outage.lasting() != nil {
		quiet = longestPause // who has tried in vain queues again
	}
	a := &asking{b: b, f: f, answers: make(chan *try), timer: time.NewTimer(quiet)}
	defer a.end()
	a.send()
	for {
		var permitted chan struct{}
		if a.doubt != nil {
			permitted = a.doubt.ok
		}
		select {
		case t := <-a.answers:
			switch {
			case !a.drop(t): // it was given up at the same moment
				if t.err == nil {
					_ = t.body.Close()
				}
				continue
			case t.err == nil:
				return t, nil
			}
			if err := a.failed(t); err != nil {
				return nil, err
			}
		case <-a.timer.C:
			if a.doubt == nil && f.isWanted() {
				a.doubt = b.link.outage.doubt(f, a.out[len(a.out)-1].begun)
			}
		case <-permitted:
			a.doubt = nil
			if len(a.out) > 1 {
				late := a.out[1]
				a.drop(late)
				late.cancel(errSilent)
			}
			a.send()
			a.timer.Reset(longestPause)
		case <-f.ctx.Done():
			return nil, errClosed
		}
	}
}

func (a *asking) send() { a.out = append(a.out, a.b.send(a.f, a.answers)) }

// failed notes the failure of t; the error is final for the ask unless another
// request is out.
func (a *asking) failed(t *try) error {
	t.cancel(nil)
	if len(a.out) == 0 || !retryable(t.err) {
		return t.err
	}
	a.f.failed(t.begun, t.err)
	a.b.link.outage.failed(a.f, t.begun, t.err)
	if a.doubt == nil {
		a.doubt = a.b.link.outage.doubt(a.f, a.out[0].begun)
	}
	return nil
}

// drop takes t out of those that are out, if it is one of them.
func (a *asking) drop(t *try) bool {
	i := slices.Index(a.out, t)
	if i >= 0 {
		a.out = slices.Delete(a.out, i, i+1)
	}
	return i >= 0
}

func (a *asking) end() {
	a.timer.Stop()
	a.b.link.outage.leave(a.doubt)
	for _, t := range a.out {
		t.cancel(nil)
	}
}

// patienceWithHost is how long nothing need be heard of a request.
func (f *flight) patienceWithHost() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return min(silence<<min(f.failures, 8), longestSilence)
}

// stream is the body of a request on its way to the cache.
type stream struct {
	b   *Blob
	f   *flight
	try *try
}

var quanta = sync.Pool{New: func() any { return new([quantum]byte) }}

func (s *stream) copy(ctx context.Context) error {
	buf := quanta.Get().(*[quantum]byte)
	defer quanta.Put(buf)
	quiet := time.AfterFunc(time.Hour, func() { s.try.cancel(errSilent) })
	quiet.Stop()
	pos, kept := s.try.off, s.try.off // written, and of it readable
	defer func() {
		if pos > s.try.off {
			s.b.link.ebbs()
		}
	}()
	for pos < s.f.end {
		if !s.f.isWanted() {
			s.b.link.giveWay(ctx, s.f.hurry)
		}
		// What is left of a chunk stays in the file: only whole chunks count.
		quiet.Reset(s.f.patienceWithHost())
		n, err := s.try.body.Read(buf[:min(int64(len(buf)), s.f.end-pos)])
		quiet.Stop()
		if n > 0 {
			if pos == s.try.off {
				s.b.link.flows(s.try.begun, s.try.alone)
				s.b.link.outage.succeeded(s.try.begun)
				s.b.link.behind.succeeded(s.try.begun)
			}
			if e := s.arrived(buf[:n], pos); e != nil {
				return e
			}
			pos += int64(n)
			kept = s.keep(kept, pos)
		}
		switch {
		case err == io.EOF && pos < s.f.end:
			return io.ErrUnexpectedEOF
		case err != nil && err != io.EOF:
			if errors.Is(context.Cause(s.try.ctx), errSilent) {
				err = errSilent
			}
			return err
		}
	}
	return nil
}

// arrived writes bytes into the cache file and accounts for them.
func (s *stream) arrived(p []byte, pos int64) error {
	n := int64(len(p))
	if s.f.lane == Background {
		s.b.stats.backgroundBytes.Add(n)
	} else {
		s.b.stats.demandBytes.Add(n)
	}
	s.b.link.received(n, s.f.grant, pos == s.try.off)
	if s.f.aside != nil {
		copy(s.f.aside[pos-s.f.off:], p)
		return nil
	}
	if _, err := s.b.file.WriteAt(p, pos); err != nil {
		s.b.unkept.Do(func() {
			s.b.cache.o.Log.Warn("cache: cannot be written, reads go around it", "blob", s.b.digest, "err", err)
		})
		return fmt.Errorf("%w: %w", errNotKept, err)
	}
	return nil
}

// keep makes the whole chunks of [kept, pos) readable and returns their end.
func (s *stream) keep(kept, pos int64) int64 {
	if s.f.aside != nil {
		s.f.advance(pos)
		return pos
	}
	end := pos
	if pos < s.b.size {
		end = pos / s.b.chunk * s.b.chunk
	}
	if end <= kept {
		return kept
	}
	from, to := s.b.chunksOf(kept, end-kept)
	if s.f.lane == Background {
		s.b.ahead.addAll(from, to)
	}
	if err := s.b.live.add(from, to); err != nil {
		s.b.lost(err)
	}
	s.b.mu.Lock()
	s.b.present.addAll(from, to)
	s.b.dirty = true
	s.b.mu.Unlock()
	s.b.touch(kept, end-kept)
	s.f.advance(end)
	return end
}

// errClosed ends reads of a blob that is being closed.
var errClosed = fmt.Errorf("backstore: %w", io.ErrClosedPipe)

// retryable reports whether a failed fetch may succeed when tried again: not
// what the origin has refused, nor what this node lacks.
func retryable(err error) bool {
	var answer interface{ Permanent() bool }
	if errors.As(err, &answer) && answer.Permanent() {
		return false
	}
	for _, final := range []error{
		os.ErrNotExist, os.ErrClosed, errors.ErrUnsupported, errdefs.ErrUnauthenticated, errdefs.ErrPermissionDenied,
		errNotKept, context.Canceled, errClosed,
	} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}
