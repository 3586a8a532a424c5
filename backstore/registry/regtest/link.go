package regtest

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// sockBuf is the size of a connection's socket buffers on the link's side, in
// bytes. The kernel doubles it.
const sockBuf = 64 << 10

// A Link is a shaped and faulty network link in front of an http.Handler.
type Link struct {
	spec     LinkSpec
	upstream http.Handler
	down, up pacer
	log      log
	limit    bucket

	mu    sync.Mutex // guards what follows
	fault func(*http.Request) *Fault
	rng   *rand.Rand
}

// NewLink puts a link in front of upstream. Its random faults are the same in
// each run.
func NewLink(spec LinkSpec, upstream http.Handler) *Link {
	return &Link{
		spec:     spec,
		upstream: upstream,
		down:     pacer{rate: spec.Rate},
		up:       pacer{rate: spec.Rate},
		limit:    bucket{perMinute: spec.PerMinute},
		rng:      rand.New(rand.NewPCG(1, 2)),
	}
}

// Spec is what the link was made with.
func (l *Link) Spec() LinkSpec { return l.spec }

// SetFault has f choose a fault for every request from now on; nil from f, or
// for f, is none. It is called concurrently.
func (l *Link) SetFault(f func(*http.Request) *Fault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault = f
}

// conn is what a request knows of its connection.
type conn struct {
	net.Conn
	since time.Time // when it was accepted
	used  atomic.Bool
}

type connKey struct{}

// ConnContext is for http.Server's field of that name; Server sets it. Without
// it the link sees no connections: none costs a round trip, and buffers have
// the system's sizes.
func (l *Link) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sockBuf)
		tcp.SetReadBuffer(sockBuf)
	}
	l.log.accepted()
	return context.WithValue(ctx, connKey{}, &conn{Conn: c, since: time.Now()})
}

// arrival is when a request that is here now would have come over the link. The
// first of a connection cannot be sent before the handshake's answer is back, a
// round trip after the connection was asked for; one that was opened long enough
// ahead costs nothing more. A TLS handshake, which [Server] does not have, would
// cost another round trip.
func (c *conn) arrival(now time.Time, delay time.Duration) (at time.Time, fresh bool) {
	if c == nil || c.used.Swap(true) {
		return now, false
	}
	if open := c.since.Add(delay); open.After(now) {
		return open, true
	}
	return now, true
}

func (l *Link) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c, _ := r.Context().Value(connKey{}).(*conn)
	arrived, fresh := c.arrival(start, l.spec.Delay)
	e := l.log.begin(start, arrived, r, fresh)
	resp := &response{
		ResponseWriter: w,
		link:           l,
		conn:           c,
		entry:          e,
		fault:          l.choose(r),
		s:              &sender{p: &l.down, ctx: r.Context(), due: arrived.Add(l.spec.Delay)},
	}
	defer func() {
		l.log.end(e, resp.status, resp.sent)
	}()
	if resp.s.sleep() != nil {
		panic(http.ErrAbortHandler)
	}
	if wait := l.limit.take(time.Now()); wait > 0 {
		resp.refuse(wait)
		return
	}
	if resp.fault.answer(resp, r) {
		return
	}
	if r.Body != nil && r.Body != http.NoBody {
		r = r.WithContext(r.Context()) // a copy, to change
		r.Body = &pacedBody{
			ReadCloser: r.Body,
			s:          &sender{p: &l.up, ctx: r.Context(), due: resp.s.due},
			count:      func(n int) { l.log.received(n) },
		}
	}
	if resp.fault.IgnoreRange {
		r = r.Clone(r.Context())
		r.Header.Del("Range")
	}
	l.upstream.ServeHTTP(resp, r)
}

// choose is the fault for r: the hook's, else a random one for a GET.
func (l *Link) choose(r *http.Request) Fault {
	l.mu.Lock()
	hook := l.fault
	random := Fault{}
	if r.Method == http.MethodGet && l.spec.Stall+l.spec.Reset > 0 {
		if l.rng.Float64() < l.spec.Stall {
			random.Stall, random.StallHalf = StallTime, true
		}
		if l.rng.Float64() < l.spec.Reset {
			random.Reset, random.ResetHalf = true, true
		}
	}
	l.mu.Unlock()
	if hook != nil {
		if f := hook(r); f != nil {
			return *f
		}
	}
	return random
}

// A response is a handler's, sent over the link.
type response struct {
	http.ResponseWriter
	link   *Link
	conn   *conn
	entry  *entry
	fault  Fault
	s      *sender
	status int
	size   int64 // of the body, -1 unknown
	sent   int64 // of the body
}

// refuse is the answer above the limit of requests.
func (w *response) refuse(wait time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusTooManyRequests)
	fmt.Fprintf(w, `{"errors":[{"code":"TOOMANYREQUESTS","message":"more than %d requests a minute"}]}`, w.link.spec.PerMinute)
}

func (w *response) WriteHeader(status int) {
	if status/100 == 1 {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	if w.status != 0 {
		return
	}
	w.status = status
	w.size = -1
	if n, err := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64); err == nil {
		w.size = n
	}
	w.fault.head(w)
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	done := 0
	for done < len(p) {
		q := p[done:min(len(p), done+quantum)]
		q, err := w.fault.body(w, q)
		if err != nil {
			return done, err
		}
		if err := w.s.wait(len(q)); err != nil {
			return done, err
		}
		n, err := w.ResponseWriter.Write(q)
		done += n
		w.sent += int64(n)
		w.link.log.sent(n)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (w *response) Flush() {
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// bucket limits requests a minute: as many at once, refilled evenly.
type bucket struct {
	perMinute int

	mu     sync.Mutex // guards what follows
	tokens float64
	at     time.Time // when tokens was right; zero: full
}

// take returns 0, or how long until a request is welcome.
func (b *bucket) take(now time.Time) time.Duration {
	if b.perMinute == 0 {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	full := float64(b.perMinute)
	if b.at.IsZero() {
		b.tokens = full
	} else {
		b.tokens = min(full, b.tokens+now.Sub(b.at).Minutes()*full)
	}
	b.at = now
	if b.tokens >= 1 {
		b.tokens--
		return 0
	}
	return time.Duration((1 - b.tokens) / full * float64(time.Minute))
}
