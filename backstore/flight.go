package backstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	minRun = 64 << 10  // the least that a demand miss fetches
	maxRun = 512 << 10 // the most, before a stream is recognised
)

type span struct{ off, end int64 }

// flight is one request to the origin for chunks [off, end) in bytes, end cut
// at the blob's size.
type flight struct {
	off, end int64
	lane     Lane

	mu       sync.Mutex // guards the fields below
	pos      int64      // readable up to here
	wanted   int        // demand reads that wait for it
	progress chan struct{}
	err      error
	done     bool
}

func newFlight(off, end int64, lane Lane) *flight {
	return &flight{off: off, end: end, lane: lane, pos: off, progress: make(chan struct{})}
}

func (f *flight) advance(pos int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pos = pos
	close(f.progress)
	f.progress = make(chan struct{})
}

func (f *flight) finish(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done, f.err = true, err
	close(f.progress)
}

// wait returns once the flight has passed need, or has failed before it.
func (f *flight) wait(need int64) error {
	f.mu.Lock()
	f.wanted++
	for f.pos < need && !f.done {
		ch := f.progress
		f.mu.Unlock()
		<-ch
		f.mu.Lock()
	}
	f.wanted--
	err := f.err
	if f.pos >= need {
		err = nil
	}
	f.mu.Unlock()
	return err
}

func (f *flight) isWanted() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wanted > 0
}

// waiting is a flight that a read has to wait for, up to an offset.
type waiting struct {
	f      *flight
	need   int64
	joined bool
}

// begin makes sure that flights are under way for all of [off, off+n) that is
// not here, and appends them to ws. It does not wait.
func (b *Blob) begin(ws []waiting, off, n int64) ([]waiting, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return ws, fmt.Errorf("read blob %s: %w", b.digest, errClosed)
	}
	from, to := b.chunksOf(off, n)
	for at := from; ; {
		at = b.present.next(at, to, false)
		if at >= to {
			return ws, nil
		}
		pos := at * b.chunk
		if f := b.flightAt(pos); f != nil {
			end := min(f.end, min(to*b.chunk, b.size))
			ws = append(ws, waiting{f, end, true})
			at = (end + b.chunk - 1) / b.chunk
			continue
		}
		f := b.startDemand(pos, min(to*b.chunk, b.size))
		end := min(f.end, min(to*b.chunk, b.size))
		ws = append(ws, waiting{f, end, false})
		at = (end + b.chunk - 1) / b.chunk
	}
}

// flightAt returns the flight that will bring the chunk at off. b.mu is held.
func (b *Blob) flightAt(off int64) *flight {
	for _, f := range b.flights {
		if f.off <= off && off < f.end {
			return f
		}
	}
	return nil
}

// startDemand starts the flight of a miss that needs [off, need): longer than
// that where a reader goes on forward, never over what is here or under way.
// b.mu is held.
func (b *Blob) startDemand(off, need int64) *flight {
	end := max(need, off+b.runs.next(off, need, b.link.runLength()))
	for _, s := range b.planned {
		if s.off <= off && off < s.end { // pull the planned piece forward
			end = max(need, min(s.end, off+maxPiece))
		}
	}
	return b.start(off, b.clip(off, end), Demand)
}

// clip cuts [off, end) at the blob's end and at the first chunk that is
// here or under way.
func (b *Blob) clip(off, end int64) int64 {
	from, to := b.chunksOf(off, min(end, b.size)-off)
	stop := b.present.next(from+1, to, true) * b.chunk
	for _, f := range b.flights {
		if off < f.off {
			stop = min(stop, f.off)
		}
	}
	return min(stop, b.size)
}

// start adds a flight and runs it. b.mu is held.
func (b *Blob) start(off, end int64, lane Lane) *flight {
	f := newFlight(off, end, lane)
	b.flights = append(b.flights, f)
	b.wg.Add(1)
	go b.fly(f)
	return f
}

// ensure brings [off, off+n) onto the node and says where it came from.
func (b *Blob) ensure(off, n int64) (Origin, error) {
	var buf [8]waiting
	ws, err := b.begin(buf[:0], off, n)
	if err != nil {
		return FromFetch, err
	}
	return b.finish(ws, off, n)
}

// finish waits for what begin has found. A flight that fails is tried again,
// as the reader's own, until the cache's patience ends.
func (b *Blob) finish(ws []waiting, off, n int64) (Origin, error) {
	origin := FromFlight
	deadline := time.Now().Add(b.cache.o.RetryFor)
	for try := 0; ; try++ {
		var failed error
		for _, w := range ws {
			if !w.joined || w.f.lane == Demand {
				origin = FromFetch
			}
			if err := w.f.wait(w.need); err != nil {
				failed = err
			}
		}
		if failed == nil && b.has(off, n) {
			return origin, nil
		}
		if failed != nil && (!retryable(failed) || time.Now().After(deadline)) {
			return origin, failed
		}
		if failed != nil && try > 0 {
			if err := b.pause(try); err != nil {
				return origin, err
			}
		}
		var err error
		if ws, err = b.begin(ws[:0], off, n); err != nil {
			return origin, err
		}
	}
}

// pause backs off after the try-th failure.
func (b *Blob) pause(try int) error {
	t := time.NewTimer(min(100*time.Millisecond<<min(try, 6), 5*time.Second))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-b.ctx.Done():
		return fmt.Errorf("read blob %s: %w", b.digest, errClosed)
	}
}

// fly runs one flight to its end.
func (b *Blob) fly(f *flight) {
	defer b.wg.Done()
	err := b.transfer(f)
	b.mu.Lock()
	b.flights = slices.DeleteFunc(b.flights, func(g *flight) bool { return g == f })
	b.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("fetch %d bytes at %d of blob %s: %w", f.end-f.off, f.off, b.digest, err)
	}
	f.finish(err)
}

// transfer streams a flight into the cache.
func (b *Blob) transfer(f *flight) error {
	n := f.end - f.off
	unread := int64(0) // admitted background bytes that are not paid back yet
	if f.lane == Background {
		unread = n
		b.stats.backgroundRequests.Add(1)
	} else {
		select {
		case b.link.demand <- struct{}{}:
			defer func() { <-b.link.demand }()
		case <-b.ctx.Done():
			return errClosed
		}
		b.stats.demandRequests.Add(1)
	}
	b.link.started(f.lane)
	defer func() { b.link.ended(f.lane, unread) }()
	start := time.Now()
	body, err := b.origin.Fetch(b.ctx, f.off, n, f.lane)
	if err != nil {
		return err
	}
	defer body.Close()
	s := stream{b: b, f: f, body: body, start: start, unread: &unread}
	return s.copy(b.ctx)
}

// stream is the body of a flight on its way to the cache.
type stream struct {
	b      *Blob
	f      *flight
	body   io.Reader
	start  time.Time
	unread *int64
}

var quanta = sync.Pool{New: func() any { return new([quantum]byte) }}

func (s *stream) copy(ctx context.Context) error {
	buf := quanta.Get().(*[quantum]byte)
	defer quanta.Put(buf)
	pos, kept := s.f.off, s.f.off // written, and of it readable
	for pos < s.f.end {
		if s.f.lane == Background && !s.f.isWanted() {
			s.b.link.giveWay(ctx)
		}
		// What is left of a chunk stays in the file: only whole chunks count.
		n, err := s.body.Read(buf[:min(int64(len(buf)), s.f.end-pos)])
		if n > 0 {
			if pos == s.f.off {
				s.b.link.firstByte(time.Since(s.start))
			}
			if e := s.arrived(buf[:n], pos); e != nil {
				return e
			}
			pos += int64(n)
			kept = s.keep(kept, pos)
		}
		if err == io.EOF && pos < s.f.end {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}

// arrived writes bytes into the cache file and accounts for them.
func (s *stream) arrived(p []byte, pos int64) error {
	n := int64(len(p))
	back := int64(0)
	if s.f.lane == Background {
		back = n
		*s.unread -= n
		s.b.stats.backgroundBytes.Add(n)
	} else {
		s.b.stats.demandBytes.Add(n)
	}
	s.b.link.received(n, back)
	if _, err := s.b.file.WriteAt(p, pos); err != nil {
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return fmt.Errorf("%w: %w", errNoSpace, err)
		}
		return err
	}
	return nil
}

// keep makes the whole chunks of [kept, pos) readable and returns their end.
func (s *stream) keep(kept, pos int64) int64 {
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
		os.ErrNotExist, errors.ErrUnsupported, errdefs.ErrUnauthenticated, errdefs.ErrPermissionDenied,
		errNoSpace, context.Canceled, errClosed,
	} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}
