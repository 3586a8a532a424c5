package replayer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

const testBlob = 32 << 20 // bytes

// farBlob is a blob of zeros, a round trip away on a link of its own.
type farBlob struct {
	rtt      time.Duration
	rate     int64         // bytes a second
	line     chan struct{} // has a place for the response that is being sent
	requests *atomic.Int64
	fails    func(n int64) bool // whether the n-th background request fails
}

func (f farBlob) Host() string { return "far" }

func (f farBlob) Fetch(ctx context.Context, _, n int64, lane backstore.Lane) (io.ReadCloser, error) {
	i := f.requests.Add(1)
	time.Sleep(f.rtt)
	if lane == backstore.Background && f.fails != nil && f.fails(i) {
		return nil, errors.New("no")
	}
	return &farBytes{ctx, f, bytes.NewReader(make([]byte, n))}, ctx.Err()
}

type farBytes struct {
	ctx context.Context
	f   farBlob
	r   *bytes.Reader
}

func (b *farBytes) Read(p []byte) (int, error) {
	b.f.line <- struct{}{}
	n, err := b.r.Read(p[:min(len(p), 16<<10)])
	time.Sleep(time.Duration(int64(n) * int64(time.Second) / b.f.rate))
	<-b.f.line
	return n, errors.Join(err, b.ctx.Err())
}

func (b *farBytes) Close() error { return nil }

// farSite is a node with two such blobs, on a virtual clock.
type farSite struct {
	blobs    backstore.Stack
	infos    []backstore.LayerInfo
	requests *atomic.Int64
}

func onFarSite(t *testing.T, fails func(int64) bool, test func(t *testing.T, s *farSite)) {
	synctest.Test(t, func(t *testing.T) {
		cache, err := backstore.OpenCache(t.TempDir(), &backstore.CacheOptions{Log: slog.New(slog.DiscardHandler)})
		require.NoError(t, err)
		s := &farSite{requests: new(atomic.Int64)}
		f := farBlob{30 * time.Millisecond, 25e6, make(chan struct{}, 1), s.requests, fails}
		for i := range 2 {
			d := digest.FromString(string(rune('0' + i)))
			b, err := cache.Blob(d, testBlob, f)
			require.NoError(t, err)
			s.blobs = append(s.blobs, b)
			s.infos = append(s.infos, backstore.LayerInfo{Digest: d, Size: testBlob})
		}
		test(t, s)
		for _, b := range s.blobs {
			require.NoError(t, b.Close())
		}
		require.NoError(t, cache.Close())
	})
}

// plan has reads of 64 KiB all over the first blob.
func (s *farSite) plan(t *testing.T, bytes int64) *Plan { return s.planWith(t, bytes, nil) }

func (s *farSite) planWith(t *testing.T, bytes int64, o *Options) *Plan {
	tr := &tracefmt.Trace{Header: tracefmt.Header{Layers: []tracefmt.Layer{{Digest: s.infos[0].Digest}}}}
	const read = 64 << 10
	for i, at := range rand.New(rand.NewPCG(1, 1)).Perm(testBlob / read)[:bytes/read] {
		off := int64(at) * read
		tr.Events = append(tr.Events, tracefmt.Event{At: time.Duration(i), Off: off, Len: read, BlobOff: off, BlobLen: read})
	}
	p, err := NewPlan(tr, Unopened(s.infos), o)
	require.NoError(t, err)
	return p
}

func TestReplay(t *testing.T) {
	onFarSite(t, nil, func(t *testing.T, s *farSite) {
		r := Replay(t.Context(), s.blobs, s.plan(t, 8<<20))
		require.Equal(t, Complete, r.Reason)
		require.True(t, r.Used)
		require.Equal(t, int64(8<<20), r.Need)
		require.GreaterOrEqual(t, r.Asked, r.Need)
		require.Equal(t, int64(r.Sent), s.requests.Load())

		r = Replay(t.Context(), s.blobs, s.plan(t, 8<<20))
		require.Equal(t, Complete, r.Reason)
		require.Zero(t, r.Asked, "all of it is here")
		require.Equal(t, int64(8<<20), r.Here)
		require.Zero(t, r.Took, "nothing was waited for")
	})
}

func TestReplayOfAContainerThatEnds(t *testing.T) {
	onFarSite(t, nil, func(t *testing.T, s *farSite) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		r := Replay(ctx, s.blobs, s.plan(t, 8<<20))
		require.Equal(t, "stopped: the container ended first", r.Reason)
	})
}

func TestReplayWithFailures(t *testing.T) {
	onFarSite(t, func(n int64) bool { return n%2 == 0 }, func(t *testing.T, s *farSite) {
		r := Replay(t.Context(), s.blobs, s.plan(t, 8<<20))
		require.Contains(t, r.Reason, "failed and were left to demand")
		require.Positive(t, r.Failed)
	})
}

// demand reads 32 KiB here and there until it is told to end.
func (s *farSite) demand(t *testing.T, layer int, reads int) {
	r := rand.New(rand.NewPCG(7, uint64(layer)))
	for range reads {
		_, err := s.blobs[layer].ReadAt(make([]byte, 32<<10), r.Int64N(testBlob/4096-8)*4096)
		require.NoError(t, err)
	}
}

// A trace of another workload costs some bytes, not all of them.
func TestReplayOfAnotherWorkload(t *testing.T) {
	onFarSite(t, nil, func(t *testing.T, s *farSite) {
		done := make(chan Result)
		p := s.plan(t, 30<<20)
		go func() { done <- Replay(t.Context(), s.blobs, p) }()
		s.demand(t, 1, 60)
		r := <-done
		require.Contains(t, r.Reason, "demand reads other parts than the trace says")
		require.True(t, r.Used)
		require.Less(t, r.Asked, int64(10<<20))
		require.Equal(t, 1, r.Held)
		require.Positive(t, r.Outside)
	})
}

// A trace on trial waits for demand to meet it, and is replayed whole then.
func TestReplayOnTrial(t *testing.T) {
	onFarSite(t, nil, func(t *testing.T, s *farSite) {
		done := make(chan Result)
		p := s.planWith(t, 16<<20, &Options{Trial: true})
		go func() { done <- Replay(t.Context(), s.blobs, p) }()
		time.Sleep(time.Minute)
		brought := s.blobs.Stats().BackgroundBytes
		require.GreaterOrEqual(t, brought, int64(trialBytes))
		require.LessOrEqual(t, brought, int64(2*trialBytes))
		require.True(t, p.isHeld())
		for _, w := range p.Wants[:len(p.Wants)/2] {
			_, err := s.blobs[0].ReadAt(make([]byte, w.Len), w.Off)
			require.NoError(t, err)
		}
		r := <-done
		require.Equal(t, Complete, r.Reason)
		require.Zero(t, r.Held, "it was never wrong")
		time.Sleep(time.Minute) // what a reader's fetch goes on to bring
		for _, w := range p.Wants {
			require.True(t, s.blobs.Has(w))
		}
	})
}

// A phase that the trace does not know of holds the replay; then it goes on.
func TestReplayGoesOn(t *testing.T) {
	onFarSite(t, nil, func(t *testing.T, s *farSite) {
		done := make(chan Result)
		p := s.plan(t, 30<<20)
		go func() { done <- Replay(t.Context(), s.blobs, p) }()
		s.demand(t, 1, 10)
		require.True(t, p.isHeld())
		s.demand(t, 0, 10)
		r := <-done
		require.Equal(t, Complete, r.Reason)
		require.Equal(t, 1, r.Held)
		time.Sleep(time.Minute)
		for _, w := range p.Wants {
			require.True(t, s.blobs.Has(w))
		}
	})
}
