package backstore

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	minRun = 64 << 10 // the least that a demand miss fetches
	maxRun = 1 << 20  // the most, before a stream is recognised
)

type span struct{ off, end int64 }

// flight is chunks [off, end) in bytes, end cut at the blob's size, on their
// way from the origin. It takes one request if all goes well, and goes on
// asking, for as long as a demand read waits for it, if not.
type flight struct {
	blob     digest.Digest
	link     *link
	off, end int64
	lane     Lane
	aside    []byte // where the bytes go instead of the cache, if not nil
	grant    *grant // of a background flight; nil where nobody counts

	ctx    context.Context // of its requests
	cancel context.CancelFunc
	hurry  chan struct{} // gets something when the flight is waited for

	mu       sync.Mutex // guards the fields below
	pos      int64      // readable up to here
	wanted   int        // demand reads that wait for it
	since    time.Time  // when the first of them began
	progress chan struct{}
	attempts int       // requests sent
	failures int       // failed ones since the last progress
	failing  time.Time // when the first of these was begun
	last     error     // of these
	err      error
	asking   bool // a request is under way
	held     bool // it is not, since others have failed
	weighs   bool // counted by link.demands
	done     bool
}

func newFlight(b *Blob, off, end int64, lane Lane) *flight {
	f := &flight{
		blob: b.digest, link: b.link, off: off, end: end, lane: lane, pos: off,
		hurry: make(chan struct{}, 1), progress: make(chan struct{}),
	}
	f.ctx, f.cancel = context.WithCancel(b.ctx)
	return f
}

// weigh tells the link whether somebody waits for its bytes. f.mu is held.
func (f *flight) weigh() {
	if w := f.asking && f.wanted > 0; w != f.weighs {
		f.weighs = w
		f.link.demands(f.lane, w)
	}
}

// asks says that a request is under way from now on, or is no more.
func (f *flight) asks(yes bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asking = yes
	f.weigh()
}

// hold says that a failure keeps the flight from asking, until proceed.
func (f *flight) hold() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = true
}

// proceed fails where the flight was abandoned.
func (f *flight) proceed() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = false
	return f.ctx.Err()
}

// errAbandoned is a background flight that was ended for want of use.
var errAbandoned = fmt.Errorf("backstore: %w", context.Canceled)

// abandon ends a flight that nobody waits for, and reports whether it has. b.mu
// is held.
func (b *Blob) abandon(f *flight) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done || f.wanted > 0 {
		return false
	}
	b.flights = slices.DeleteFunc(b.flights, func(g *flight) bool { return g == f })
	f.cancel()
	return true
}

// overtake abandons a flight that brings the chunk at off later than a request
// of its own would: one that has failed and is tried again some time, or what is
// left of a reader's that he has lost interest in. b.mu is held.
func (b *Blob) overtake(f *flight, off int64) bool {
	f.mu.Lock()
	late := f.lane == Background && f.held
	if f.lane == Demand && f.wanted == 0 && f.pos > f.off {
		late = b.link.isFar(off - f.pos)
	}
	f.mu.Unlock()
	return late && b.abandon(f)
}

// signal wakes those who wait. f.mu is held.
func (f *flight) signal() {
	close(f.progress)
	f.progress = make(chan struct{})
}

func (f *flight) advance(pos int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pos = pos
	f.failures, f.failing, f.last = 0, time.Time{}, nil
	f.signal()
}

// failed notes the failure of an attempt begun at that time, and returns how
// many there have been in a row.
func (f *flight) failed(begun time.Time, err error) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failures++; f.failures == 1 {
		f.failing = begun
	}
	f.last = err
	f.signal()
	return f.failures
}

func (f *flight) finish(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done, f.err = true, err
	close(f.progress)
}

// claim says that a demand read is going to wait for the flight; wait or
// disclaim ends that.
func (f *flight) claim() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wanted++; f.wanted > 1 {
		return
	}
	f.since = time.Now()
	f.weigh()
	select {
	case f.hurry <- struct{}{}:
	default:
	}
}

func (f *flight) disclaim() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unwant()
}

// unwant is disclaim with f.mu held.
func (f *flight) unwant() {
	f.wanted--
	f.weigh()
}

// wait returns once the flight has passed need, has failed before it, patience
// has come to its end, which gaveUp says, or ctx has. The caller has claimed it.
func (f *flight) wait(ctx context.Context, need int64, p patience) (gaveUp bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.unwant()
	for f.pos < need && !f.done {
		left, bounded := p.left(f.failing)
		if bounded && left <= 0 {
			return true, f.error(f.last)
		}
		ch := f.progress
		f.mu.Unlock()
		err := await(ctx, ch, left, bounded)
		f.mu.Lock()
		if err != nil {
			return true, err
		}
	}
	if f.pos >= need {
		return false, nil
	}
	return false, f.err
}

// await waits for ch, for no longer than d if bounded.
func await(ctx context.Context, ch <-chan struct{}, d time.Duration, bounded bool) error {
	var end <-chan time.Time
	if bounded {
		t := time.NewTimer(d)
		defer t.Stop()
		end = t.C
	}
	select {
	case <-ch:
	case <-end:
	case <-ctx.Done():
		return errClosed
	}
	return nil
}

func (f *flight) isWanted() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wanted > 0
}

// waiting is a flight that a read has to wait for, up to an offset. It is
// claimed.
type waiting struct {
	f      *flight
	need   int64
	joined bool
}

func disclaim(ws []waiting) {
	for _, w := range ws {
		w.f.disclaim()
	}
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
	b.learn(from, to)
	for at := from; ; {
		at = b.present.next(at, to, false)
		if at >= to {
			return ws, nil
		}
		b.waited.Store(time.Now().UnixNano())
		pos := at * b.chunk
		f, joined := b.flightAt(pos), true
		if f != nil && b.overtake(f, pos) {
			f = nil
		}
		if f == nil {
			f, joined = b.startDemand(pos, min(to*b.chunk, b.size)), false
		} else {
			f.claim()
		}
		end := min(f.end, min(to*b.chunk, b.size))
		ws = append(ws, waiting{f, end, joined})
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
// that where a reader goes on forward, never over what is here or under way. It
// is claimed. b.mu is held.
func (b *Blob) startDemand(off, need int64) *flight {
	end := max(need, off+b.runs.next(off, need, b.link.runLength()))
	if to := b.plannedTo(off, need); to > 0 {
		end = max(need, to)
	} else {
		b.link.stray()
	}
	f := newFlight(b, off, b.clip(off, end), Demand)
	f.claim() // before it can fail
	b.start(f)
	return f
}

// plannedTo pulls forward what running replays want of the bytes from off on,
// of which a miss needs those up to need: it returns where that ends, 0 where
// nothing is planned. b.mu is held.
func (b *Blob) plannedTo(off, need int64) (end int64) {
	if len(b.plans) == 0 {
		return 0
	}
	e := b.link.estimate()
	for _, p := range b.plans {
		w := Want{Layer: p.layer, Off: off, Len: need - off}
		if around := p.plan.Around(w, e); around != w {
			end = max(end, min(around.Off+around.Len, off+maxPiece))
		}
	}
	return end
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
func (b *Blob) start(f *flight) {
	b.flights = append(b.flights, f)
	b.wg.Add(1)
	go b.fly(f)
}

// startAside starts a flight whose bytes go to p instead of the cache, and
// claims it.
func (b *Blob) startAside(p []byte, off int64) (*flight, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("read blob %s: %w", b.digest, errClosed)
	}
	f := newFlight(b, off, off+int64(len(p)), Demand)
	f.aside = p
	f.claim()
	b.asides = append(b.asides, f)
	b.wg.Add(1)
	go b.fly(f)
	return f, nil
}

// ensure brings [off, off+n) onto the node and says where it came from.
func (b *Blob) ensure(off, n int64, p patience) (Origin, error) {
	var buf [8]waiting
	ws, err := b.begin(buf[:0], off, n)
	if err != nil {
		disclaim(ws)
		return FromFetch, err
	}
	return b.finish(ws, off, n, p)
}

// finish waits for what begin has found. Where a prefetch fails that was
// joined, in whatever way, it is fetched again as the reader's own.
func (b *Blob) finish(ws []waiting, off, n int64, p patience) (Origin, error) {
	origin := FromFlight
	if len(ws) == 0 {
		origin = FromCache // another process was faster
	}
	for {
		var failed error
		final := false // the failure is the reader's
		for _, w := range ws {
			if !w.joined || w.f.lane == Demand {
				origin = FromFetch
			}
			gaveUp, err := w.f.wait(b.ctx, w.need, p)
			if err == nil || final {
				continue
			}
			failed, final = err, !w.joined || gaveUp || w.f.lane == Demand && !retryable(err)
		}
		switch {
		case b.ctx.Err() != nil && (failed != nil || !b.has(off, n)):
			return origin, fmt.Errorf("read blob %s: %w", b.digest, errClosed)
		case failed == nil && b.has(off, n):
			return origin, nil
		case final:
			return origin, failed
		}
		var err error
		if ws, err = b.begin(ws[:0], off, n); err != nil {
			disclaim(ws)
			return origin, err
		}
	}
}

// fly runs one flight to its end.
func (b *Blob) fly(f *flight) {
	defer b.wg.Done()
	err := b.transfer(f)
	gone := f.ctx.Err() != nil && b.ctx.Err() == nil
	f.cancel()
	b.mu.Lock()
	isThis := func(g *flight) bool { return g == f }
	b.flights = slices.DeleteFunc(b.flights, isThis)
	b.asides = slices.DeleteFunc(b.asides, isThis)
	b.mu.Unlock()
	switch {
	case err != nil && gone:
		err = errAbandoned
	case err != nil:
		err = f.error(err)
	}
	f.finish(err)
	f.grant.release((*grant).close)
}

func (f *flight) error(cause error) error {
	return fmt.Errorf("fetch %d bytes at %d of blob %s: %w", f.end-f.off, f.off, f.blob, cause)
}
