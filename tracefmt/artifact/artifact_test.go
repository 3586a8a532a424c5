package artifact

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/registrytest"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/tracefmt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A site is a registry behind a link, with an image in it.
type site struct {
	*Store
	t       *testing.T
	link    *regtest.Link
	ref     string
	lockDir string
	patient bool // with a registry that fails in passing
	subject ocispec.Descriptor
}

func newSite(t *testing.T, noReferrers bool) *site {
	t.Helper()
	reg, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: t.TempDir(), NoReferrers: noReferrers})
	require.NoError(t, err)
	link := regtest.NewLink(regtest.LinkSpec{}, reg)
	srv, err := regtest.Start(context.Background(), link)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, srv.Close()) })
	return siteAt(t, srv.Addr, link)
}

func siteAt(t *testing.T, addr string, link *regtest.Link) *site {
	s := &site{t: t, link: link, ref: addr + "/app:1", lockDir: t.TempDir()}
	s.Store = s.client()
	s.subject = s.putImage()
	return s
}

// each runs a test at registries of all kinds.
func each(t *testing.T, o registrytest.Options, f func(t *testing.T, s *site)) {
	registrytest.Each(t, o, func(t *testing.T, r *registrytest.Registry) { f(t, siteAt(t, r.Addr, r.Link)) })
}

// client is a store over a client of its own, which has nothing cached.
func (s *site) client() *Store {
	s.t.Helper()
	o := &registry.Options{HostsDir: s.t.TempDir(), DockerConfigDir: s.t.TempDir(), LockDir: s.lockDir, PlainHTTP: true}
	if !s.patient {
		o.Attempts, o.Backoff = 2, time.Millisecond
	}
	c, err := registry.New(o)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, c.Close()) })
	store, err := New(c, s.ref)
	require.NoError(s.t, err)
	return store
}

func (s *site) putImage() ocispec.Descriptor {
	empty := ocispec.DescriptorEmptyJSON
	require.NoError(s.t, s.c.Push(context.Background(), s.ref, empty, opener(empty.Data)))
	return s.putManifest(ocispec.Manifest{Config: empty, Layers: []ocispec.Descriptor{empty}}, s.ref)
}

func (s *site) putManifest(m ocispec.Manifest, ref string) ocispec.Descriptor {
	s.t.Helper()
	m.Versioned, m.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	raw, err := json.Marshal(m)
	require.NoError(s.t, err)
	d := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	require.NoError(s.t, s.c.Push(context.Background(), ref, d, opener(raw)))
	return d
}

// trace makes one of n scattered reads.
func trace(workload string, n int) *tracefmt.Trace {
	rnd := rand.New(rand.NewPCG(uint64(n), 1))
	t := &tracefmt.Trace{
		Header: tracefmt.Header{
			Version: tracefmt.Version, Workload: workload, Space: tracefmt.LayerSpace,
			Layers: []tracefmt.Layer{{Digest: digest.FromString("layer"), Size: 1 << 30, Decoded: 1 << 40}},
		},
		End: &tracefmt.End{Reason: "ready: port 80", Ready: 1500 * time.Millisecond, Duration: 2 * time.Second},
	}
	for i := range n {
		t.Events = append(t.Events, tracefmt.Event{
			At: time.Duration(i) * time.Millisecond, Off: rnd.Int64N(1<<39) &^ 4095, Len: 4096,
		})
	}
	t.Compact()
	return t
}

// largeTrace makes one that is not carried inline.
func largeTrace(workload string) *tracefmt.Trace {
	t := trace(workload, 50)
	rnd := rand.NewChaCha8([32]byte{})
	for range 3 {
		arg := make([]byte, 100<<10)
		_, _ = rnd.Read(arg)
		t.Args = append(t.Args, string(arg))
	}
	return t
}

// both runs a test at a registry with the Referrers API and at one without.
func both(t *testing.T, f func(t *testing.T, s *site)) {
	t.Run("referrers API", func(t *testing.T) { f(t, newSite(t, false)) })
	t.Run("fallback tag", func(t *testing.T) { f(t, newSite(t, true)) })
}

func (s *site) push(tr *tracefmt.Trace, o *PushOptions) Entry {
	s.t.Helper()
	e, err := s.Push(context.Background(), s.subject, tr, o)
	require.NoError(s.t, err)
	return e
}

func workloads(entries []Entry) []string {
	var names []string
	for _, e := range entries {
		names = append(names, e.Workload)
	}
	return names
}

func TestPushListPull(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		ctx := context.Background()
		list, err := s.List(ctx, s.subject.Digest)
		require.NoError(t, err)
		require.Empty(t, list)

		small, large := trace("small", 50), largeTrace("large")
		created := time.Unix(1_700_000_000, 123).UTC()
		e := s.push(small, &PushOptions{Created: created})
		s.push(large, &PushOptions{Default: true})
		require.Equal(t, Entry{
			Descriptor: e.Descriptor, Workload: "small", Created: created,
			Ready: 1500 * time.Millisecond, Bytes: 50 * 4096, Events: 50,
		}, e)

		list, err = s.client().List(ctx, s.subject.Digest)
		require.NoError(t, err)
		require.Equal(t, []string{"large", "small"}, workloads(list))
		require.True(t, list[0].Default)
		list[1].Descriptor = e.Descriptor
		require.Equal(t, e, list[1])

		for _, want := range []*tracefmt.Trace{small, large} {
			got, e, err := s.client().Pull(ctx, s.subject.Digest, want.Workload)
			require.NoError(t, err)
			require.Equal(t, want, got)
			require.Equal(t, want.Workload, e.Workload)
		}
		got, e2, err := s.client().PullDigest(ctx, e.Descriptor.Digest)
		require.NoError(t, err)
		require.Equal(t, small, got)
		require.Equal(t, created, e2.Created)

		_, _, err = s.Pull(ctx, s.subject.Digest, "absent")
		require.ErrorIs(t, err, os.ErrNotExist)
		got, _, err = s.Auto(ctx, s.subject.Digest, "absent")
		require.NoError(t, err)
		require.Equal(t, "large", got.Workload)
		got, _, err = s.Auto(ctx, s.subject.Digest, "small")
		require.NoError(t, err)
		require.Equal(t, "small", got.Workload)
	})
}

// rounds makes the link answer requests only when all of their round have come:
// what the client asks one after the other, and is expected to ask at once, then
// never ends.
func (s *site) rounds(sizes ...int) {
	var rounds []chan struct{}
	var last []int // request of each round
	n := 0
	for _, size := range sizes {
		n += size
		rounds, last = append(rounds, make(chan struct{})), append(last, n)
	}
	var mu sync.Mutex // guards arrived
	arrived := 0
	s.link.SetFault(func(r *http.Request) *regtest.Fault {
		mu.Lock()
		arrived++
		i := sort.SearchInts(last, arrived)
		if i < len(last) && arrived == last[i] {
			close(rounds[i])
		}
		mu.Unlock()
		if i < len(last) {
			select {
			case <-rounds[i]:
			case <-r.Context().Done():
			}
		}
		return nil
	})
}

// TestRoundTrips counts what a lookup asks for, and how much of that one after
// the other.
func TestRoundTrips(t *testing.T) {
	for name, c := range map[string]struct {
		attached string // "w", which is looked for, or another, the default
		large    bool
		noTags   bool
		pull     bool // Pull instead of Auto
		rounds   []int
	}{
		"own":                  {"w", false, false, false, []int{2}},
		"default":              {"d", false, false, false, []int{2}},
		"own, large":           {"w", true, false, false, []int{2, 1}},
		"default, large":       {"d", true, false, false, []int{2, 1}},
		"none":                 {"", false, false, false, []int{2, 2}},
		"union":                {"o", false, false, false, []int{2, 2, 1}},
		"union, large":         {"o", true, false, false, []int{2, 2, 1, 1}},
		"own, copied":          {"w", false, true, false, []int{2, 2, 1}},
		"default, copied":      {"d", false, true, false, []int{2, 2, 1}},
		"pull":                 {"w", false, false, true, []int{1}},
		"pull, none":           {"", false, false, true, []int{1, 2}},
		"pull, without a tag":  {"w", false, true, true, []int{1, 2, 1}},
		"pull, large":          {"w", true, false, true, []int{1, 1}},
		"pull, other is there": {"d", false, false, true, []int{1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, s *site) { s.checkRounds(c.attached, c.large, c.noTags, c.pull, c.rounds) })
		})
	}
}

func (s *site) checkRounds(attached string, large, noTags, pull bool, rounds []int) {
	t := s.t
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if attached != "" {
		tr := trace(attached, 50)
		if large {
			tr = largeTrace(attached)
		}
		s.push(tr, &PushOptions{Default: attached == "d"})
	}
	if noTags {
		s.dropTags()
	}
	s.rounds(rounds...)
	client := s.client()
	s.link.Reset()
	lookup := client.Auto
	if pull {
		lookup = client.Pull
	}
	tr, _, err := lookup(ctx, s.subject.Digest, "w")
	if attached == "" || pull && attached != "w" {
		require.ErrorIs(t, err, os.ErrNotExist)
	} else {
		require.NoError(t, err)
		require.Equal(t, attached, tr.Workload)
	}
	sum := 0
	for _, n := range rounds {
		sum += n
	}
	require.Len(t, s.link.Stats().Log, sum)
}

// dropTags removes what copying an image with its referrers leaves out.
func (s *site) dropTags() {
	for _, tag := range []string{Tag(s.subject.Digest, "w"), Tag(s.subject.Digest, "d"), DefaultTag(s.subject.Digest)} {
		err := s.c.Delete(context.Background(), s.Store.ref.WithTag(tag).String())
		if !errors.Is(err, os.ErrNotExist) {
			require.NoError(s.t, err)
		}
	}
}

// TestDefaultMoves attaches defaults one after the other.
func TestDefaultMoves(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		auto := func(want string) {
			t.Helper()
			tr, _, err := s.client().Auto(context.Background(), s.subject.Digest, "x")
			if want == "" {
				require.ErrorIs(t, err, os.ErrNotExist)
				return
			}
			require.NoError(t, err)
			require.Equal(t, want, tr.Workload)
		}
		auto("")
		at := func(n int64) time.Time { return time.Unix(1_700_000_000+n, 0) }
		s.push(trace("a", 10), &PushOptions{Default: true, Created: at(0)})
		auto("a")
		s.push(trace("b", 11), &PushOptions{Default: true, Created: at(1)})
		auto("b")
		s.push(trace("c", 12), nil)
		auto("b")
		list, err := s.List(context.Background(), s.subject.Digest)
		require.NoError(t, err)
		require.Equal(t, []bool{false, true, false}, []bool{list[0].Default, list[1].Default, list[2].Default})
		s.push(trace("b", 13), &PushOptions{Created: at(2)}) // no longer
		auto("a")
		_, err = s.Delete(context.Background(), s.subject, "b")
		require.NoError(t, err)
		auto("a")
		_, err = s.Delete(context.Background(), s.subject, "a")
		require.NoError(t, err)
		auto("c") // all that there is
	})
}

// TestHostileDefault puts other things under the default's tag.
func TestHostileDefault(t *testing.T) {
	s := newSite(t, false)
	tagged := s.Store.ref.WithTag(DefaultTag(s.subject.Digest)).String()
	for name, m := range map[string]ocispec.Manifest{
		"another image's": {ArtifactType: ArtifactType, Annotations: map[string]string{AnnotationDefault: "true"}},
		"no trace":        {ArtifactType: "x/y", Subject: &s.subject, Annotations: map[string]string{AnnotationDefault: "true"}},
		"no default":      {ArtifactType: ArtifactType, Subject: &s.subject, Annotations: map[string]string{AnnotationWorkload: "w"}},
	} {
		m.Config, m.Layers = ocispec.DescriptorEmptyJSON, []ocispec.Descriptor{ocispec.DescriptorEmptyJSON}
		s.putManifest(m, tagged)
		_, _, err := s.client().Auto(context.Background(), s.subject.Digest, "v")
		require.Error(t, err, name)
	}
	s.push(trace("v", 10), nil)
	tr, _, err := s.client().Auto(context.Background(), s.subject.Digest, "v")
	require.NoError(t, err)
	require.Equal(t, "v", tr.Workload)
}

func TestPullWithoutOwnTag(t *testing.T) {
	both(t, func(t *testing.T, s *site) {
		s.push(trace("w", 50), nil)
		s.push(largeTrace("big"), nil)
		s.link.SetFault(func(r *http.Request) *regtest.Fault {
			if strings.Contains(r.URL.Path, ".reprise-") {
				return &regtest.Fault{Status: http.StatusNotFound}
			}
			return nil
		})
		for _, name := range []string{"w", "big"} {
			tr, _, err := s.client().Pull(context.Background(), s.subject.Digest, name)
			require.NoError(t, err)
			require.Equal(t, name, tr.Workload)
		}
	})
}

// TestPullByTagAlone loses the list of referrers.
func TestPullByTagAlone(t *testing.T) {
	both(t, func(t *testing.T, s *site) {
		s.push(trace("w", 50), nil)
		s.link.SetFault(func(r *http.Request) *regtest.Fault {
			if strings.HasSuffix(r.URL.Path, registry.FallbackTag(s.subject.Digest)) || strings.Contains(r.URL.Path, "/referrers/") {
				return &regtest.Fault{Status: http.StatusNotFound}
			}
			return nil
		})
		tr, _, err := s.client().Pull(context.Background(), s.subject.Digest, "w")
		require.NoError(t, err)
		require.Equal(t, "w", tr.Workload)
	})
}

func TestReplace(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		ctx := context.Background()
		first := s.push(trace("w", 50), nil)
		s.push(trace("other", 10), nil)
		second := s.push(trace("w", 60), nil)
		list, err := s.List(ctx, s.subject.Digest)
		require.NoError(t, err)
		require.Equal(t, []string{"other", "w"}, workloads(list))
		require.Equal(t, second.Descriptor.Digest, list[1].Descriptor.Digest)
		_, _, err = s.client().PullDigest(ctx, first.Descriptor.Digest)
		require.ErrorIs(t, err, os.ErrNotExist)

		_, err = s.Push(ctx, s.subject, trace("w", 70), &PushOptions{New: true})
		require.ErrorIs(t, err, os.ErrExist)
		_, err = s.Push(ctx, s.subject, trace("new", 70), &PushOptions{New: true})
		require.NoError(t, err)
		tr, _, err := s.client().Pull(ctx, s.subject.Digest, "w")
		require.NoError(t, err)
		require.Len(t, tr.Events, 60)
	})
}

// TestNoDeletes replaces and removes at registries that keep everything.
func TestNoDeletes(t *testing.T) {
	each(t, registrytest.Options{NoDeletes: true}, func(t *testing.T, s *site) {
		ctx := context.Background()
		at := time.Now().Add(time.Hour) // by the clock of another machine
		first := s.push(trace("w", 50), &PushOptions{Created: at, Default: true})
		s.push(trace("other", 10), nil)
		s.push(trace("w", 70), &PushOptions{Default: true})
		has := func(want ...string) []Entry {
			t.Helper()
			list, err := s.client().List(ctx, s.subject.Digest)
			require.NoError(t, err)
			require.Equal(t, want, workloads(list))
			return list
		}
		require.Equal(t, 70, has("other", "w")[1].Events)
		tr, _, err := s.client().Pull(ctx, s.subject.Digest, "w")
		require.NoError(t, err)
		require.Len(t, tr.Events, 70)

		kept, err := s.Delete(ctx, s.subject, "w")
		require.NoError(t, err)
		require.True(t, kept)
		has("other")
		_, err = s.Delete(ctx, s.subject, "w")
		require.ErrorIs(t, err, os.ErrNotExist)
		_, _, err = s.client().Pull(ctx, s.subject.Digest, "w")
		require.ErrorIs(t, err, os.ErrNotExist)
		_, e, err := s.client().Auto(ctx, s.subject.Digest, "w")
		require.NoError(t, err)
		require.Equal(t, []string{"other"}, e.Union, "not the default, which is gone")
		_, _, err = s.client().PullDigest(ctx, first.Descriptor.Digest)
		require.NoError(t, err, "it is kept")

		// Attached again, from a machine whose clock is behind.
		_, err = s.Push(ctx, s.subject, trace("w", 20), &PushOptions{New: true})
		require.NoError(t, err)
		require.Equal(t, 20, has("other", "w")[1].Events)
		del, err := s.DeleteDigest(ctx, s.subject, has("other", "w")[1].Descriptor.Digest)
		require.NoError(t, err)
		require.Equal(t, Deleted{"w", true}, del)
		has("other")
	})
}

// TestAuto has traces of more and more kinds beside the image.
func TestAuto(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		ctx := context.Background()
		auto := func(c Choice, says string) *tracefmt.Trace {
			t.Helper()
			tr, e, err := s.client().Auto(ctx, s.subject.Digest, "w")
			require.NoError(t, err)
			require.Equal(t, c, e.Choice)
			require.Contains(t, e.String(), says)
			return tr
		}
		_, _, err := s.client().Auto(ctx, s.subject.Digest, "w")
		require.ErrorIs(t, err, os.ErrNotExist)
		s.push(trace("a", 10), nil)
		require.Len(t, auto(ByUnion, "of other workloads: a").Events, 10)
		s.push(largeTrace("b"), nil) // not inline
		union, err := func() (*tracefmt.Trace, error) {
			tr, _, err := tracefmt.Merge([]*tracefmt.Trace{trace("a", 10), largeTrace("b")}, tracefmt.MergeUnion)
			return tr, err
		}()
		require.NoError(t, err)
		require.Equal(t, union.Bytes(), auto(ByUnion, "of other workloads: a, b").Bytes())
		s.push(trace("d", 13), &PushOptions{Default: true})
		require.Len(t, auto(ByDefault, "of workload d, the default").Events, 13)
		s.push(trace("w", 14), nil)
		require.Len(t, auto(Own, "of workload w").Events, 14)
	})
}

// TestUnionIsBounded takes the newest of many, and leaves out what cannot be read.
func TestUnionIsBounded(t *testing.T) {
	s := newSite(t, false)
	at := time.Unix(1_700_000_000, 0)
	for i := range maxUnion + 3 {
		s.push(trace(fmt.Sprintf("w%02d", i), 10+i), &PushOptions{Created: at.Add(time.Duration(i) * time.Second)})
	}
	empty := ocispec.DescriptorEmptyJSON
	s.putManifest(ocispec.Manifest{
		ArtifactType: ArtifactType, Config: empty, Layers: []ocispec.Descriptor{empty}, Subject: &s.subject,
		Annotations: map[string]string{AnnotationWorkload: "bad", ocispec.AnnotationCreated: time.Now().Format(time.RFC3339Nano)},
	}, s.ref+"-bad")
	_, e, err := s.client().Auto(context.Background(), s.subject.Digest, "w")
	require.NoError(t, err)
	require.Len(t, e.Union, maxUnion-1)
	require.Equal(t, "w04", e.Union[0])
}

// TestListFindsLost takes entries out of the list of referrers: their tags are
// still there.
func TestListFindsLost(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		ctx := context.Background()
		for i := range 3 {
			s.push(trace(fmt.Sprint("w", i), 10), &PushOptions{Default: i == 0})
		}
		s.link.SetFault(func(r *http.Request) *regtest.Fault {
			if strings.HasSuffix(r.URL.Path, registry.FallbackTag(s.subject.Digest)) || strings.Contains(r.URL.Path, "/referrers/") {
				return &regtest.Fault{Status: http.StatusNotFound}
			}
			return nil
		})
		list, err := s.client().List(ctx, s.subject.Digest)
		require.NoError(t, err)
		require.Equal(t, []string{"w0", "w1", "w2"}, workloads(list))
		require.True(t, list[0].Default)
	})
}

// TestDeletedByOthers has manifests deleted that the fallback tag lists.
func TestDeletedByOthers(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		ctx := context.Background()
		gone := s.push(trace("gone", 10), nil)
		require.NoError(t, s.c.Delete(ctx, s.Store.ref.WithDigest(gone.Descriptor.Digest).String()))
		s.push(trace("w", 11), nil)
		tr, e, err := s.client().Auto(ctx, s.subject.Digest, "x")
		require.NoError(t, err)
		require.Equal(t, "w", strings.Join(e.Union, ","))
		require.Len(t, tr.Events, 11)
	})
}

func TestDelete(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		ctx := context.Background()
		s.push(trace("w", 50), nil)
		s.push(trace("other", 50), nil)
		kept, err := s.Delete(ctx, s.subject, "w")
		require.NoError(t, err)
		require.False(t, kept)
		_, err = s.Delete(ctx, s.subject, "w")
		require.ErrorIs(t, err, os.ErrNotExist)
		_, _, err = s.client().Pull(ctx, s.subject.Digest, "w")
		require.ErrorIs(t, err, os.ErrNotExist)
		list, err := s.client().List(ctx, s.subject.Digest)
		require.NoError(t, err)
		require.Equal(t, []string{"other"}, workloads(list))

		_, err = s.DeleteDigest(ctx, s.subject, s.subject.Digest)
		require.ErrorIs(t, err, os.ErrNotExist)
		del, err := s.DeleteDigest(ctx, s.subject, list[0].Descriptor.Digest)
		require.NoError(t, err)
		require.Equal(t, Deleted{"other", false}, del)
		list, err = s.client().List(ctx, s.subject.Digest)
		require.NoError(t, err)
		require.Empty(t, list)
	})
}

// TestConcurrentPush has many machines, which do not see each other's locks, attach
// a trace each at the same time.
func TestConcurrentPush(t *testing.T) {
	each(t, registrytest.Options{}, func(t *testing.T, s *site) {
		const n = 12
		var wg sync.WaitGroup
		s.patient = true // version 2.8 gives 500 for a tag that is just being written
		for i := range n {
			s.lockDir = t.TempDir()
			store := s.client()
			wg.Go(func() {
				_, err := store.Push(context.Background(), s.subject, trace(fmt.Sprint("w", i), 10+i), nil)
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		referrers, err := s.c.Referrers(context.Background(), s.ref, s.subject.Digest, ArtifactType)
		require.NoError(t, err)
		require.Len(t, referrers, n)
		list, err := s.List(context.Background(), s.subject.Digest)
		require.NoError(t, err)
		require.Len(t, list, n)
		for i := range n {
			tr, _, err := s.Pull(context.Background(), s.subject.Digest, fmt.Sprint("w", i))
			require.NoError(t, err)
			require.Len(t, tr.Events, 10+i)
		}
	})
}

func TestPushRefuses(t *testing.T) {
	s := newSite(t, false)
	for name, c := range map[string]struct {
		change func(tr *tracefmt.Trace)
		err    string
	}{
		"empty":    {func(tr *tracefmt.Trace) { tr.Events = nil }, "no events"},
		"device":   {func(tr *tracefmt.Trace) { tr.Space = tracefmt.DeviceSpace }, "of a device"},
		"layers":   {func(tr *tracefmt.Trace) { tr.Layers = nil }, "its layers"},
		"workload": {func(tr *tracefmt.Trace) { tr.Workload = "a\nb" }, "a name has"},
		"event":    {func(tr *tracefmt.Trace) { tr.Events[0].Layer = 3 }, "layer 3"},
	} {
		tr := trace("w", 3)
		c.change(tr)
		_, err := s.Push(context.Background(), s.subject, tr, nil)
		require.ErrorContains(t, err, c.err, name)
	}
	_, _, err := s.Pull(context.Background(), "sha256:x", "w")
	require.Error(t, err)
	_, _, err = s.Pull(context.Background(), s.subject.Digest, "")
	require.ErrorContains(t, err, "a name has")
	_, err = s.Delete(context.Background(), ocispec.Descriptor{Digest: "sha256:x"}, "w")
	require.Error(t, err)
	_, err = New(s.c, "no registry")
	require.Error(t, err)
}

func TestPushKeepsItsArgument(t *testing.T) {
	s := newSite(t, false)
	tr := trace("", 50)
	tr.Args = []string{"/bin/serve", "--fast"}
	tr.Events = append(tr.Events, tr.Events[0]) // not compact
	before := *tr
	before.Events = append([]tracefmt.Event(nil), tr.Events...)
	e := s.push(tr, nil)
	require.Equal(t, before, *tr)
	require.Equal(t, DefaultWorkload(tr.Args), e.Workload)
	require.Equal(t, 50, e.Events)
	got, _, err := s.Pull(context.Background(), s.subject.Digest, e.Workload)
	require.NoError(t, err)
	require.Equal(t, e.Workload, got.Workload)
}

// TestHostileTag puts other things under a workload's tag: the trace is then
// the listed one, or none.
func TestHostileTag(t *testing.T) {
	blob := encoded(t, trace("w", 5))
	good := ocispec.Descriptor{MediaType: LayerType, Digest: digest.FromBytes(blob), Size: int64(len(blob)), Data: blob}
	rotten := []byte("\x28\xb5\x2f\xfd and no more")
	change := func(f func(m *ocispec.Manifest)) func(s *site) ocispec.Manifest {
		return func(s *site) ocispec.Manifest {
			m := ocispec.Manifest{
				ArtifactType: ArtifactType, Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{good},
				Subject: &s.subject, Annotations: map[string]string{AnnotationWorkload: "w"},
			}
			f(&m)
			return m
		}
	}
	for name, c := range map[string]struct {
		manifest func(s *site) ocispec.Manifest
		err      string
	}{
		"good":         {change(func(*ocispec.Manifest) {}), ""},
		"no subject":   {change(func(m *ocispec.Manifest) { m.Subject = nil }), "another image"},
		"workload":     {change(func(m *ocispec.Manifest) { m.Annotations[AnnotationWorkload] = "v" }), "of the workload"},
		"type":         {change(func(m *ocispec.Manifest) { m.ArtifactType = "x/y" }), "not a trace"},
		"no layers":    {change(func(m *ocispec.Manifest) { m.Layers = nil }), "not a trace"},
		"layer's type": {change(func(m *ocispec.Manifest) { m.Layers[0].MediaType = "x/y" }), "not a trace"},
		"too large":    {change(func(m *ocispec.Manifest) { m.Layers[0].Size = 1 << 40 }), "too many"},
		"no trace": {change(func(m *ocispec.Manifest) {
			m.Layers[0] = ocispec.Descriptor{MediaType: LayerType, Digest: digest.FromBytes(rotten), Size: int64(len(rotten)), Data: rotten}
		}), "trace"},
		"other data": {change(func(m *ocispec.Manifest) { m.Layers[0].Data = bytes.Repeat([]byte{1}, len(blob)) }), "missing"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, true)
			m := c.manifest(s)
			ref, err := registry.ParseReference(s.ref)
			require.NoError(t, err)
			if name != "other data" {
				s.put(good, blob)
				s.put(ocispec.Descriptor{Digest: digest.FromBytes(rotten), Size: int64(len(rotten)), MediaType: LayerType}, rotten)
			}
			s.putManifest(m, ref.WithTag(Tag(s.subject.Digest, "w")).String())
			_, _, err = s.client().Pull(context.Background(), s.subject.Digest, "w")
			if c.err == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.err)
			require.NotErrorIs(t, err, os.ErrNotExist)
		})
	}
}

func (s *site) put(d ocispec.Descriptor, b []byte) {
	s.t.Helper()
	require.NoError(s.t, s.c.Push(context.Background(), s.ref, d, opener(b)))
}

func encoded(t *testing.T, tr *tracefmt.Trace) []byte {
	var b bytes.Buffer
	require.NoError(t, tracefmt.Encode(&b, tr))
	return b.Bytes()
}

func TestCancelled(t *testing.T) {
	s := newSite(t, false)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _, err := s.Pull(ctx, s.subject.Digest, "w")
	require.ErrorIs(t, err, context.Canceled)
	_, err = s.List(ctx, s.subject.Digest)
	require.ErrorIs(t, err, context.Canceled)
}

func TestAnnotationsOfOthers(t *testing.T) {
	e := entry(ocispec.Descriptor{Annotations: map[string]string{
		AnnotationWorkload: "w", AnnotationBytes: "-5", AnnotationEvents: "99999999999999999999",
		AnnotationReady: "soon", ocispec.AnnotationCreated: "yesterday", AnnotationDefault: "yes",
	}})
	require.Equal(t, "w", e.Workload)
	require.Zero(t, e.Bytes)
	require.Zero(t, e.Events)
	require.Zero(t, e.Ready)
	require.True(t, e.Created.IsZero())
	require.False(t, e.Default)
}

func TestTag(t *testing.T) {
	d := digest.FromString("subject")
	require.Equal(t, "sha256-"+d.Encoded()+".reprise-50e721e49c013f00", Tag(d, "w"))
	require.LessOrEqual(t, len(Tag(digest.SHA512.FromString("x"), "w")), 128)
}

func TestDefaultWorkload(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "workload-e3b0c442"},
		{[]string{"/usr/bin/python3", "-m", "http.server"}, "python3-"},
		{[]string{"/"}, "workload-"},
		{[]string{"  "}, "workload-"},
		{[]string{"/opt/größer app"}, "gr--er-app-"},
		{[]string{strings.Repeat("x", 100)}, strings.Repeat("x", 40) + "-"},
	} {
		got := DefaultWorkload(c.args)
		require.True(t, strings.HasPrefix(got, c.want), got)
		require.NoError(t, checkWorkload(got))
	}
	require.NotEqual(t, DefaultWorkload([]string{"a", "b c"}), DefaultWorkload([]string{"a", "b", "c"}))
	require.Equal(t, DefaultWorkload([]string{"python3", "a.py"}), DefaultWorkload([]string{"python3", "a.py"}))
}

// FuzzWithLayer adds a layer to configs of all kinds: what was there stays.
func FuzzWithLayer(f *testing.F) {
	f.Add([]byte(`{"architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:x"]},"history":[{"created_by":"x","unknown":1}],"more":[1]}`), 1)
	f.Add([]byte(`{"rootfs":{}}`), 0)
	f.Add([]byte(`[]`), 0)
	f.Add([]byte(`null`), 0)
	f.Fuzz(func(t *testing.T, config []byte, layers int) {
		out, err := withLayer(config, layers, "sha256:y")
		if err != nil {
			return
		}
		type document struct {
			RootFS  ocispec.RootFS    `json:"rootfs"`
			History []json.RawMessage `json:"history"`
		}
		var was, is document
		require.NoError(t, json.Unmarshal(config, &was))
		require.NoError(t, json.Unmarshal(out, &is))
		require.Equal(t, append(was.RootFS.DiffIDs, "sha256:y"), is.RootFS.DiffIDs)
		require.Len(t, is.History, len(was.History)+1)
		var a, b map[string]json.RawMessage
		require.NoError(t, json.Unmarshal(config, &a))
		require.NoError(t, json.Unmarshal(out, &b))
		for k := range a {
			require.Contains(t, b, k)
		}
	})
}
