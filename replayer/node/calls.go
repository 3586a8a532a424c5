package node

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
)

// lastAnswers is how long answers may still take when the server has ended, or when
// the last gRPC call has.
const lastAnswers = time.Second

// errLeaving is the end of a call that takes too long when the server ends.
var errLeaving = errors.New("the daemon is being ended or replaced: try again")

// calls are the gRPC calls under way. Other requests may be cut off, as clients
// send them again; containerd does not, and a pull or a start would fail.
type calls struct {
	h    http.Handler
	time time.Duration // they may take when the server ends
	cut  context.Context
	end  context.CancelCauseFunc // of cut

	mu   sync.Mutex // guards what follows
	n    int
	idle *time.Timer // nil before the server ends; runs while there are none
}

func newCalls(h http.Handler, t time.Duration) *calls {
	c := &calls{h: h, time: t}
	c.cut, c.end = context.WithCancelCause(context.Background())
	return c
}

// ServeHTTP implements [http.Handler].
func (c *calls) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.count(1)
	defer c.count(-1)
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(c.cut, func() { cancel(context.Cause(c.cut)) })()
	c.h.ServeHTTP(w, r.WithContext(ctx))
}

func (c *calls) count(by int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += by
	switch {
	case c.idle == nil:
	case c.n == 0:
		c.idle.Reset(lastAnswers)
	default:
		c.idle.Stop()
	}
}

// leave bounds how long the server waits for what is under way: until there has
// been no call for a moment, and not for ever. A call that takes longer gets
// errLeaving. stop is called when the server waits no more.
func (c *calls) leave() (wait context.Context, stop func()) {
	wait, cancel := context.WithTimeout(context.Background(), c.time+lastAnswers)
	late := time.AfterFunc(c.time, func() { c.end(errLeaving) })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = time.AfterFunc(lastAnswers, cancel)
	if c.n > 0 {
		c.idle.Stop()
	}
	return wait, func() {
		late.Stop()
		cancel()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.idle.Stop()
	}
}
