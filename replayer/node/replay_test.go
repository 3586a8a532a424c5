package node

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// content is what a layer holds of which opening it reads only the end.
var content = func() []byte {
	p := make([]byte, 900<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(p)
	return p
}()

// located is a trace of the image's layer that says where its bytes are.
func (s *site) located(t *testing.T) *tracefmt.Trace {
	im := s.open(t, ImageOptions{})
	trace := s.trace(t, im)
	for i := range trace.Events {
		e := &trace.Events[i]
		e.BlobOff, e.BlobLen = im.BlobRange(e.Layer, e.Off, e.Len)
	}
	return trace
}

// attach attaches a trace to the image.
func (s *site) attach(t *testing.T, trace *tracefmt.Trace) {
	store, err := artifact.New(s.n.Registry(), s.ref)
	require.NoError(t, err)
	_, err = store.Push(t.Context(), s.desc, trace, nil)
	require.NoError(t, err)
}

// fresh forgets all that is on the node.
func (s *site) fresh(t *testing.T) {
	s.n, s.log = openNode(t)
}

// start opens the image with its replay, and waits for the end of that.
func (s *site) start(t *testing.T, trace string) (*Image, string) {
	t.Helper()
	im, err := s.n.openImage(t.Context(), s.ref, ImageOptions{Trace: trace, replay: new(replayer.Options)}, false)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, im.Close()) })
	if im.replay == nil { // there was nothing to begin early
		im.replay = s.n.startReplay(t.Context(), im, im.Blobs(), replayer.Options{}, closed)
	}
	<-im.replay.done
	p := make([]byte, len(content))
	_, err = im.ReadAt(p, 8192)
	require.NoError(t, err)
	require.Equal(t, content, p, "whatever the trace, the image reads")
	return im, im.explain(im.replay)
}

// on has every request for a path that has part in it meet a fault.
func on(part string, f regtest.Fault) func(*http.Request) *regtest.Fault {
	return func(r *http.Request) *regtest.Fault {
		if !strings.Contains(r.URL.Path, part) {
			return nil
		}
		return &f
	}
}

// cutAt answers every lookup with the first n bytes of the trace, and lists none.
func cutAt(n int) func(*testing.T, *site, *tracefmt.Trace) func(*http.Request) *regtest.Fault {
	return func(t *testing.T, s *site, trace *tracefmt.Trace) func(*http.Request) *regtest.Fault {
		var whole bytes.Buffer
		require.NoError(t, tracefmt.Encode(&whole, trace))
		cut := regtest.Fault{
			Status: http.StatusOK, Body: s.manifestOf(t, trace, whole.Bytes()[:n]),
			Header: http.Header{"Content-Type": {ocispec.MediaTypeImageManifest}},
		}
		return func(r *http.Request) *regtest.Fault {
			switch {
			case strings.Contains(r.URL.Path, "reprise-"):
				return &cut
			case strings.Contains(r.URL.Path, "/referrers/"), strings.HasSuffix(r.URL.Path, s.desc.Digest.Encoded()):
				return &regtest.Fault{Status: http.StatusNotFound}
			}
			return nil
		}
	}
}

// manifestOf is the manifest of a trace whose bytes are p.
func (s *site) manifestOf(t *testing.T, trace *tracefmt.Trace, p []byte) string {
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: artifact.ArtifactType, Config: ocispec.DescriptorEmptyJSON,
		Layers:      []ocispec.Descriptor{{MediaType: artifact.LayerType, Digest: digest.FromBytes(p), Size: int64(len(p)), Data: p}},
		Subject:     &s.desc,
		Annotations: map[string]string{artifact.AnnotationWorkload: trace.Workload},
	})
	require.NoError(t, err)
	return string(raw)
}

// TestExplain starts with all kinds of traces, and with none: each start says in
// a line how it went, and reads what it reads without a trace.
func TestExplain(t *testing.T) {
	foreign := tracefmt.Layer{Digest: digest.FromString("other"), Size: 1 << 30, Decoded: 1 << 30}
	const never = time.Hour
	tests := map[string]struct {
		change func(*tracefmt.Trace) // nil: none is attached
		faults func(*testing.T, *site, *tracefmt.Trace) func(*http.Request) *regtest.Fault
		trace  string // auto by default
		wait   time.Duration
		says   []string
		warns  string
	}{
		"used": {
			change: func(*tracefmt.Trace) {},
			says:   []string{"used: ", " in 1 requests", "; trace sha256:", " of workload server-"},
		},
		"none": {
			says: []string{"not used: no trace of workload server-", "record one with 'reprise record --attach'"},
		},
		"not asked for": {
			change: func(*tracefmt.Trace) {}, trace: "none",
			says: []string{"not used: no trace was asked for"},
		},
		"timed out": {
			change: func(*tracefmt.Trace) {}, wait: time.Millisecond,
			faults: func(*testing.T, *site, *tracefmt.Trace) func(*http.Request) *regtest.Fault {
				return on("reprise-", regtest.Fault{Stall: never})
			},
			says: []string{"not used: the lookup of the trace took longer than 1ms"}, warns: "no trace is replayed",
		},
		"forbidden": {
			change: func(*tracefmt.Trace) {},
			faults: func(*testing.T, *site, *tracefmt.Trace) func(*http.Request) *regtest.Fault {
				return func(r *http.Request) *regtest.Fault {
					if strings.Contains(r.URL.Path, "reprise-") || strings.Contains(r.URL.Path, "/referrers/") {
						return &regtest.Fault{Status: http.StatusForbidden}
					}
					return nil
				}
			},
			says: []string{"not used: ", "403"}, warns: "no trace is replayed",
		},
		"unreadable": {
			change: func(*tracefmt.Trace) {}, faults: cutAt(10),
			says: []string{"not used: trace of "}, warns: "no trace is replayed",
		},
		"cut off": {
			change: func(trace *tracefmt.Trace) { trace.End = nil }, // as of a recording that was killed
			says:   []string{"used: ", ", cut off", "; trace sha256:"},
		},
		"another image's": {
			change: func(trace *tracefmt.Trace) { trace.Layers = []tracefmt.Layer{foreign} },
			says:   []string{"not used: ", "shares no layer with the image", "; trace sha256:"}, warns: "the trace is not replayed",
		},
		"partly another's": {
			change: func(trace *tracefmt.Trace) {
				trace.Layers = append(trace.Layers, foreign)
				trace.Events = append(trace.Events, tracefmt.Event{At: 1, Layer: 1, Len: 4096, BlobLen: 1})
			},
			says: []string{"used: ", "of a part: 1 of its 2 layers are the image's"},
		},
		"not located": {
			change: func(trace *tracefmt.Trace) { trace.Events[0].BlobOff, trace.Events[0].BlobLen = 0, 0 },
			says:   []string{"trace sha256:"},
		},
		"failing": {
			change: func(*tracefmt.Trace) {},
			faults: func(*testing.T, *site, *tracefmt.Trace) func(*http.Request) *regtest.Fault {
				return func(r *http.Request) *regtest.Fault {
					if r.Header.Get("Purpose") != "prefetch" {
						return nil
					}
					return &regtest.Fault{Status: http.StatusNotFound}
				}
			},
			says: []string{"used: ", "404", "; trace sha256:"},
		},
		"file": {trace: "missing", says: []string{"not used: ", "no such file"}, warns: "no trace is replayed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSiteOf(t, content)
			trace := s.located(t)
			if tt.change != nil {
				tt.change(trace)
				s.attach(t, trace)
			}
			s.fresh(t)
			if tt.wait != 0 {
				s.n.o.TraceWait = tt.wait
			}
			if tt.faults != nil {
				s.SetFault(tt.faults(t, s, trace))
			}
			if tt.trace == "" {
				tt.trace = "auto"
			}
			_, said := s.start(t, tt.trace)
			t.Log(said)
			for _, want := range tt.says {
				require.Contains(t, said, want)
			}
			require.NotContains(t, said, "\n")
			if tt.warns == "" {
				require.Empty(t, s.log.String())
			} else {
				require.Contains(t, s.log.String(), tt.warns)
			}
		})
	}
}

// What is on the node already is not fetched, and said to be there.
func TestExplainAlreadyHere(t *testing.T) {
	s := newSiteOf(t, content)
	s.attach(t, s.located(t))
	s.fresh(t)
	s.start(t, "auto")
	_, said := s.start(t, "auto")
	require.Contains(t, said, "not needed: all of its ")
}

// Every reason in words.
func TestExplainResult(t *testing.T) {
	for want, r := range map[string]replayer.Result{
		"used: 9 ranges, 2.0 MiB in 7 requests, 8.0 KiB were on the node":                                    {Used: true, Reason: replayer.Complete, Wants: 9, Asked: 2 << 20, Here: 8 << 10, Sent: 7},
		"used: 2 ranges, 1.0 MiB in 1 requests, 0.0 KiB were on the node, demand was before it with 3.0 KiB": {Used: true, Reason: replayer.Complete, Wants: 2, Asked: 1 << 20, Sent: 1, Overtaken: 1 << 10, Skipped: 2 << 10},
		"not needed: all of its 1.0 MiB were on the node":                                                    {Used: true, Reason: replayer.Complete, Here: 1 << 20},
		"not used: 1 requests failed":                                                                        {Reason: "1 requests failed"},
		"partly used: stopped: late; 2 ranges, 1.0 MiB in 1 requests, 0.0 KiB were on the node":              {Used: true, Reason: "stopped: late", Wants: 2, Asked: 1 << 20, Sent: 1},
	} {
		require.Equal(t, want, explainResult(r))
	}
}

// The replay begins before the layers are open: here their tails are held back
// until its first request is there.
func TestReplayBeforeOpen(t *testing.T) {
	s := newSiteOf(t, content)
	s.attach(t, s.located(t))
	s.fresh(t)
	begun := make(chan struct{})
	var asked atomic.Int64
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if r.Header.Get("Range") == "" {
			return nil
		}
		if asked.Add(1) == 2 {
			close(begun)
		}
		<-begun
		return nil
	})
	im, err := s.n.openImage(t.Context(), s.ref, ImageOptions{Trace: "auto", replay: new(replayer.Options)}, false)
	require.NoError(t, err)
	<-im.replay.done
	require.Contains(t, im.explain(im.replay), "used: ")
	require.EqualValues(t, 2, asked.Load())
	p := make([]byte, 4096)
	_, err = im.ReadAt(p, 8192)
	require.NoError(t, err)
	require.Equal(t, content[:4096], p)
	require.EqualValues(t, 2, asked.Load())
	var names []string
	for _, p := range im.phases.List() {
		names = append(names, p.Name)
	}
	require.Subset(t, names, []string{"replay started", "image open"})
	require.NoError(t, im.Close())
}

// A lookup that does not come to an end delays neither the opening nor what is
// read, nor the end.
func TestLookupDoesNotDelay(t *testing.T) {
	s := newSiteOf(t, content)
	s.attach(t, s.located(t))
	s.fresh(t)
	s.n.o.TraceWait = time.Hour
	s.SetFault(on("reprise-", regtest.Fault{Stall: time.Hour}))
	im, err := s.n.openImage(t.Context(), s.ref, ImageOptions{Trace: "auto", replay: new(replayer.Options)}, false)
	require.NoError(t, err)
	p := make([]byte, len(content))
	_, err = im.ReadAt(p, 8192)
	require.NoError(t, err)
	require.Equal(t, content, p)
	require.Equal(t, "not used yet: it is still being looked for", im.explain(im.replay))
	require.NoError(t, im.Close())
}

// Connections are opened while a manifest is under way that takes: here until
// they are there.
func TestDialAhead(t *testing.T) {
	s := newSiteOf(t, content)
	s.attach(t, s.located(t))
	s.fresh(t)
	s.Reset()
	s.SetFault(func(r *http.Request) *regtest.Fault {
		for strings.HasSuffix(r.URL.Path, "/manifests/1") && s.Stats().Conns < demandAhead+backgroundAhead && r.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		return nil
	})
	im, err := s.n.openImage(t.Context(), s.ref, ImageOptions{Trace: "auto", replay: new(replayer.Options)}, false)
	require.NoError(t, err)
	<-im.replay.done
	require.NoError(t, im.Close())
	conns := s.Stats().Conns
	require.GreaterOrEqual(t, conns, int64(demandAhead+backgroundAhead))
	require.LessOrEqual(t, conns, int64(demandAhead+backgroundAhead+2), "one that was not through in time is no matter")
}

// A start that is given up while its trace is being replayed leaves nothing.
func TestReplayEndsWithFailedOpen(t *testing.T) {
	s := newSite(t)
	s.attach(t, s.located(t))
	s.fresh(t)
	ctx, cancel := context.WithCancel(t.Context())
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if strings.Contains(r.URL.Path, "/blobs/") {
			cancel()
			return &regtest.Fault{Stall: time.Hour}
		}
		return nil
	})
	_, err := s.n.openImage(ctx, s.ref, ImageOptions{Trace: "auto", replay: new(replayer.Options)}, false)
	require.ErrorIs(t, err, context.Canceled)
}

// An image that is named by its digest, with a workload that has a name, has its
// trace looked for together with its manifest.
func TestPinnedLookup(t *testing.T) {
	s := newSiteOf(t, content)
	trace := s.located(t)
	s.attach(t, trace)
	tag := s.ref
	for _, tt := range []struct {
		ref, workload string
		early         bool
	}{
		{tag[:strings.LastIndex(tag, ":")] + "@" + s.desc.Digest.String(), trace.Workload, true},
		{tag[:strings.LastIndex(tag, ":")] + "@" + s.desc.Digest.String(), "", false},
		{tag, trace.Workload, false},
	} {
		s.fresh(t)
		s.ref = tt.ref
		manifest := make(chan struct{}) // closed once the trace has been asked for
		if tt.early {
			var asked atomic.Bool
			s.SetFault(func(r *http.Request) *regtest.Fault {
				switch {
				case strings.Contains(r.URL.Path, "reprise-"):
					if !asked.Swap(true) {
						close(manifest)
					}
				case strings.HasSuffix(r.URL.Path, s.desc.Digest.String()):
					<-manifest
				}
				return nil
			})
		} else {
			s.SetFault(nil)
		}
		im, err := s.n.openImage(t.Context(), s.ref, ImageOptions{Trace: "auto", Workload: tt.workload, replay: new(replayer.Options)}, false)
		require.NoError(t, err)
		<-im.replay.done
		said := im.explain(im.replay)
		require.NoError(t, im.Close())
		require.Contains(t, said, "used: ")
	}
	s.SetFault(nil)
}
