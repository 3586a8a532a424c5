package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
)

// A connection costs a round trip before it carries its first request, with TLS
// another one, and HTTP/1 needs one for each request that is under way. What is
// known to be needed soon is therefore opened while the first answer is waited
// for.

// aheadFor is how long a connection that was opened ahead waits to be used.
// Servers close one that says nothing after some 10 s.
const aheadFor = 5 * time.Second

// maxSecure bounds what is dialed ahead with TLS: a handshake costs the registry
// more than a connection, and one that speaks TLS is likely to send blobs from
// elsewhere.
const maxSecure = 8

// DialAhead opens connections to the registry of ref, as many as are missing to
// that number for reads of that lane, and returns at once. The demand lane of a
// registry that speaks TLS needs none: it has one connection, which the first
// request opens. Whatever goes wrong is left to the requests.
func (c *Client) DialAhead(ref string, lane backstore.Lane, n int) {
	r, err := ParseReference(ref)
	if err != nil {
		return
	}
	hosts, err := c.hostsFor(&request{ref: r, caps: docker.HostCapabilityPull})
	if err != nil {
		return
	}
	h := hosts[0]
	l, fallsBack := lanesOf(h.client.Transport)
	if l == nil || proxied(l, h) {
		return
	}
	secure := h.scheme == "https" && !fallsBack
	if secure {
		n = min(n, maxSecure)
	}
	switch {
	case lane == backstore.Background:
		l.ahead.background.fill(c, h.address(), secure, n)
	case !secure:
		l.ahead.demand.fill(c, h.address(), false, n)
	}
}

// address is what a transport dials for the host.
func (h *host) address() string {
	u := url.URL{Host: h.name}
	port := u.Port()
	if port == "" {
		if port = "80"; h.scheme == "https" {
			port = "443"
		}
	}
	return net.JoinHostPort(u.Hostname(), port)
}

func proxied(l *lanes, h *host) bool {
	if l.demand.Proxy == nil {
		return false
	}
	u, err := l.demand.Proxy(&http.Request{URL: &url.URL{Scheme: h.scheme, Host: h.name}})
	return u != nil || err != nil
}

// lanesOf finds the lanes of a host's transport, which containerd may have put
// behind its fallback from https to http.
func lanesOf(t http.RoundTripper) (l *lanes, fallsBack bool) {
	if l, ok := t.(*lanes); ok {
		return l, false
	}
	ctx := context.WithValue(context.Background(), lanesKey{}, &l)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://lanes/", nil)
	if err == nil {
		_, _ = t.RoundTrip(req) //nolint:bodyclose // there is none: lanes.RoundTrip only answers with itself
	}
	return l, true
}

// lanesKey asks lanes.RoundTrip who it is.
type lanesKey struct{}

// ahead are the dialers of lanes that are dialed ahead.
type ahead struct{ demand, background *dialer }

// A dialer dials for one transport, and ahead of it.
type dialer struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)
	tls  *tls.Config // for secure connections

	mu   sync.Mutex // guards what follows
	idle map[place][]*early
	open map[string]int // connections to an address, those not used yet included
}

// place is where a connection leads, and whether it is through with TLS.
type place struct {
	addr   string
	secure bool
}

// early is a connection that is being opened, or waits to be used.
type early struct {
	ready chan struct{} // closed: conn or err is there
	conn  net.Conn
	raw   net.Conn // below TLS
	err   error
	timer *time.Timer // closes it
}

func newDialer(dial func(context.Context, string, string) (net.Conn, error), cfg *tls.Config) *dialer {
	return &dialer{dial: dial, tls: cfg, idle: map[place][]*early{}, open: map[string]int{}}
}

// fill opens what is missing to n connections.
func (d *dialer) fill(c *Client, addr string, secure bool, n int) {
	at := place{addr, secure}
	d.mu.Lock()
	missing := n - d.open[addr]
	d.mu.Unlock()
	for range missing {
		e := &early{ready: make(chan struct{})}
		d.count(addr, 1) // until it is there, and counts itself
		if !c.start(func(closing context.Context) {
			d.openEarly(closing, at, e)
			d.count(addr, -1)
		}) {
			d.count(addr, -1)
			return
		}
		d.mu.Lock()
		d.idle[at] = append(d.idle[at], e)
		d.mu.Unlock()
	}
}

// openEarly dials for who comes first.
func (d *dialer) openEarly(ctx context.Context, at place, e *early) {
	defer close(e.ready)
	ctx, cancel := context.WithTimeout(ctx, aheadFor)
	defer cancel()
	e.raw, e.err = d.dialNow(ctx, "tcp", at.addr)
	if e.conn = e.raw; e.err == nil && at.secure {
		e.conn, e.err = d.handshake(ctx, e.raw, at.addr)
	}
	if e.err != nil {
		d.drop(at, e)
		return
	}
	e.timer = time.AfterFunc(aheadFor, func() {
		if d.drop(at, e) {
			_ = e.conn.Close()
		}
	})
}

// drop takes a connection out; false if it is out already.
func (d *dialer) drop(at place, e *early) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, q := range d.idle[at] {
		if q == e {
			d.idle[at] = append(d.idle[at][:i], d.idle[at][i+1:]...)
			return true
		}
	}
	return false
}

// take gives a connection that was opened ahead, or nil.
func (d *dialer) take(ctx context.Context, at place) net.Conn {
	for {
		d.mu.Lock()
		var e *early
		if q := d.idle[at]; len(q) > 0 {
			e, d.idle[at] = q[0], q[1:]
		}
		d.mu.Unlock()
		if e == nil {
			return nil
		}
		select {
		case <-e.ready:
		case <-ctx.Done():
			d.mu.Lock()
			d.idle[at] = append([]*early{e}, d.idle[at]...)
			d.mu.Unlock()
			return nil
		}
		switch {
		case e.err != nil:
		case !e.timer.Stop() || !alive(e.raw, at.secure):
			_ = e.conn.Close()
		default:
			return e.conn
		}
	}
}

func (e *early) discard() {
	<-e.ready
	if e.err == nil {
		e.timer.Stop()
		_ = e.conn.Close()
	}
}

// DialContext is for http.Transport.
func (d *dialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if conn := d.take(ctx, place{addr, false}); conn != nil {
		return conn, nil
	}
	return d.dialNow(ctx, network, addr)
}

// DialTLSContext is for http.Transport.
func (d *dialer) DialTLSContext(ctx context.Context, network, addr string) (net.Conn, error) {
	if conn := d.take(ctx, place{addr, true}); conn != nil {
		return conn, nil
	}
	raw, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return d.handshake(ctx, raw, addr)
}

// handshake makes a secure connection of raw, which it closes if it fails.
func (d *dialer) handshake(ctx context.Context, raw net.Conn, addr string) (net.Conn, error) {
	cfg := &tls.Config{}
	if d.tls != nil {
		cfg = d.tls.Clone()
	}
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(addr)
	}
	cfg.NextProtos = []string{"http/1.1"}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return conn, nil
}

// dialNow dials and counts.
func (d *dialer) dialNow(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	d.count(addr, 1)
	return &counted{Conn: conn, closed: sync.OnceFunc(func() { d.count(addr, -1) })}, nil
}

func (d *dialer) count(addr string, by int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open[addr] += by; d.open[addr] == 0 {
		delete(d.open, addr)
	}
}

// close closes what was not used.
func (d *dialer) close() {
	d.mu.Lock()
	var all []*early
	for _, q := range d.idle {
		all = append(all, q...)
	}
	clear(d.idle)
	d.mu.Unlock()
	for _, e := range all {
		e.discard()
	}
}

// counted is a connection that tells of its end.
type counted struct {
	net.Conn
	closed func()
}

func (c *counted) Close() error {
	c.closed()
	return c.Conn.Close()
}

// alive tells whether the other side has not closed a connection. It has no
// reason to say anything on one without TLS.
func alive(conn net.Conn, secure bool) bool {
	if c, ok := conn.(*counted); ok {
		conn = c.Conn
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	fine := false
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		fine = errors.Is(err, unix.EAGAIN) || err == nil && n > 0 && secure // session tickets
	})
	return err == nil && fine
}
