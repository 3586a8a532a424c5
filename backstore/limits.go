package backstore

import "time"

// Limits bound what background fetches take: replay, completion. Demand never
// waits for them. A zero field means its default.
type Limits struct {
	// InFlight bounds the bytes asked for and not yet received. By default
	// they are as many as keep the link busy, 16 MiB a host at most.
	InFlight int64
	// Requests bounds those under way, and with them memory: each has a buffer
	// of 64 KiB. By default 48 for an image and 64 for a host.
	Requests int
	// Rate bounds the bytes a second, unbounded by default.
	Rate int64
	// PerMinute bounds the requests a minute, unbounded by default.
	PerMinute int
}

// budget is what of some Limits is in use. It is guarded by the mutex of its
// node.
type budget struct {
	limits Limits
	out    int64
	under  int // requests under way
	paid   time.Time
	sent   minute
}

func newBudget(l Limits) budget { return budget{limits: l, sent: minute{limit: l.PerMinute}} }

// room reports whether another request may be sent. If not, and only time is
// missing, it is allowed after d.
func (b *budget) room(now time.Time) (ok bool, d time.Duration) {
	l := &b.limits
	if l.InFlight > 0 && b.out >= l.InFlight || l.Requests > 0 && b.under >= l.Requests {
		return false, 0
	}
	d = b.sent.wait(now, 0)
	if l.Rate > 0 {
		d = max(d, b.paid.Sub(now))
	}
	return d <= 0, d
}

// take notes a request for n bytes, put that n bytes less are asked for.
func (b *budget) take(n int64, now time.Time) {
	b.out += n
	b.under++
	b.sent.add(now)
	if b.paid.Before(now) {
		b.paid = now
	}
	b.paid = b.paid.Add(b.wire(n))
}

func (b *budget) put(n int64) { b.paid = b.paid.Add(-b.wire(n)) }

func (b *budget) wire(n int64) time.Duration {
	if b.limits.Rate <= 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(b.limits.Rate) * float64(time.Second))
}

// minute remembers when the last requests were sent, as many as are allowed in
// a minute. The zero value allows all.
type minute struct {
	limit int
	at    []time.Time // a ring once there are so many
	next  int         // the oldest of them
}

// add notes a request.
func (m *minute) add(now time.Time) {
	switch {
	case m.limit <= 0:
	case len(m.at) < m.limit:
		m.at = append(m.at, now)
		m.next = 0
	default:
		m.at[m.next] = now
		m.next = (m.next + 1) % m.limit
	}
}

// undo takes the last request back.
func (m *minute) undo() {
	switch n := len(m.at); {
	case n == 0:
	case n < m.limit:
		m.at = m.at[:n-1]
	default:
		m.next = (m.next + n - 1) % n
		m.at[m.next] = time.Time{}
	}
}

// wait is how long until another request keeps the limit, and leaves spare ones
// beside it.
func (m *minute) wait(now time.Time, spare int) time.Duration {
	if m.limit <= 0 || len(m.at)+spare < m.limit {
		return 0
	}
	i := m.next + spare - (m.limit - len(m.at))
	return m.at[i%len(m.at)].Add(time.Minute).Sub(now)
}
