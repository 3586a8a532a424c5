package main

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// envAway is how long the registry is away, as a duration.
const envAway = "REPRISE_AWAY"

// TestRegistryAway takes the registry away in the middle of a lazy start. The
// start goes on when it is back.
func TestRegistryAway(t *testing.T) {
	skipWithoutRunc(t)
	away, err := time.ParseDuration(os.Getenv(envAway))
	if err != nil {
		away = 3 * time.Second
	}
	b := newBench(t)
	small.make(t)
	spec, err := regtest.ParseLink("5ms,8mbit")
	require.NoError(t, err)
	link := regtest.NewLink(spec, small.registry)
	addr, stop := serveAt(t, "127.0.0.1:0", link)
	b.loop = append(b.loop, addr)

	cmd := exec.Command(b.executable(), "run", "--root", b.root, addr+smallName)
	cmd.Args[0], cmd.Env = "reprise", b.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Start())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
	})
	eventually(t, "the start is in full swing", func() bool { return link.Stats().BytesSent > 1_000_000 })
	stop()
	select {
	case err := <-done:
		t.Fatalf("the start ended while the registry was away: %v\n%s", err, errs.String())
	case <-time.After(away):
	}
	begin := time.Now()
	_, stop = serveAt(t, addr, link)
	defer stop()
	select {
	case err := <-done:
		require.NoError(t, err, errs.String())
	case <-time.After(patience):
		t.Fatalf("the start does not go on\n%s", errs.String())
	}
	t.Logf("away for %v; the start was through %v after the return\n%s", away, time.Since(begin).Round(time.Millisecond), errs.String())
	require.Contains(t, out.String(), "hello from the image")
	b.settled()
}

// serveAt serves a link at an address until stop is called, which drops all
// connections.
func serveAt(t *testing.T, addr string, link *regtest.Link) (at string, stop func()) {
	t.Helper()
	lis, err := net.Listen("tcp", addr)
	require.NoError(t, err)
	srv := &http.Server{Handler: link, ConnContext: link.ConnContext}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(lis)
	}()
	return lis.Addr().String(), func() {
		_ = srv.Close()
		<-done
	}
}
