package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// tokenAuth puts Docker's token authentication in front of a registry, with
// the token server beside it.
type tokenAuth struct {
	inner          http.Handler
	realm          string
	user, password string
	noOAuth        bool // the token server only knows GET
	silent         bool // a challenge does not say why a token is refused

	mu     sync.Mutex
	valid  map[string]string // token → scopes
	tokens int
	broken int // so many token requests fail with 500
}

func (a *tokenAuth) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		a.token(w, r)
		return
	}
	a.mu.Lock()
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	scopes, ok := a.valid[token]
	a.mu.Unlock()
	need := "pull"
	if r.Method != "GET" && r.Method != "HEAD" {
		need = "push"
	}
	if ok && strings.Contains(scopes, need) {
		a.inner.ServeHTTP(w, r)
		return
	}
	challenge := fmt.Sprintf(`Bearer realm=%q,service="test",scope="repository:some/repo:%s"`, a.realm, need)
	if token != "" && !a.silent {
		challenge += `,error="invalid_token"`
	}
	w.Header().Set("WWW-Authenticate", challenge)
	w.WriteHeader(http.StatusUnauthorized)
}

func (a *tokenAuth) token(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r.ParseForm()
	user, password, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		if a.noOAuth {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		user, password = r.PostForm.Get("username"), r.PostForm.Get("password")
	}
	if a.broken > 0 {
		a.broken--
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	if a.user != "" && (user != a.user || password != a.password) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	a.tokens++
	t := fmt.Sprintf("token-%d", a.tokens)
	if a.valid == nil {
		a.valid = map[string]string{}
	}
	a.valid[t] = strings.Join(r.Form["scope"], " ")
	json.NewEncoder(w).Encode(map[string]any{"token": t, "access_token": t})
}

// expire makes all tokens invalid, and counts from 0.
func (a *tokenAuth) expire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.valid)
}

func (a *tokenAuth) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.tokens
}

func TestTokens(t *testing.T) {
	for _, c := range []struct{ anonymous, noOAuth, silent bool }{
		{}, {anonymous: true}, {noOAuth: true}, {silent: true}, {anonymous: true, silent: true},
	} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			f := newFixture(t, Options{}, regtest.RegistryOptions{})
			front := &tokenAuth{inner: f.link, noOAuth: c.noOAuth, silent: c.silent}
			s := serve(t, front)
			front.realm = s.URL() + "/token"
			var o Options
			if !c.anonymous {
				front.user, front.password = "me", "secret"
				o.DockerConfigDir = writeDockerConfig(t, s.Addr, "me", "secret")
			}
			g := *f
			g.Client, g.clock = newClient(t, o)
			g.repo = s.Addr + "/some/repo"
			d, _ := g.push(t, 1, 100_000)
			b, err := g.Blob(g.repo, d)
			require.NoError(t, err)

			// However many requests meet an expired token, it is renewed once.
			storm := func(want int) {
				t.Helper()
				before := front.count()
				var eg errgroup.Group
				for range 30 {
					eg.Go(func() error {
						_, err := fetch(t.Context(), b, 100, 1000)
						return err
					})
				}
				require.NoError(t, eg.Wait())
				require.Equal(t, want, front.count()-before)
			}
			storm(0)
			front.expire()
			storm(1)
			front.expire()
			storm(1)
			require.Zero(t, g.clock.slept)
		})
	}
}

func TestTokenServerFails(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	front := &tokenAuth{inner: f.link}
	s := serve(t, front)
	front.realm = s.URL() + "/token"
	c, k := newClient(t, Options{})
	front.broken = 2
	ok, err := c.Exists(t.Context(), s.Addr+"/some/repo", d)
	require.NoError(t, err)
	require.True(t, ok)
	require.NotZero(t, k.slept)
}

func TestWrongPassword(t *testing.T) {
	for _, noOAuth := range []bool{false, true} {
		front := &tokenAuth{user: "me", password: "secret", noOAuth: noOAuth}
		s := serve(t, front)
		front.realm = s.URL() + "/token"
		c, k := newClient(t, Options{DockerConfigDir: writeDockerConfig(t, s.Addr, "me", "other")})
		_, err := c.Resolve(t.Context(), s.Addr+"/some/repo:x")
		require.ErrorIs(t, err, errdefs.ErrUnauthenticated)
		require.ErrorContains(t, err, "docker login "+s.Addr)
		require.ErrorContains(t, err, "some/repo:x")
		require.Zero(t, k.slept)
	}
}

func TestBasicAuth(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return
		}
		f.link.ServeHTTP(w, r)
	}))
	for password, want := range map[string]error{"secret": nil, "other": errdefs.ErrUnauthenticated, "": errdefs.ErrUnauthenticated} {
		o := Options{}
		if password != "" {
			o.DockerConfigDir = writeDockerConfig(t, s.Addr, "me", password)
		}
		c, _ := newClient(t, o)
		_, err := c.Exists(t.Context(), s.Addr+"/some/repo", d)
		require.ErrorIs(t, err, want, password)
	}
}
