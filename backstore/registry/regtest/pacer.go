package regtest

import (
	"context"
	"io"
	"math/bits"
	"sync"
	"time"
)

const (
	quantum = 16 << 10 // bytes
	// slack is how long a handler and its client may take between two quanta
	// and still send as if they had taken no time.
	slack = 5 * time.Millisecond
	// maxCredit bounds how late a timer may be and be caught up with.
	maxCredit = time.Second
)

// A pacer is one direction of a link. It gives out the time on the wire, first
// come, first served.
type pacer struct {
	rate int64 // bits a second; 0 is no limit

	mu   sync.Mutex // guards free
	free time.Time  // when all that was asked for has been sent
}

// reserve puts n bytes that are ready at that time on the wire, and returns
// when the last of them has been sent.
func (p *pacer) reserve(ready time.Time, n int) time.Time {
	if p.rate == 0 {
		return ready
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	start := ready
	if p.free.After(start) {
		start = p.free
	}
	p.free = start.Add(wireTime(n, p.rate))
	return p.free
}

// wireTime is how long n bytes take at that many bits a second.
func wireTime(n int, rate int64) time.Duration {
	hi, lo := bits.Mul64(uint64(n)*8, uint64(time.Second))
	q, _ := bits.Div64(hi, lo, uint64(rate)) // no overflow: n is at most a quantum, rate at least 1
	return time.Duration(q)
}

// A sender is one body on a pacer. It is not safe for concurrent use.
type sender struct {
	p   *pacer
	ctx context.Context
	// due is when the quantum before has been sent, on the link's clock; at
	// first, when the body may start.
	due time.Time
	// credit is how late the last timer was, as far as that is not made up for
	// yet.
	credit time.Duration
}

// wait returns when n bytes, at most a quantum, have been sent.
func (s *sender) wait(n int) error {
	now := time.Now()
	lag := max(0, now.Sub(s.due))
	if allowed := max(slack, s.credit); lag > allowed {
		lag = allowed // the client or the handler kept it waiting
		s.due = now.Add(-lag)
	}
	s.credit = min(s.credit, lag)
	s.due = s.p.reserve(s.due, n)
	return s.sleep()
}

// sleep waits for due.
func (s *sender) sleep() error {
	if !s.due.After(time.Now()) {
		return s.ctx.Err()
	}
	err := sleepUntil(s.ctx, s.due)
	s.credit = min(maxCredit, time.Since(s.due))
	return err
}

func sleepUntil(ctx context.Context, t time.Time) error {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pacedBody is a request's body, read at the link's rate.
type pacedBody struct {
	io.ReadCloser
	s     *sender
	count func(n int)
}

func (b *pacedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), quantum)])
	if n > 0 {
		b.count(n)
		if werr := b.s.wait(n); werr != nil && err == nil {
			err = werr
		}
	}
	return n, err
}
