package backstore

import (
	"context"
	"time"
)

// A share is one prefetch's part in the schedule. Those that wait for a link
// take turns, by bytes.
type share struct {
	budget
	blobs Stack
	idle  bool    // others go first
	next  float64 // turn of its next request
}

type admission struct {
	g  *grant
	ok chan struct{}
}

// A grant is the permission to have some background bytes on their way. It is
// given back bit by bit, as they come, and at last with end.
type grant struct {
	l    *link
	s    *share
	left int64 // bytes not received
	slot bool  // counted in link.under and node.all
	done bool
}

// admit waits until n background bytes may be asked for. A request larger than
// the window is admitted alone.
func (l *link) admit(ctx context.Context, s *share, n int64) (*grant, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a := &admission{g: &grant{l: l, s: s, left: n, slot: true}, ok: make(chan struct{})}
	l.node.mu.Lock()
	s.next = max(s.next, l.turn) // who comes late has saved nothing up
	l.queue = append(l.queue, a)
	l.node.advance()
	l.node.mu.Unlock()
	select {
	case <-a.ok:
		return a.g, nil
	case <-ctx.Done():
	}
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	for i, q := range l.queue {
		if q == a {
			l.queue = append(l.queue[:i], l.queue[i+1:]...)
			return nil, ctx.Err()
		}
	}
	a.g.cancel() // admitted at the same moment
	return nil, ctx.Err()
}

// mayWait reports whether s may have to wait for more than room on the link.
func (l *link) mayWait(s *share) bool {
	return s.limits.Rate > 0 || s.limits.PerMinute > 0 || l.sent.limit > 0 || l.node.all.limits.Rate > 0
}

// advance lets waiting background fetches in, one of each link in turn. n.mu is
// held.
func (n *node) advance() {
	now := time.Now()
	var wake time.Duration
	for again := true; again; {
		again, wake = false, 0
		for _, l := range n.links {
			ok, d := l.letIn(now)
			again = again || ok
			if d > 0 && (wake == 0 || d < wake) {
				wake = d
			}
		}
	}
	if n.wake != nil {
		n.wake.Stop()
		n.wake = nil
	}
	if wake > 0 {
		n.wake = time.AfterFunc(wake, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.advance()
		})
	}
}

// letIn lets one waiting fetch in: of those that their own budgets allow, the
// one whose turn it is. If none is and only time is missing, one is after d.
// node.mu is held.
func (l *link) letIn(now time.Time) (ok bool, d time.Duration) {
	if len(l.queue) == 0 || l.bgOut >= l.window() || l.under >= maxBackground {
		return false, 0
	}
	if ok, d := l.node.all.room(now); !ok {
		return false, d
	}
	if d := l.sent.wait(now, l.sent.limit/8); d > 0 { // the rest is for demand
		return false, d
	}
	best := -1
	for i, a := range l.queue {
		s := a.g.s
		if ok, after := s.room(now); !ok {
			if after > 0 && (d == 0 || after < d) {
				d = after
			}
			continue
		}
		if best < 0 || s.before(l.queue[best].g.s) {
			best = i
		}
	}
	if best < 0 {
		return false, d
	}
	a := l.queue[best]
	l.queue = append(l.queue[:best], l.queue[best+1:]...)
	a.g.take(now)
	close(a.ok)
	return true, 0
}

// before says whose turn it is.
func (s *share) before(t *share) bool {
	if s.idle != t.idle {
		return t.idle
	}
	return s.next < t.next
}

// weight is how many turns a share gets beside others: more where a container
// is waiting than where it has what it needs.
func (s *share) weight() float64 {
	if s.blobs.waited(time.Now().Add(-recently)) {
		return 4
	}
	return 1
}

// take puts the grant into the books. node.mu is held.
func (g *grant) take(now time.Time) {
	l := g.l
	l.bgOut += g.left
	l.under++
	l.sent.add(now)
	l.node.all.take(g.left, now)
	g.s.take(g.left, now)
	l.turn = max(l.turn, g.s.next)
	g.s.next += float64(g.left) / g.s.weight()
}

// less says that n bytes fewer were asked for. node.mu is held.
func (g *grant) less(n int64) {
	g.got(n)
	g.l.node.all.put(n)
	g.s.put(n)
	g.s.next -= float64(n) / g.s.weight()
}

// got notes that n bytes are no longer on their way. node.mu is held.
func (g *grant) got(n int64) {
	n = min(n, g.left) // what comes twice was asked for once
	g.left -= n
	g.l.bgOut -= n
	g.l.node.all.out -= n
	g.s.out -= n
}

// cancel is the end of a grant for which nothing was sent. node.mu is held.
func (g *grant) cancel() {
	g.less(g.left)
	g.l.sent.undo()
	g.s.sent.undo()
	g.close()
}

// park gives back what others could use meanwhile: the request does not get on.
// node.mu is held.
func (g *grant) park() {
	g.got(g.left)
	if g.slot {
		g.slot = false
		g.l.under--
		g.l.node.all.under--
	}
}

func (g *grant) close() {
	if g.done {
		return
	}
	g.done = true
	g.park()
	g.s.under--
	g.l.node.advance()
}

// release is one of the methods above, with node.mu, and for no grant at all.
func (g *grant) release(how func(*grant)) {
	if g == nil {
		return
	}
	g.l.node.mu.Lock()
	defer g.l.node.mu.Unlock()
	how(g)
	g.l.node.advance()
}
