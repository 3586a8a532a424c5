package registry

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

const blobSize = 6 << 20

func TestFetchFaults(t *testing.T) {
	type F = regtest.Fault
	status := func(n int) *F { return &F{Status: n} }
	cut := func(n int64) *F { return &F{Cut: true, CutAt: n} }
	many := func(f *F) []*F { return []*F{f, f, f, f, f, f, f, f, f, f, f, f} }
	cases := []struct {
		name     string
		faults   []*F
		off      int64
		is       error  // nil: the right bytes
		says     string // in the error
		requests int64
	}{
		{name: "none", requests: 1},
		{name: "500 then ok", faults: []*F{status(500), status(503), status(502)}, requests: 4},
		{name: "500 for ever", faults: many(status(500)), is: errdefs.ErrUnavailable, says: "500", requests: 6},
		{name: "404", faults: many(status(404)), is: os.ErrNotExist, says: "some/repo@sha256:", requests: 1},
		{name: "403", faults: many(status(403)), is: errdefs.ErrPermissionDenied, says: "docker login", requests: 1},
		{name: "401 without challenge", faults: many(status(401)), is: errdefs.ErrUnauthenticated, says: "docker login", requests: 1},
		{name: "416", faults: many(status(416)), says: "416", is: errAny, requests: 1},
		{name: "no answer", faults: []*F{{Reset: true}, {Reset: true}}, requests: 3},
		{name: "never an answer", faults: many(&F{Reset: true}), is: errdefs.ErrUnavailable}, // net/http asks once more
		{name: "short bodies", faults: []*F{cut(1000), {Reset: true, ResetAt: 200_000}, cut(1)}, requests: 4},
		{name: "reset bodies", faults: []*F{{Reset: true, ResetHalf: true}, {Reset: true, ResetHalf: true}}, requests: 3},
		{name: "always short", faults: many(cut(1000)), is: io.ErrUnexpectedEOF, says: "body ended after", requests: 6},
		{name: "200 to a range", faults: []*F{{IgnoreRange: true}}, off: 1 << 20, requests: 1},
		{name: "200 to a range far in", faults: many(&F{IgnoreRange: true}), off: 5 << 20, is: ErrNoRanges, says: "whole blob", requests: 1},
		{name: "wrong range", faults: many(&F{Header: http.Header{"Content-Range": {"bytes 1-300000/6291456"}}}),
			off: 2, is: errAny, says: "content range", requests: 1},
		{name: "range of nonsense", faults: many(&F{Header: http.Header{"Content-Range": {"bytes */*"}}}),
			off: 2, is: errAny, says: "content range", requests: 1},
		{name: "other size", faults: many(&F{Header: http.Header{"Content-Range": {"bytes 2-300001/7"}}}),
			off: 2, is: errAny, says: "descriptor says", requests: 1},
		{name: "compressed transfer", faults: many(&F{Header: http.Header{"Content-Encoding": {"gzip"}}}),
			is: errAny, says: "content encoding", requests: 1},
		{name: "429 without a time", faults: []*F{status(429)}, requests: 2},
	}
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, blobSize)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			f.link.SetFault(script(c.faults...))
			f.link.Reset()
			b, err := f.Blob(f.repo, d)
			require.NoError(t, err)
			const n = 300_000
			got, err := fetch(t.Context(), b, c.off, n)
			if c.is == nil {
				require.NoError(t, err)
				require.Equal(t, content[c.off:c.off+n], got)
			} else {
				require.Error(t, err)
				if c.is != errAny {
					require.ErrorIs(t, err, c.is)
				}
				require.ErrorContains(t, err, c.says)
				require.ErrorContains(t, err, f.addr)
				var e *Error
				require.ErrorAs(t, err, &e)
			}
			if c.requests > 0 {
				require.Equal(t, c.requests, f.link.Stats().Requests)
			}
		})
	}
}

var errAny = io.ErrNoProgress

func TestFetchRefused(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := lis.Addr().String()
	require.NoError(t, lis.Close())
	c, k := newClient(t, Options{})
	_, err = c.Resolve(t.Context(), addr+"/a:b")
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "connection refused")
	require.Greater(t, k.slept, 1500*time.Millisecond/2)
}

func TestFetchArguments(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	for _, r := range [][2]int64{{-1, 5}, {0, 0}, {0, 1001}, {1000, 1}, {1 << 62, 1 << 62}, {5, -1}} {
		_, err := b.Fetch(t.Context(), r[0], r[1], backstore.Demand)
		require.Error(t, err, r)
	}
	require.Zero(t, f.link.Stats().Requests)
	_, err = f.Blob(f.repo, ocispec.Descriptor{Digest: "sha256:../..", Size: 1})
	require.Error(t, err)
}

func TestStreamGivesExactlyTheRange(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 100_000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	rc, err := b.Fetch(t.Context(), 10, 90_000, backstore.Background)
	require.NoError(t, err)
	p := make([]byte, 99_990)
	n, err := io.ReadFull(rc, p)
	require.Equal(t, 90_000, n)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Equal(t, content[10:90_010], p[:n])
	n, err = rc.Read(p)
	require.Zero(t, n)
	require.Equal(t, io.EOF, err)
	require.NoError(t, rc.Close())
	_, err = rc.Read(p)
	require.Error(t, err)
	require.NotEqual(t, io.EOF, err)
}

func TestConnectionsAreKept(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 100_000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	for i := range int64(20) {
		_, err := fetch(t.Context(), b, i*100, 5000)
		require.NoError(t, err)
	}
	require.Zero(t, f.link.Stats().NewConns, "the one that asked whether to push")
}

func TestFetchCancelled(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 100_000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)

	t.Run("while reading", func(t *testing.T) {
		f.link.SetFault(always(regtest.Fault{Stall: time.Minute, StallAt: 100}))
		ctx, cancel := context.WithCancel(t.Context())
		rc, err := b.Fetch(ctx, 0, 50_000, backstore.Demand)
		require.NoError(t, err)
		_, err = io.ReadFull(rc, make([]byte, 100))
		require.NoError(t, err)
		cancel()
		_, err = rc.Read(make([]byte, 10))
		require.ErrorIs(t, err, context.Canceled)
		require.NoError(t, rc.Close())
	})
	t.Run("before", func(t *testing.T) {
		f.link.SetFault(nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f.link.Reset()
		_, err := b.Fetch(ctx, 0, 50_000, backstore.Demand)
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, f.link.Stats().Requests)
	})
	t.Run("while asking", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		f.link.SetFault(func(*http.Request) *regtest.Fault { cancel(); return &regtest.Fault{Stall: time.Minute} })
		_, err := fetch(ctx, b, 0, 50_000)
		require.ErrorIs(t, err, context.Canceled)
	})
	t.Run("by Close", func(t *testing.T) {
		f.link.SetFault(always(regtest.Fault{Stall: time.Minute, StallAt: 100}))
		rc, err := b.Fetch(t.Context(), 0, 50_000, backstore.Demand)
		require.NoError(t, err)
		_, err = io.ReadFull(rc, make([]byte, 100))
		require.NoError(t, err)
		require.NoError(t, f.Close())
		_, err = rc.Read(make([]byte, 10))
		require.ErrorIs(t, err, os.ErrClosed)
		_, err = b.Fetch(t.Context(), 0, 50_000, backstore.Demand)
		require.ErrorIs(t, err, os.ErrClosed)
	})
}

func TestStalledBodyIsAskedForAgain(t *testing.T) {
	f := newFixture(t, Options{StallTimeout: 20 * time.Millisecond, Attempts: 100}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 300_000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	f.link.SetFault(script(&regtest.Fault{Stall: time.Minute, StallHalf: true}, &regtest.Fault{Stall: time.Minute, StallAt: 0}))
	got, err := fetch(t.Context(), b, 5, 200_000)
	require.NoError(t, err)
	require.Equal(t, content[5:200_005], got)
	s := f.link.Stats()
	require.GreaterOrEqual(t, s.Requests, int64(3))
	require.NotEqual(t, s.Log[0].Range, s.Log[1].Range, "only the rest")

	f.link.SetFault(script(&regtest.Fault{Stall: time.Minute, StallAt: 0, IgnoreRange: true}))
	got, err = fetch(t.Context(), b, 5, 200_000)
	require.NoError(t, err, "a stall while skipping")
	require.Equal(t, content[5:200_005], got)
}

func TestOpenVerifies(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 300_000)
	read := func() ([]byte, error) {
		rc, err := f.Open(t.Context(), f.repo, d)
		require.NoError(t, err)
		defer rc.Close()
		return io.ReadAll(rc)
	}
	f.link.SetFault(script(&regtest.Fault{Cut: true, CutAt: 100_000}))
	got, err := read()
	require.NoError(t, err)
	require.Equal(t, content, got)
	f.link.SetFault(script(&regtest.Fault{Corrupt: true}))
	_, err = read()
	require.ErrorContains(t, err, "another digest")

	empty, _ := f.push(t, 2, 0)
	rc, err := f.Open(t.Context(), f.repo, empty)
	require.NoError(t, err)
	got, err = io.ReadAll(rc)
	require.NoError(t, err)
	require.Empty(t, got)
}

// A background reader that pauses, once it is at full speed, stops the sender.
func TestBackgroundHoldsLittle(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 32<<20)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	rc, err := b.Fetch(t.Context(), 0, d.Size, backstore.Background)
	require.NoError(t, err)
	const read = 8 << 20
	_, err = io.CopyN(io.Discard, rc, read)
	require.NoError(t, err)
	last, same := int64(-1), 0
	for same < 20 { // until nothing more is sent
		time.Sleep(time.Millisecond)
		if sent := f.link.Stats().BytesSent; sent == last {
			same++
		} else {
			last, same = sent, 0
		}
	}
	t.Logf("%d KiB under way to a paused reader", (last-read)>>10)
	require.Less(t, last-read, int64(1<<20))
	require.NoError(t, rc.Close())
}

func TestLanesOverTLS(t *testing.T) {
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: t.TempDir()})
	require.NoError(t, err)
	var mu sync.Mutex
	protos := map[string]bool{}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			mu.Lock()
			protos[r.Proto] = true
			mu.Unlock()
		}
		g.ServeHTTP(w, r)
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	c, _ := newClient(t, Options{Insecure: true})
	f := &fixture{Client: c, link: regtest.NewLink(regtest.LinkSpec{}, g), repo: s.Listener.Addr().String() + "/a"}
	d, content := f.push(t, 1, 100_000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	got, err := fetch(t.Context(), b, 1, 50_000)
	require.NoError(t, err)
	require.Equal(t, content[1:50_001], got)
	require.Equal(t, map[string]bool{"HTTP/2.0": true}, protos)
	clear(protos)
	rc, err := b.Fetch(t.Context(), 1, 50_000, backstore.Background)
	require.NoError(t, err)
	got, err = io.ReadAll(rc)
	require.NoError(t, err)
	require.Equal(t, content[1:50_001], got)
	require.Equal(t, map[string]bool{"HTTP/1.1": true}, protos)
	require.NoError(t, c.Close())
}

func TestCertificateIsChecked(t *testing.T) {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	dir := t.TempDir()
	addr := s.Listener.Addr().String()
	writeHosts(t, dir, addr, "server = \"https://"+addr+"\"\n")
	c, k := newClient(t, Options{HostsDir: dir})
	_, err := c.Resolve(t.Context(), addr+"/a:b")
	require.ErrorContains(t, err, "certs.d")
	require.Zero(t, k.slept, "no retry")
}

func TestRedirectToBlobStore(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 100_000)
	var stored, denied atomic.Int64
	var deny atomic.Bool
	store := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || r.Header.Get("X-From-Hosts") != "" {
			t.Error("credentials at the blob store")
		}
		if deny.Load() && r.URL.Query().Get("sig") == "1" {
			denied.Add(1)
			w.WriteHeader(403)
			return
		}
		stored.Add(1)
		r.URL.Path = "/v2/some/repo/blobs/" + d.Digest.String()
		f.link.ServeHTTP(w, r)
	}))
	var sig, asked atomic.Int64
	front := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if u, p, _ := r.BasicAuth(); u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return
		}
		if r.Header.Get("X-From-Hosts") != "yes" {
			t.Error("no header from hosts.toml")
		}
		n := "1"
		if sig.Add(1) > 1 {
			n = "2"
		}
		w.Header().Set("Location", store.URL()+"/blob?sig="+n)
		w.WriteHeader(307)
	}))
	dir := t.TempDir()
	writeHosts(t, dir, front.Addr, "server = \""+front.URL()+"\"\n[header]\nX-From-Hosts = \"yes\"\n")
	c, k := newClient(t, Options{HostsDir: dir, DockerConfigDir: writeDockerConfig(t, front.Addr, "me", "secret")})
	b, err := c.Blob(front.Addr+"/some/repo", d)
	require.NoError(t, err)
	get := func(off int64) {
		t.Helper()
		got, err := fetch(t.Context(), b, off, 1000)
		require.NoError(t, err)
		require.Equal(t, content[off:off+1000], got)
	}
	get(0)
	require.EqualValues(t, 2, asked.Load(), "the challenge and the redirect")
	get(5000)
	get(6000)
	require.EqualValues(t, 2, asked.Load(), "straight to the store")
	require.EqualValues(t, 3, stored.Load())
	deny.Store(true)
	get(7000)
	get(8000)
	require.EqualValues(t, 3, asked.Load(), "a new address after the old one was refused")
	require.EqualValues(t, 1, denied.Load())
	require.EqualValues(t, 5, stored.Load())
	require.NoError(t, k.sleep(t.Context(), redirectAge))
	get(9000)
	require.EqualValues(t, 4, asked.Load(), "a new address after a while")
	require.Zero(t, k.slept-redirectAge, "no back-off")
}

func TestRedirectLoop(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
	}))
	c, _ := newClient(t, Options{})
	_, err := c.Resolve(t.Context(), s.Addr+"/a:b")
	require.ErrorContains(t, err, "redirects")
}

func TestRetryAfterHoldsTheHost(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	b, err := f.Blob(f.repo, d)
	require.NoError(t, err)
	busy := func(after string) *regtest.Fault {
		return &regtest.Fault{Status: 429, Header: http.Header{"Retry-After": {after}}, Body: `{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}`}
	}
	before := f.clock.slept
	f.link.SetFault(script(busy("7")))
	_, err = fetch(t.Context(), b, 0, 10)
	require.NoError(t, err)
	require.GreaterOrEqual(t, f.clock.slept-before, 7*time.Second)
	require.Less(t, f.clock.slept-before, 8*time.Second)

	// Everybody waits, not only who was told.
	f.gates.shut(f.addr, f.clock.now().Add(9*time.Second))
	before = f.clock.slept
	_, err = f.Exists(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.Equal(t, 9*time.Second, f.clock.slept-before)

	// Longer than we wait.
	f.link.SetFault(script(busy("3600")))
	before = f.clock.slept
	f.link.Reset()
	_, err = fetch(t.Context(), b, 0, 10)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "asks to wait")
	_, err = fetch(t.Context(), b, 0, 10)
	require.ErrorContains(t, err, "asks to wait")
	require.EqualValues(t, 1, f.link.Stats().Requests)
	require.Less(t, f.clock.slept-before, 10*time.Second)
}

func TestMirrors(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 100_000)
	var asked atomic.Int64
	var answer atomic.Pointer[http.HandlerFunc]
	mirror := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Query().Get("ns") != f.addr {
			t.Errorf("ns=%q", r.URL.Query().Get("ns"))
		}
		(*answer.Load())(w, r)
	}))
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, dead.Close())

	dir := t.TempDir()
	hosts := func(first string) {
		writeHosts(t, dir, f.addr, "server = \"http://"+f.addr+"\"\n[host.\""+first+"\"]\ncapabilities = [\"pull\"]\n")
	}
	read := func(t *testing.T, c *Client) {
		t.Helper()
		b, err := c.Blob(f.repo, d)
		require.NoError(t, err)
		got, err := fetch(t.Context(), b, 10, 50_000)
		require.NoError(t, err)
		require.Equal(t, content[10:50_010], got)
	}
	status := func(n int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(n) }
	}
	through := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g := f.link // count at the mirror only
		g.ServeHTTP(w, r)
		g.Reset()
	})
	hosts(mirror.URL())
	t.Run("mirror has it", func(t *testing.T) {
		c, _ := newClient(t, Options{HostsDir: dir})
		answer.Store(&through)
		asked.Store(0)
		read(t, c)
		require.EqualValues(t, 1, asked.Load())
		require.NoError(t, c.Push(t.Context(), f.repo, d, opener(content)), "never to a mirror")
		require.EqualValues(t, 1, asked.Load())
	})
	for _, n := range []int{404, 401, 403, 429, 500} {
		c, k := newClient(t, Options{HostsDir: dir})
		h := status(n)
		answer.Store(&h)
		f.link.Reset()
		read(t, c)
		require.EqualValues(t, 1, f.link.Stats().Requests, n)
		require.Zero(t, k.slept, n)
	}
	t.Run("mirror is out of reach", func(t *testing.T) {
		hosts("http://" + dead.Addr().String())
		c, k := newClient(t, Options{HostsDir: dir})
		f.link.Reset()
		read(t, c)
		read(t, c)
		require.Zero(t, k.slept)
		hs, err := c.hostsFor(newRequest(must(ParseReference(f.repo)), "GET", "blobs", "x"))
		require.NoError(t, err)
		require.Equal(t, f.addr, hs[0].name, "the one that answers first")
		require.NoError(t, k.sleep(t.Context(), penalty+1))
		hs, err = c.hostsFor(newRequest(must(ParseReference(f.repo)), "GET", "blobs", "x"))
		require.NoError(t, err)
		require.Equal(t, dead.Addr().String(), hs[0].name)
	})
	t.Run("nobody has it", func(t *testing.T) {
		hosts(mirror.URL())
		c, _ := newClient(t, Options{HostsDir: dir})
		h := status(500)
		answer.Store(&h)
		_, err := c.Get(t.Context(), f.repo, descriptor("x", []byte("nowhere")))
		require.ErrorIs(t, err, os.ErrNotExist, "the registry's word is final")
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestVia(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 1000)
	front := &tokenAuth{inner: f.link, user: "me", password: "secret"}
	s := serve(t, front)
	front.realm = s.URL() + "/token"
	c, _ := newClient(t, Options{
		Via:             map[string]string{"registry.example": s.URL()},
		DockerConfigDir: writeDockerConfig(t, "registry.example", "me", "secret"),
	})
	b, err := c.Blob("registry.example/some/repo", d)
	require.NoError(t, err)
	require.Equal(t, "registry.example", b.Host())
	got, err := fetch(t.Context(), b, 0, 1000)
	require.NoError(t, err)
	require.Equal(t, content, got)
	_, err = New(&Options{Via: map[string]string{"a": "b"}})
	require.Error(t, err)
}

func TestStalledManifestIsAskedForAgain(t *testing.T) {
	f := newFixture(t, Options{StallTimeout: 20 * time.Millisecond, Attempts: 100}, regtest.RegistryOptions{})
	d := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	f.reset()
	var once atomic.Bool
	f.link.SetFault(func(*http.Request) *regtest.Fault {
		if once.Swap(true) {
			return nil
		}
		return &regtest.Fault{Stall: time.Minute, StallHalf: true}
	})
	got, err := f.Resolve(t.Context(), f.repo+":x")
	require.NoError(t, err)
	require.Equal(t, d, got)
}

// Without being told, loopback registries are asked by https and then by http.
func TestLoopbackFallsBackToHTTP(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 1000)
	dir := t.TempDir()
	c, err := New(&Options{HostsDir: dir, DockerConfigDir: dir})
	require.NoError(t, err)
	defer c.Close()
	got, err := c.Get(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.Equal(t, content, got)
}

func BenchmarkFetch(b *testing.B) {
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.TempDir()})
	require.NoError(b, err)
	s, err := regtest.Start(context.Background(), g)
	require.NoError(b, err)
	defer s.Close()
	dir := b.TempDir()
	c, err := New(&Options{HostsDir: dir, DockerConfigDir: dir, PlainHTTP: true})
	require.NoError(b, err)
	defer c.Close()
	content := make([]byte, 8<<20)
	d := descriptor("application/octet-stream", content)
	require.NoError(b, c.Push(b.Context(), s.Addr+"/a", d, opener(content)))
	blob, err := c.Blob(s.Addr+"/a", d)
	require.NoError(b, err)
	for _, n := range []int64{4 << 10, 64 << 10, 1 << 20} {
		b.Run(strconv.FormatInt(n>>10, 10)+"KiB", func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				rc, err := blob.Fetch(b.Context(), off, n, backstore.Demand)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					b.Fatal(err)
				}
				rc.Close()
				off = (off + n) % (d.Size - n)
			}
		})
	}
}
