package node

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// A trace that was looked up ahead is used, though it cannot be found any more.
func TestLookAhead(t *testing.T) {
	s := newSite(t)
	server := NewServer(s.n, nil)
	defer func() { require.NoError(t, server.Close()) }()
	r := &Request{Ref: s.ref, Trace: "auto", Platform: "linux/arm64"}
	require.NoError(t, server.Ahead(t.Context(), r), "that there is none is usual")

	im := s.open(t, ImageOptions{})
	store, err := artifact.New(s.n.Registry(), s.ref)
	require.NoError(t, err)
	e, err := store.Push(t.Context(), s.desc, s.trace(t, im), nil)
	require.NoError(t, err)
	require.NoError(t, server.Ahead(t.Context(), r))
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if strings.Contains(r.URL.Path, "reprise-") || strings.Contains(r.URL.Path, "/referrers/") {
			return &regtest.Fault{Status: http.StatusForbidden}
		}
		return nil
	})
	trace, why := s.open(t, ImageOptions{Trace: "auto"}).Trace(t.Context())
	require.NotNil(t, trace, why)
	require.Contains(t, why, string(e.Descriptor.Digest))
	trace, _ = s.open(t, ImageOptions{Trace: "auto", Workload: "another"}).Trace(t.Context())
	require.Nil(t, trace, "it is of one workload")
	trace, _ = s.open(t, ImageOptions{Trace: "none"}).Trace(t.Context())
	require.Nil(t, trace)

	require.Error(t, server.Ahead(t.Context(), &Request{Ref: s.ref + "x", Trace: "auto"}))
	require.NoError(t, server.Ahead(t.Context(), &Request{Ref: s.ref + "x", Trace: "none"}), "nothing is asked")
}

func TestAheads(t *testing.T) {
	var a aheads
	now := time.Now()
	key := func(i int) aheadKey { return aheadKey{workload: digest.FromBytes([]byte{byte(i)}).String()} }
	a.put(key(0), ahead{&tracefmt.Trace{}, "old", now.Add(-time.Second)})
	found, _ := a.get(key(0))
	require.Nil(t, found, "it is too old")
	for i := range 2 * aheadMost {
		a.put(key(i), ahead{&tracefmt.Trace{}, "why", now.Add(time.Hour)})
		found, why := a.get(key(i))
		require.NotNil(t, found)
		require.Equal(t, "why", why)
		require.LessOrEqual(t, len(a.found), aheadMost)
	}
}
