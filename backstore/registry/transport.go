package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
)

const (
	// backgroundRcvBuf is the receive buffer of background connections in
	// bytes. It bounds what is under way to a reader that pauses, and so what
	// a demand read may have to wait for; but also what one stream carries in
	// a round trip: 17 MB/s at 30 ms, so that a few fill a gigabit.
	backgroundRcvBuf = 512 << 10

	idleTimeout = 90 * time.Second
	// idlePerHost is above the number of connections that one process keeps
	// busy at one registry, so that none is thrown away between two bursts.
	idlePerHost = 128

	headerTimeout    = 30 * time.Second
	handshakeTimeout = 10 * time.Second

	// pingAfter is how long nothing is heard of an HTTP/2 connection before it
	// is pinged, and pingTimeout how long an answer may take.
	pingAfter   = 5 * time.Second
	pingTimeout = 5 * time.Second
	// uploadHeaderTimeout is longer: registries check and move a blob before
	// they answer.
	uploadHeaderTimeout = 10 * time.Minute
)

// laneUpload stands beside backstore's lanes for requests that write.
const laneUpload backstore.Lane = 255

type laneKey struct{}

func withLane(ctx context.Context, l backstore.Lane) context.Context {
	return context.WithValue(ctx, laneKey{}, l)
}

// lanes sends each request over the transport of its lane. All three have the
// same TLS configuration.
type lanes struct {
	demand, background, upload *http.Transport
	ahead                      ahead
}

func (t *lanes) RoundTrip(req *http.Request) (*http.Response, error) {
	if who, ok := req.Context().Value(lanesKey{}).(**lanes); ok {
		*who = t
		return nil, errors.ErrUnsupported
	}
	l, _ := req.Context().Value(laneKey{}).(backstore.Lane)
	switch l {
	case backstore.Background:
		return t.background.RoundTrip(req)
	case laneUpload:
		return t.upload.RoundTrip(req)
	}
	return t.demand.RoundTrip(req)
}

func (t *lanes) CloseIdleConnections() {
	t.demand.CloseIdleConnections()
	t.background.CloseIdleConnections()
	t.upload.CloseIdleConnections()
	t.ahead.demand.close()
	t.ahead.background.close()
}

// newLanes makes the lanes out of a transport that has its dialer and its TLS
// configuration.
func newLanes(base *http.Transport) *lanes {
	base.DisableCompression = true // ranges are of the blob's own bytes
	base.MaxIdleConns = 0
	base.MaxIdleConnsPerHost = idlePerHost
	base.IdleConnTimeout = idleTimeout
	base.ResponseHeaderTimeout = headerTimeout
	base.ReadBufferSize = 64 << 10

	t := &lanes{demand: base.Clone(), background: base.Clone(), upload: base.Clone()}
	t.ahead.demand = newDialer(base.DialContext, nil)
	t.demand.DialContext = t.ahead.demand.DialContext
	t.demand.ForceAttemptHTTP2 = true
	// One connection carries all requests: without pings a dead one would hold
	// up new requests until TCP gives it up, a quarter of an hour later.
	t.demand.HTTP2 = &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout}

	only1 := new(http.Protocols)
	only1.SetHTTP1(true)
	t.background.Protocols = only1
	t.background.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	t.background.ReadBufferSize = 4 << 10
	t.ahead.background = newDialer(smallBuffers(base.DialContext), base.TLSClientConfig)
	t.background.DialContext = t.ahead.background.DialContext
	t.background.DialTLSContext = t.ahead.background.DialTLSContext

	t.upload.ResponseHeaderTimeout = uploadHeaderTimeout
	return t
}

// smallBuffers sets the receive buffer after dialing and not in Dialer.Control,
// which is out of reach where hosts.toml's dial_timeout has made the dialer.
// It is early enough: a receiver never offers more than its buffer holds, and
// the window that the handshake offers is smaller still.
func smallBuffers(dial func(context.Context, string, string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		if sc, ok := conn.(syscall.Conn); ok {
			if err := setRcvBuf(sc, backgroundRcvBuf); err != nil {
				conn.Close()
				return nil, fmt.Errorf("receive buffer: %w", err)
			}
		}
		return conn, nil
	}
}

func setRcvBuf(sc syscall.Conn, n int) error {
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) {
		// net.core.rmem_max, some 200 KiB, binds the unprivileged only.
		serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, n)
		if serr != nil {
			serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, n)
		}
	}); err != nil {
		return err
	}
	return serr
}

// installLanes is containerd's UpdateClient hook. It is called for the
// registry's client and again for every host that has certificates, a dial
// timeout or headers of its own.
func (c *Client) installLanes(client *http.Client) error {
	switch t := client.Transport.(type) {
	case *lanes:
		return nil // the registry's own, inherited
	case *http.Transport:
		l := newLanes(t)
		c.transports = append(c.transports, l)
		client.Transport = l
		return nil
	}
	return errors.New("registry: unknown transport")
}
