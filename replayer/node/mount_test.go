package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// vectorImage is the reference's three-layer ext4 image, where it can be
// mounted.
func vectorImage(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs %s: %v", dev, err)
		}
		f.Close()
	}
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		require.NotEqual(t, "/", dir, "no go.mod above the working directory")
		dir = filepath.Dir(dir)
	}
	config := filepath.Join(dir, "../shared/vectors/ext4-64m/config.v1.json")
	if _, err := os.Stat(config); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("vectors: %v", err)
		}
		t.Skipf("vectors: %v", err)
	}
	return config
}

// A mount in this process, which therefore must not look into it. TestMain sees
// what it leaks.
func TestMount(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	dir := t.TempDir()
	s := NewServer(n, nil)
	for _, writable := range []bool{false, true} {
		r := &Request{ID: NewID(), Ref: config, Dir: dir, Writable: writable}
		st, err := s.Attach(t.Context(), r, nil)
		require.NoError(t, err)
		require.Equal(t, os.Getpid(), st.Pid)
		require.True(t, mountedAt(dir, st.Device))
		require.FileExists(t, statePath(n.Root(), r.ID))
		require.Contains(t, backingOf(st.Device), "reprise:")
		again, err := s.Attach(t.Context(), r, nil)
		require.NoError(t, err)
		require.Equal(t, st.Device, again.Device, "asking twice is asking once")
		require.Len(t, s.List(), 1)

		if writable { // as umount(8) does
			require.NoError(t, unix.Unmount(dir, 0))
			s.Idle(t.Context(), 0)
		} else {
			require.NoError(t, s.Release(t.Context(), r.ID, false))
		}
		require.NoError(t, s.Release(t.Context(), r.ID, false), "again")
		require.False(t, mounted(st.Device))
		requireNoState(t, n)
		_, err = s.Status(t.Context(), r.ID, false)
		require.ErrorIs(t, err, ErrNoDevice)
	}
	require.NoError(t, s.Close())
	_, err := s.Attach(t.Context(), &Request{ID: NewID(), Ref: config, Dir: dir}, nil)
	require.ErrorContains(t, err, "the server is ending")
}

func requireNoState(t *testing.T, n *Node) {
	t.Helper()
	left, err := os.ReadDir(devicesDir(n.Root()))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestMountErrors(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	dir := t.TempDir()
	s := NewServer(n, nil)
	defer func() { require.NoError(t, s.Close()) }()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	tests := map[string]struct {
		ctx  context.Context
		r    Request
		want error
	}{
		"ended":   {ended, Request{Ref: config, Dir: dir}, context.Canceled},
		"missing": {t.Context(), Request{Ref: "missing.json", Dir: dir}, os.ErrNotExist},
		"no dir":  {t.Context(), Request{Ref: config, Dir: dir + "/missing"}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.r.ID = NewID()
			_, err := s.Attach(tt.ctx, &tt.r, nil)
			require.Error(t, err)
			if tt.want != nil {
				require.ErrorIs(t, err, tt.want)
			}
			s.Idle(t.Context(), 0)
			require.False(t, isMountPoint(dir))
			requireNoState(t, n)
		})
	}
	_, err := s.Attach(t.Context(), &Request{ID: "../x", Ref: config}, nil)
	require.ErrorContains(t, err, "an ID is")
}

// A device whose client has gone, and does not come back, is taken away.
func TestLease(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	s := NewServer(n, &ServerOptions{LeaseGrace: time.Millisecond})
	defer func() { require.NoError(t, s.Close()) }()
	c := serveAt(t, s)
	r := &Request{ID: NewID(), Ref: config, Leased: true}
	st, err := c.Attach(t.Context(), r, nil)
	require.NoError(t, err)
	require.NotEmpty(t, st.Device)
	require.NoError(t, c.Lease(ended(t), r.ID))
	s.Idle(t.Context(), 0)
	require.ErrorIs(t, c.Lease(t.Context(), r.ID), ErrNoDevice)

	// One that is held stays, also beyond the end of others.
	s.o.LeaseGrace = time.Hour
	r.ID = NewID()
	_, err = c.Attach(t.Context(), r, nil)
	require.NoError(t, err)
	d, err := s.device(t.Context(), r.ID)
	require.NoError(t, err)
	held, letGo := context.WithCancel(t.Context())
	leased := make(chan error)
	go func() { leased <- c.Lease(held, r.ID) }()
	require.Eventually(t, func() bool { return d.leases() == 1 }, time.Minute, time.Millisecond)
	require.True(t, d.wanted())
	letGo()
	require.NoError(t, <-leased)
	require.Eventually(t, func() bool { return d.leases() == 0 }, time.Minute, time.Millisecond)
	require.False(t, d.wanted())
}

func ended(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// serveAt serves at a socket and makes a client of it.
func serveAt(t *testing.T, s *Server) *Client {
	dir := filepath.Join(t.TempDir(), strings.Repeat("a long name/", 20))
	require.NoError(t, os.MkdirAll(dir, 0o700))
	path := filepath.Join(dir, "sock")
	l, err := listen(path)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- s.Serve(ctx, l) }()
	c := NewClient(path)
	t.Cleanup(func() {
		require.NoError(t, c.Close())
		cancel()
		require.NoError(t, <-served)
	})
	return c
}

// What a server says comes through to its clients.
func TestClient(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	dir := t.TempDir()
	s := NewServer(n, &ServerOptions{Version: "1", LeaseGrace: time.Hour})
	defer func() { require.NoError(t, s.Close()) }()
	c := serveAt(t, s)
	ctx := t.Context()
	info, err := c.Server(ctx)
	require.NoError(t, err)
	require.Equal(t, os.Getpid(), info.Pid)
	require.Equal(t, "1", info.Version)
	require.True(t, info.SameMounts())
	_, err = c.Upgrade(ctx, UpgradeRequest{})
	require.ErrorContains(t, err, "nobody would start the daemon again")

	var said []string
	r := &Request{ID: NewID(), Ref: filepath.Base(config), Cwd: filepath.Dir(config), Trace: "missing", Dir: dir}
	st, err := c.Attach(ctx, r, func(line string) { said = append(said, line) })
	require.NoError(t, err)
	require.Equal(t, filepath.Base(config), st.Ref)
	st, err = c.Status(ctx, r.ID, true)
	require.NoError(t, err)
	require.Contains(t, st.Trace, "no such file")
	list, err := c.List(ctx)
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.NoError(t, c.Release(ctx, r.ID, false))

	r = &Request{ID: NewID(), Ref: config, Leased: true}
	_, err = c.Attach(ctx, r, nil)
	require.NoError(t, err)
	st, err = c.Quiesce(ctx, r.ID, 0)
	require.NoError(t, err)
	require.NotEmpty(t, st.Replay.Reason)
	require.NoError(t, c.Fail(ctx, r.ID))
	require.NoError(t, c.Release(ctx, r.ID, false))
	_, err = c.Quiesce(ctx, r.ID, 0)
	require.ErrorIs(t, err, ErrNoDevice)

	for _, bad := range []string{"missing.json", "oci:" + dir} {
		_, err = c.Attach(ctx, &Request{ID: NewID(), Ref: bad, Dir: dir}, nil)
		require.ErrorContains(t, err, "mount "+bad)
	}
	broken := NewBrokenServer(os.ErrPermission, nil)
	_, err = serveAt(t, broken).Attach(ctx, r, nil)
	require.ErrorContains(t, err, os.ErrPermission.Error())
	require.NoError(t, broken.Close())
}

// A server that is not there is asked again until it is.
func TestClientIsPatient(t *testing.T) {
	s := NewBrokenServer(os.ErrPermission, &ServerOptions{Version: "2"})
	path := filepath.Join(t.TempDir(), "sock")
	answers := make(chan *ServerInfo)
	c := NewClient(path)
	go func() {
		i, _ := c.Server(t.Context())
		answers <- i
	}()
	l, err := listen(path)
	require.NoError(t, err)
	first, err := l.Accept() // and is killed
	require.NoError(t, err)
	require.NoError(t, first.Close())
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- s.Serve(ctx, l) }()
	require.Equal(t, "2", (<-answers).Version)
	require.NoError(t, c.Close())
	cancel()
	require.NoError(t, <-served)

	ended := make(chan struct{})
	close(ended)
	c = NewKeptClient(path, ended, func() error { return os.ErrDeadlineExceeded })
	_, err = c.Server(t.Context())
	require.ErrorIs(t, err, ErrServerEnded)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, s.Close())
}
