package backstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// A Want is a range of a layer's blob to have on the node ahead of demand.
type Want struct {
	Layer    int
	Off, Len int64 // in blob space
}

// maxPiece bounds one background request, so that the head of a long range is
// not sent together with its end, demand is never far behind one, and a long
// link is filled by several. On links that bring more in a round trip it is that,
// up to longPiece.
const (
	maxPiece  = 1 << 20
	longPiece = 4 << 20
)

// maxPieces is the default of PrefetchOptions.Limits.Requests.
const maxPieces = 48

// failuresInARow is how many requests fail one after the other before a
// prefetch stops.
const failuresInARow = 5

// spareDisk is how much of the disk a prefetch leaves free, in bytes, so that
// what readers fetch can be kept.
const spareDisk = 64 << 20

// ErrStopped is a prefetch that has stopped by itself, since it does no good.
// What it says beside that is for people.
var ErrStopped = errors.New("stopped")

// PrefetchOptions are the settings of [Image.Prefetch]. A zero field means its
// default.
type PrefetchOptions struct {
	// Gap is how many bytes that are here already are fetched again where
	// that saves a request, 0 by default.
	Gap int64
	// Limits are those of this prefetch. They hold beside
	// [CacheOptions].Background, which all share.
	Limits Limits
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
// or ctx ends; what is under way then and nobody waits for is cancelled. It
// never fails a read: what it could not bring is fetched on demand. The error is
// the first failure, or wraps [ErrStopped] where several in a row have failed,
// the cache cannot be written, or what is wanted does not fit into it.
//
// Prefetches that run at the same time take turns, by bytes; those whose readers
// wait get more of them.
func (s Stack) Prefetch(ctx context.Context, plan Plan, o *PrefetchOptions) (PrefetchResult, error) {
	defer s.Watch(plan)()
	return s.prefetch(ctx, plan, o, false)
}

// prefetch is Prefetch of a plan that reads do not know of. With idle, all
// others go first.
func (s Stack) prefetch(ctx context.Context, plan Plan, o *PrefetchOptions, idle bool) (PrefetchResult, error) {
	var opts PrefetchOptions
	if o != nil {
		opts = *o
	}
	opts.Limits.Requests = cmp.Or(opts.Limits.Requests, maxPieces)
	p := prefetcher{blobs: s, gap: opts.Gap, plan: plan}
	p.share = &share{budget: newBudget(opts.Limits), blobs: s, idle: idle}
	ctx, p.stop = context.WithCancelCause(ctx)
	defer p.stop(nil)
	if err := p.run(ctx); err != nil {
		p.fail(err)
	}
	p.wg.Wait()
	if cause := context.Cause(ctx); errors.Is(cause, ErrStopped) {
		return p.result, cause
	}
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
	blobs Stack
	gap   int64
	plan  Plan
	share *share
	rest  Want                    // what was not asked for yet of the plan's last range
	stop  context.CancelCauseFunc // with ErrStopped where it is for a reason of its own
	wg    sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	result PrefetchResult
	err    error
	row    int // failures one after the other
}

func (p *prefetcher) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
}

// run starts the flights of the plan. What is next is asked of the plan when it
// can be sent.
func (p *prefetcher) run(ctx context.Context) error {
	l := p.blobs.link()
	if l == nil {
		return nil
	}
	room := p.blobs.room()
	for {
		if l.mayWait(p.share) { // not for the end of the plan
			if b, _, err := p.next(l); b == nil {
				return err
			}
		}
		g, err := l.admit(ctx, p.share, l.piece())
		if err != nil {
			return err
		}
		b, s, err := p.next(l)
		if b == nil {
			g.release((*grant).cancel)
			return err
		}
		if b.link != l { // stand in line there
			g.release((*grant).cancel)
			l = b.link
			continue
		}
		if room -= s.end - s.off; room < 0 {
			g.release((*grant).cancel)
			return fmt.Errorf("%w: what is wanted does not fit into the cache or onto its disk", ErrStopped)
		}
		f, err := b.startBackground(s, g)
		if err != nil {
			return err
		}
		if f != nil { // else demand was faster: look again
			p.started(f)
			p.follow(ctx, b, f)
		}
	}
}

// next finds what is to be fetched next; no blob if that was all.
func (p *prefetcher) next(l *link) (*Blob, span, error) {
	for {
		if p.rest.Len <= 0 {
			w, ok := p.plan.Next(l.estimate())
			if !ok {
				return nil, span{}, nil
			}
			if err := p.blobs.check(w); err != nil {
				return nil, span{}, err
			}
			p.rest = w
		}
		b := p.blobs[p.rest.Layer]
		if b == nil { // a local file
			p.rest.Len = 0
			continue
		}
		s, ok := b.missing(p.rest.Off, p.rest.Off+p.rest.Len, p.gap, b.link.piece())
		if ok {
			p.pass(s.off)
			return b, s, nil
		}
		p.pass(p.rest.Off + p.rest.Len)
	}
}

// pass goes on to off, over what is here or under way.
func (p *prefetcher) pass(off int64) {
	n := max(0, off-p.rest.Off)
	p.rest.Off, p.rest.Len = p.rest.Off+n, p.rest.Len-n
	p.mu.Lock()
	defer p.mu.Unlock()
	p.result.Here += n
}

func (p *prefetcher) started(f *flight) {
	n := f.end - p.rest.Off
	p.rest.Off, p.rest.Len = f.end, p.rest.Len-n
	p.mu.Lock()
	defer p.mu.Unlock()
	p.result.Requests++
	p.result.Bytes += f.end - f.off
}

// follow waits for a flight beside the others.
func (p *prefetcher) follow(ctx context.Context, b *Blob, f *flight) {
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		err := f.settled(ctx)
		if ctx.Err() != nil {
			b.giveUp(f, p.share)
			return
		}
		p.ended(b, err)
	}()
}

// ended judges how a flight of b has ended.
func (p *prefetcher) ended(b *Blob, err error) {
	if errors.Is(err, errAbandoned) {
		return // demand fetches it
	}
	away := b.link.outage.lasting() != nil // from everybody: that is waited for
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		p.row = 0
		return
	}
	p.result.Failed++
	if p.err == nil {
		p.err = err
	}
	if !away {
		p.row++
	}
	switch {
	case errors.Is(err, errNotKept):
		p.stop(fmt.Errorf("%w: %w", ErrStopped, err))
	case p.row >= failuresInARow:
		p.stop(fmt.Errorf("%w: %d background requests failed one after the other, the last: %w", ErrStopped, p.row, err))
	}
}

// giveUp cancels a flight of which a prefetch that has ended was the reason,
// unless somebody else might be glad of it.
func (b *Blob) giveUp(f *flight, s *share) {
	b.mu.Lock()
	defer b.mu.Unlock()
	own := 1
	if s.idle { // which reads do not know of
		own = 0
	}
	if len(b.plans) <= own {
		b.abandon(f)
	}
}

// room is how many bytes may be fetched ahead until the cache is full, so that
// nothing that readers need has to go for them.
func (s Stack) room() int64 {
	for _, b := range s {
		if b != nil {
			return b.cache.room()
		}
	}
	return 0
}

// room is how many bytes of open blobs the cache can take: what is of others
// goes first where space is short.
func (c *Cache) room() int64 {
	n := c.o.MaxBytes
	for _, b := range c.openBlobs() {
		n -= b.Present()
	}
	var st unix.Statfs_t
	if unix.Statfs(c.dir, &st) == nil && st.Blocks > 0 {
		n = min(n, int64(st.Bavail)*st.Bsize-spareDisk)
	}
	return n
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
// nor under way, joined over gaps of up to gap bytes. It is about as long as
// piece at most.
func (b *Blob) missing(off, end, gap, piece int64) (span, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	from, to := b.chunksOf(off, end-off)
	to = min(to, b.chunks)
	b.learn(from, to)
	first := b.nextMissing(from, to)
	if first >= to {
		return span{}, false
	}
	limit := min(to, first+piece/b.chunk)
	if to-limit < piece/2/b.chunk {
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

// startBackground starts a flight with the permission g for what of s is still
// missing; nil without an error if nothing is.
func (b *Blob) startBackground(s span, g *grant) (*flight, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	from, _ := b.chunksOf(s.off, 1)
	if b.closed || b.present.has(from) || b.flightAt(s.off) != nil {
		g.release((*grant).cancel)
		if b.closed {
			return nil, errClosed
		}
		return nil, nil
	}
	end := s.end
	for _, f := range b.flights {
		if s.off < f.off {
			end = min(end, f.off)
		}
	}
	f := newFlight(b, s.off, end, Background)
	f.grant = g
	g.release(func(g *grant) { g.less(g.left - (end - s.off)) })
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
