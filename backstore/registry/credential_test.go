package registry

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// A doorman lets those in who have the password of a repository.
type doorman struct {
	inner http.Handler
	deny  int // status of an answer to a wrong password, 401 by default

	mu        sync.Mutex
	passwords map[string]string // repository → of the user "me"
	refused   int               // wrong passwords
}

func (m *doorman) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for repo, password := range m.passwords {
		if !strings.HasPrefix(r.URL.Path, "/v2/"+repo+"/") {
			continue
		}
		switch user, p, ok := r.BasicAuth(); {
		case user == "me" && p == password:
		case ok && m.deny != 0:
			m.refused++
			w.WriteHeader(m.deny)
			return
		default:
			if ok {
				m.refused++
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
	}
	m.inner.ServeHTTP(w, r)
}

// wrong counts wrong passwords since it was asked last.
func (m *doorman) wrong() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.refused
	m.refused = 0
	return n
}

// keys are credentials of repositories, which change.
type keys struct {
	mu sync.Mutex
	of map[string][]Credential
}

func (k *keys) set(repository string, passwords ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.of == nil {
		k.of = map[string][]Credential{}
	}
	k.of[repository] = nil
	for _, p := range passwords {
		k.of[repository] = append(k.of[repository], Credential{"me", p})
	}
}

func (k *keys) get(repository, _ string) []Credential {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.of[repository])
}

func TestCredentialsOfRepositories(t *testing.T) {
	for _, deny := range []int{0, http.StatusForbidden} {
		t.Run(fmt.Sprint(deny), func(t *testing.T) {
			f := newFixture(t, Options{}, regtest.RegistryOptions{})
			door := &doorman{inner: f.link, deny: deny, passwords: map[string]string{"a/one": "first", "a/two": "second"}}
			s := serve(t, door)
			var k keys
			c, clock := newClient(t, Options{Credentials: k.get, DockerConfigDir: writeDockerConfig(t, s.Addr, "me", "second")})
			none := digest.FromString("none")
			// ask looks for what is not there, which only who may look gets to know.
			ask := func(repository string) error {
				_, err := c.Resolve(t.Context(), s.Addr+"/"+repository+"@"+none.String())
				return err
			}
			one, two := s.Addr+"/a/one", s.Addr+"/a/two"
			k.set(one, "first")
			require.ErrorIs(t, ask("a/one"), errdefs.ErrNotFound)
			require.ErrorIs(t, ask("a/two"), errdefs.ErrNotFound, "with Docker's")
			k.set(two, "second")
			require.ErrorIs(t, ask("a/two"), errdefs.ErrNotFound)
			require.Zero(t, door.wrong())

			// What is refused is followed by the next, which then comes first.
			k.set(two, "bad", "worse")
			for range 5 {
				require.ErrorIs(t, ask("a/two"), errdefs.ErrNotFound)
			}
			tries := door.wrong()
			require.Positive(t, tries)
			require.ErrorIs(t, ask("a/two"), errdefs.ErrNotFound)
			require.Zero(t, door.wrong())
			require.NoError(t, clock.sleep(t.Context(), refusedFor+time.Second))
			require.ErrorIs(t, ask("a/two"), errdefs.ErrNotFound)
			require.Positive(t, door.wrong(), "again, in the order given")

			// New ones are used at once, the old ones not any more.
			k.set(one, "bad")
			err := ask("a/one")
			if deny == 0 {
				require.ErrorIs(t, err, errdefs.ErrUnauthenticated)
			} else {
				require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
			}
			require.ErrorContains(t, err, "the repository's own credentials are refused")
			k.set(one, "first")
			door.wrong()
			require.ErrorIs(t, ask("a/one"), errdefs.ErrNotFound)
			require.Zero(t, door.wrong())
			k.set(one)
			require.ErrorContains(t, ask("a/one"), "docker login "+s.Addr)
		})
	}
}

// A mirror may see less than the registry, which Via's address stands for.
func TestCredentialsOfHosts(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	door := &doorman{inner: f.link, passwords: map[string]string{"some/repo": "secret"}}
	registry, mirror := serve(t, door), serve(t, door)
	only := func(host string) func(string, string) []Credential {
		return func(repository, h string) []Credential {
			if strings.HasSuffix(repository, "/some/repo") && h == host {
				return []Credential{{"me", "secret"}}
			}
			return nil
		}
	}
	dir := t.TempDir()
	writeHosts(t, dir, registry.Addr, fmt.Sprintf("server = %q\n[host.%q]\n", registry.URL(), mirror.URL()))
	for _, c := range []struct {
		o         Options
		name      string // of the registry
		forbidden bool
	}{
		{Options{HostsDir: dir, Credentials: only(mirror.Addr)}, registry.Addr, false},
		{Options{HostsDir: dir, Credentials: only(registry.Addr)}, registry.Addr, false},
		{Options{HostsDir: dir, Credentials: only("elsewhere.test")}, registry.Addr, true},
		{Options{Via: map[string]string{"r.test": registry.URL()}, Credentials: only("r.test")}, "r.test", false},
	} {
		client, _ := newClient(t, c.o)
		ok, err := client.Exists(t.Context(), c.name+"/some/repo", d)
		if c.forbidden {
			require.ErrorIs(t, err, errdefs.ErrUnauthenticated)
			continue
		}
		require.NoError(t, err)
		require.True(t, ok)
	}
	require.Zero(t, door.wrong())
}

// Tokens, too, are a repository's own.
func TestTokensOfRepositories(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 100_000)
	for _, noOAuth := range []bool{false, true} {
		front := &tokenAuth{inner: f.link, user: "me", password: "secret", noOAuth: noOAuth}
		s := serve(t, front)
		front.realm = s.URL() + "/token"
		var k keys
		c, slept := newClient(t, Options{Credentials: k.get})
		repo := s.Addr + "/some/repo"
		b, err := c.Blob(repo, d)
		require.NoError(t, err)
		_, err = fetch(t.Context(), b, 100, 1000)
		require.ErrorIs(t, err, errdefs.ErrUnauthenticated)
		k.set(repo, "bad", "secret")
		for range 3 {
			got, err := fetch(t.Context(), b, 100, 1000)
			require.NoError(t, err)
			require.Equal(t, content[100:1100], got)
		}
		require.Equal(t, 1, front.count())
		front.expire()
		_, err = fetch(t.Context(), b, 100, 1000)
		require.NoError(t, err)
		require.Equal(t, 2, front.count())
		require.Zero(t, slept.slept)
	}
}

func TestCredentialIsNotShown(t *testing.T) {
	cred := Credential{"me", "secret"}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("text", "cred", cred)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("json", "cred", cred)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb+verb, cred, []any{&cred, []Credential{cred}})
	}
	require.NotContains(t, log.String(), "secret")
	require.NotContains(t, log.String(), fmt.Sprintf("%x", "secret"))
}
