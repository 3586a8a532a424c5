// Package registrytest starts registries of several kinds, each empty and for one
// test alone, so that a suite can be run over all of them. They differ in what
// they know of referrers and in what they refuse.
package registrytest

import (
	"context"
	"io"
	stdlog "log"
	"net/http"
	"os"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// Options say what a registry is to be like.
type Options struct {
	NoDeletes bool // it refuses deletes, as most do by default
	OneByOne  bool // the kinds do not run in parallel, for tests that need much
}

// A Registry is one that runs until its test ends, behind a link that can fail.
type Registry struct {
	Kind string
	Addr string // what references to it begin with
	Link *regtest.Link

	// Referrers tells whether it has the Referrers API; without it, clients
	// keep the fallback tag.
	Referrers bool
}

// A kind is a way to have a registry.
type kind struct {
	name      string
	referrers bool
	start     func(t testing.TB, o Options) http.Handler
}

// kinds are the registry of this project with the Referrers API and without,
// that of go-containerregistry as it is (the artifact type that it lists is the
// media type of the config, it filters nothing, and says nothing of subjects
// when it takes a manifest), and two that people run: Debian's package of
// version 2.8 of distribution, and version 3, which lack the API.
var kinds = []kind{
	{"embedded", true, func(t testing.TB, o Options) http.Handler { return embedded(t, false) }},
	{"embedded, fallback tag", false, func(t testing.TB, o Options) http.Handler { return embedded(t, true) }},
	{"go-containerregistry", true, func(testing.TB, Options) http.Handler {
		return registry.New(registry.WithReferrersSupport(true), registry.Logger(stdlog.New(io.Discard, "", 0)))
	}},
	{"docker-registry", false, func(t testing.TB, o Options) http.Handler { return program(t, dockerRegistry(t), o) }},
	{"distribution", false, func(t testing.TB, o Options) http.Handler { return program(t, distribution(t), o) }},
}

// Each runs f as a subtest over a registry of each kind, in parallel if not told
// otherwise. A kind that cannot be had on this machine is skipped, or fails the
// test where CI is true.
func Each(t *testing.T, o Options, f func(t *testing.T, r *Registry)) {
	t.Helper()
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			if !o.OneByOne {
				t.Parallel()
			}
			f(t, k.open(t, o))
		})
	}
}

func (k kind) open(t testing.TB, o Options) *Registry {
	t.Helper()
	link := regtest.NewLink(regtest.LinkSpec{}, refusing(k.start(t, o), o))
	s, err := regtest.Start(context.Background(), link)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &Registry{Kind: k.name, Addr: s.Addr, Link: link, Referrers: k.referrers}
}

func embedded(t testing.TB, noReferrers bool) http.Handler {
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: t.TempDir(), NoReferrers: noReferrers})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// refusing refuses deletes in the stead of registries that cannot be told to.
func refusing(h http.Handler, o Options) http.Handler {
	if !o.NoDeletes {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodDelete {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// missing ends a test that cannot have its registry.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
