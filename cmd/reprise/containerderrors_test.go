package main

import (
	"encoding/base64"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// TestContainerdErrors: what is wrong is said by the command that was given, with
// the image and the cause. Ordinary images go on working.
func TestContainerdErrors(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.smallSite("0s,unlimited")
		lazy, ordinary := b.variant(s, 0)
		var password atomic.Value // that the registry wants; none if empty
		password.Store("")
		guarded := func(r *http.Request) *regtest.Fault {
			if _, p, _ := r.BasicAuth(); p != password.Load() {
				return &regtest.Fault{Status: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {`Basic realm="tests"`}}}
			}
			return nil
		}
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		pull := func(ref string, more ...string) []string {
			return append(append([]string{"pull", "--plain-http", "--address", c.socket}, more...), ref)
		}
		works := func() {
			t.Helper()
			b.ok(pull(ordinary)...)
			c.hello("works", ordinary)
			c.remove(ordinary)
		}

		// The pull.
		b.fails2(exitFailed, pull(lazy, "--snapshotter", "other"), "snapshotter other")
		b.fails2(exitFailed, pull(lazy+"-not-there"), "pull "+lazy+"-not-there", "not found")
		away := unreachable(t) + "/tests/small:obd"
		b.fails2(exitFailed, pull(away), "pull "+away, "connection refused")
		s.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Status: http.StatusForbidden} })
		b.fails2(exitFailed, pull(lazy), "pull "+lazy, "403")
		s.SetFault(nil)
		works()

		// The first container, when the credentials of the pull are not good any more.
		s.SetFault(guarded)
		password.Store("first")
		b.fails2(exitFailed, pull(lazy), "pull "+lazy, "authorization failed")
		b.credentials(s.addr, "first")
		b.ok(pull(lazy)...)
		password.Store("second")
		_, err := c.tryCreate(c.ctx(), "refused", lazy)
		require.ErrorContains(t, err, "401")
		require.ErrorContains(t, err, strings.TrimSuffix(lazy, ":obd"), "the image is named")
		b.credentials(s.addr, "second")
		c.hello("admitted", lazy)
		works()

		// The daemon is not there.
		c.remove(lazy)
		require.NoError(t, supervisor.Process.Signal(unix.SIGTERM))
		require.NoError(t, supervisor.Wait(), said())
		b.fails2(exitFailed, pull(lazy), "pull "+lazy, "prepare extraction snapshot", "connection")
		supervisor, said = b.daemon(true)
		c.pullAgain(pull(lazy))
		c.hello("back", lazy)
		works()
		c.remove(lazy)
		c.emptied()
		c.stop()
		b.end(supervisor, said)
	})
}

// credentials have all commands and the daemon give the password to a registry.
func (b *bench) credentials(addr, password string) {
	b.t.Helper()
	b.write("config.json", `{"auths":{"`+addr+`":{"auth":"`+base64.StdEncoding.EncodeToString([]byte("user:"+password))+`"}}}`)
}

// unreachable is an address that nobody listens at.
func unreachable(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}
