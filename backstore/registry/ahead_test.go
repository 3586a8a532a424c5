package registry

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// read reads one range of the blob, on a lane.
func (f *fixture) read(t *testing.T, b *Blob, lane backstore.Lane) {
	t.Helper()
	rc, err := b.Fetch(t.Context(), 0, 10, lane)
	require.NoError(t, err)
	defer rc.Close()
	_, err = rc.Read(make([]byte, 10))
	require.NoError(t, err)
}

// waitConns waits until n connections have been opened over the link.
func (f *fixture) waitConns(t *testing.T, n int64) {
	t.Helper()
	require.Eventually(t, func() bool { return f.link.Stats().Conns >= n }, 10*time.Second, time.Millisecond)
	require.Equal(t, n, f.link.Stats().Conns)
}

func TestDialAhead(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	f.DialAhead(f.repo, backstore.Background, 3)
	f.waitConns(t, 3)
	f.DialAhead(f.repo, backstore.Background, 3)
	f.DialAhead(f.repo, backstore.Demand, 3) // has one, of the pushing
	f.waitConns(t, 5)
	for range 4 {
		f.read(t, b, backstore.Background)
	}
	f.read(t, b, backstore.Demand)
	f.waitConns(t, 5)
	require.EqualValues(t, 1, f.link.Stats().NewConns, "used one after the other")
	f.DialAhead(f.repo, backstore.Background, 4)
	f.waitConns(t, 6)
	for _, bad := range []string{"", "nowhere.invalid/a", "a b"} {
		f.DialAhead(bad, backstore.Background, 1)
	}
	require.NoError(t, f.Client.Close())
	f.DialAhead(f.repo, backstore.Background, 20)
	require.EqualValues(t, 6, f.link.Stats().Conns)
}

// A connection that was closed while it waited costs nothing but another one.
func TestDialAheadStale(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer lis.Close()
	d := newDialer(new(net.Dialer).DialContext, nil)
	c, _ := newClient(t, Options{})
	addr := lis.Addr().String()
	d.fill(c, addr, false, 2)
	for range 2 {
		conn, err := lis.Accept()
		require.NoError(t, err)
		require.NoError(t, conn.Close())
	}
	e := d.idle[place{addr, false}][1]
	<-e.ready
	require.Eventually(t, func() bool { return !alive(e.raw, false) }, 10*time.Second, time.Millisecond)
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	require.NoError(t, err)
	there, err := lis.Accept()
	require.NoError(t, err)
	require.Equal(t, 1, d.open[addr])
	require.True(t, alive(conn, false))
	require.NoError(t, conn.Close())
	_ = conn.Close() // is counted once
	require.NoError(t, there.Close())
	require.Empty(t, d.open)
	require.Empty(t, d.idle[place{addr, false}])

	// Nor does one that could not be opened, or whose user has gone.
	require.NoError(t, lis.Close())
	d.fill(c, addr, false, 1)
	_, err = d.DialContext(t.Context(), "tcp", addr)
	require.Error(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	at := place{addr, false}
	d.idle[at] = []*early{{ready: make(chan struct{}), err: err}}
	require.Nil(t, d.take(ctx, at))
	require.Len(t, d.idle[at], 1, "it is still good for somebody else")
}

// Of a registry with TLS, the handshake is done ahead too.
func TestDialAheadTLS(t *testing.T) {
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: t.TempDir()})
	require.NoError(t, err)
	var conns atomic.Int64
	s := httptest.NewUnstartedServer(g)
	s.Config.ConnState = func(c net.Conn, st http.ConnState) {
		if st == http.StateNew {
			conns.Add(1)
		}
	}
	s.StartTLS()
	defer s.Close()
	dir, addr := t.TempDir(), s.Listener.Addr().String()
	writeHosts(t, dir, addr, "server = \"https://"+addr+"\"\nskip_verify = true\n")
	c, _ := newClient(t, Options{HostsDir: dir})
	repo := addr + "/some/repo"
	content := make([]byte, 1000)
	d := descriptor("application/octet-stream", content)
	require.NoError(t, c.Push(t.Context(), repo, d, opener(content)))
	before := conns.Load()
	c.DialAhead(repo, backstore.Demand, 3) // has one
	c.DialAhead(repo, backstore.Background, 2)
	require.Eventually(t, func() bool { return conns.Load() == before+2 }, 10*time.Second, time.Millisecond)
	b, err := c.Blob(repo, d)
	require.NoError(t, err)
	for range 3 {
		rc, err := b.Fetch(t.Context(), 0, 10, backstore.Background)
		require.NoError(t, err)
		require.NoError(t, rc.Close())
	}
	require.LessOrEqual(t, conns.Load(), before+3)
}
