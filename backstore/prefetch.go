package backstore

import (
	"context"
	"sync"
)

// A Want is a range of a layer's blob to have on the node ahead of demand.
type Want struct {
	Layer    int
	Off, Len int64 // in blob space
}

// maxPiece bounds one background request, so that the head of a long range is
// not sent together with its end, demand is never far behind one, and a long
// link is filled by several.
const maxPiece = 1 << 20

// maxPieces bounds the background requests of one image in flight.
const maxPieces = 48

// PrefetchOptions are the settings of [Image.Prefetch]. A zero field means its
// default.
type PrefetchOptions struct {
	// Gap is how many bytes that are here already are fetched again where
	// that saves a request, 0 by default.
	Gap int64
}

// PrefetchResult tells what a prefetch has done.
type PrefetchResult struct {
	Requests int   // sent
	Bytes    int64 // asked for
	Here     int64 // bytes of wants that were here or under way already
	Failed   int   // requests that failed; their bytes are left to demand
}

// A Plan says what to fetch ahead of demand. Its methods are called
// concurrently, with locks held: they neither block nor call back.
type Plan interface {
	// Next returns what is to be fetched next, and false when that was all. It
	// is called when the link has room for it, with what is known of the link
	// by then.
	Next(Estimate) (Want, bool)
	// Around returns what a demand miss of w, of which nothing is on the node
	// or under way, is to fetch: w, or more where the plan has it.
	Around(w Want, e Estimate) Want
}

// Prefetch brings a list of wants onto the node, as [Stack.Prefetch] does.
func (im *Image) Prefetch(ctx context.Context, wants []Want, o *PrefetchOptions) (PrefetchResult, error) {
	return im.Blobs().Prefetch(ctx, &list{wants: wants}, o)
}

// Prefetch brings what the plan says onto the node, in its order, behind demand
// and within the bounds of the links, and returns when all is there, has failed,
// or ctx ends. It never fails a read: what it could not bring is fetched on
// demand. The error is the first failure.
func (s Stack) Prefetch(ctx context.Context, plan Plan, o *PrefetchOptions) (PrefetchResult, error) {
	var opts PrefetchOptions
	if o != nil {
		opts = *o
	}
	s.setPlan(plan)
	defer s.setPlan(nil)
	p := prefetcher{blobs: s, o: opts, places: make(chan struct{}, maxPieces)}
	for {
		w, ok := plan.Next(s.estimate())
		if !ok {
			break
		}
		err := s.check(w)
		if err == nil {
			err = p.want(ctx, w)
		}
		if err != nil {
			p.fail(err)
			break
		}
	}
	p.wg.Wait()
	return p.result, p.err
}

// list is the plan that fetches wants as they stand.
type list struct {
	mu    sync.Mutex // guards next
	next  int
	wants []Want
}

func (l *list) Next(Estimate) (Want, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next == len(l.wants) {
		return Want{}, false
	}
	l.next++
	return l.wants[l.next-1], true
}

func (l *list) Around(w Want, _ Estimate) Want {
	for _, q := range l.wants {
		if q.Layer == w.Layer && q.Off <= w.Off && w.Off < q.Off+q.Len {
			w.Len = max(w.Len, min(q.Off+q.Len, w.Off+maxPiece)-w.Off)
		}
	}
	return w
}

// prefetcher is one running Prefetch.
type prefetcher struct {
	blobs  Stack
	o      PrefetchOptions
	places chan struct{}
	wg     sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	result PrefetchResult
	err    error
}

func (p *prefetcher) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
}

// want starts the flights of one want, piece by piece.
func (p *prefetcher) want(ctx context.Context, w Want) error {
	b := p.blobs[w.Layer]
	if b == nil {
		return nil // a local file
	}
	for off, end := w.Off, w.Off+w.Len; off < end; {
		s, ok := b.missing(off, end, p.o.Gap)
		if !ok {
			p.count(0, 0, end-off)
			return nil
		}
		p.count(0, 0, max(0, s.off-off))
		select {
		case p.places <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		f, err := b.startBackground(ctx, s)
		if f == nil {
			<-p.places
			if err != nil {
				return err
			}
			continue // demand was faster: look again
		}
		p.count(1, f.end-f.off, 0)
		p.follow(ctx, f)
		off = f.end
	}
	return nil
}

// follow waits for a flight beside the others.
func (p *prefetcher) follow(ctx context.Context, f *flight) {
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		err := f.settled(ctx)
		<-p.places
		if err != nil {
			p.fail(err)
			p.mu.Lock()
			p.result.Failed++
			p.mu.Unlock()
		}
	}()
}

func (p *prefetcher) count(requests int, bytes, here int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.result.Requests += requests
	p.result.Bytes += bytes
	p.result.Here += here
}

// settled waits for the end of a flight.
func (f *flight) settled(ctx context.Context) error {
	for {
		f.mu.Lock()
		done, err, ch := f.done, f.err, f.progress
		f.mu.Unlock()
		if done {
			return err
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// missing finds the first piece of [off, end), in bytes, that is neither here
// nor under way, joined over gaps of up to gap bytes.
func (b *Blob) missing(off, end, gap int64) (span, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	from, to := b.chunksOf(off, end-off)
	to = min(to, b.chunks)
	b.learn(from, to)
	first := b.nextMissing(from, to)
	if first >= to {
		return span{}, false
	}
	limit := min(to, first+maxPiece/b.chunk)
	if to-limit < maxPiece/2/b.chunk {
		limit = to // rather than a short piece
	}
	stop := b.nextHeld(first, limit)
	for stop < limit {
		again := b.nextMissing(stop, limit)
		if again >= limit || (again-stop)*b.chunk > gap {
			break
		}
		stop = b.nextHeld(again, limit)
	}
	return span{first * b.chunk, min(stop*b.chunk, b.size)}, true
}

// nextMissing returns the first chunk of [from, to) that is neither here nor
// under way, or to. b.mu is held.
func (b *Blob) nextMissing(from, to int64) int64 {
	for from < to {
		from = b.present.next(from, to, false)
		if from >= to {
			return to
		}
		f := b.flightAt(from * b.chunk)
		if f == nil {
			return from
		}
		from = (f.end + b.chunk - 1) / b.chunk
	}
	return to
}

// nextHeld returns the first chunk of [from, to) that is here or under way, or
// to. b.mu is held.
func (b *Blob) nextHeld(from, to int64) int64 {
	to = b.present.next(from, to, true)
	for _, f := range b.flights {
		if c := f.off / b.chunk; c >= from && c < to {
			to = c
		}
	}
	return to
}

// startBackground waits for admission and starts a flight for what of s is
// still missing then; nil without an error if nothing is.
func (b *Blob) startBackground(ctx context.Context, s span) (*flight, error) {
	n := s.end - s.off
	if err := b.link.admit(ctx, n); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		b.link.received(0, n)
		return nil, errClosed
	}
	from, _ := b.chunksOf(s.off, 1)
	if b.present.has(from) || b.flightAt(s.off) != nil {
		b.link.received(0, n)
		return nil, nil
	}
	end := s.end
	for _, f := range b.flights {
		if s.off < f.off {
			end = min(end, f.off)
		}
	}
	b.link.received(0, s.end-end)
	f := newFlight(b, s.off, end, Background)
	b.start(f)
	return f, nil
}

// ensureExact brings [off, off+n) onto the node without fetching more.
func (b *Blob) ensureExact(off, n int64, p patience) (Origin, error) {
	b.mu.Lock()
	if !b.closed {
		from, to := b.chunksOf(off, n)
		to = min(to, b.chunks)
		if first := b.nextMissing(from, to); first < to {
			f := newFlight(b, first*b.chunk, min(b.nextHeld(first, to)*b.chunk, b.size), Demand)
			f.claim()
			defer f.disclaim()
			b.start(f)
		}
	}
	b.mu.Unlock()
	return b.ensure(off, n, p)
}
