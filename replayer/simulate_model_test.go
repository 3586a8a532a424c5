package replayer

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// modelError is by how much the model may be wrong. It was found to be the same as
// the backstore where that does one thing at a time, and within a twelfth of its
// time in a replay, whose requests leave in any order; how many those are hangs
// on when bandwidth was measured. A change of the scheduler that moves a figure
// by more has to be made in the model, too.
const modelError, modelRequestError = 0.3, 0.6

// TestModelIsTheBackstore plays traces on the backstore itself, its scheduler
// and its cache, over a link on a fake clock, and compares with what the model
// of it says: what the simulator is worth.
func TestModelIsTheBackstore(t *testing.T) {
	w, err := NewWorkload(clusteredTrace(rand.New(rand.NewPCG(2, 8)), 300), nil)
	require.NoError(t, err)
	for _, link := range []Link{
		{10 * time.Millisecond, 200_000_000}, {30 * time.Millisecond, 1_000_000_000}, {2 * time.Millisecond, 2_000_000_000},
	} {
		for _, mode := range []SimMode{SimLazy, SimReplay} {
			compareModel(t, []*Workload{w}, link, mode)
		}
	}
}

// TestModelIsTheBackstoreOfAFleet is the same with several starts at once, whose
// images share a layer.
func TestModelIsTheBackstoreOfAFleet(t *testing.T) {
	var ws []*Workload
	for i := range 4 {
		tr := clusteredTrace(rand.New(rand.NewPCG(4, uint64(i%2))), 200)
		for j := range tr.Layers[1:] {
			tr.Layers[1+j].Digest = digest.FromString(fmt.Sprint(i%2, j))
		}
		w, err := NewWorkload(tr, nil)
		require.NoError(t, err)
		ws = append(ws, w)
	}
	for _, mode := range []SimMode{SimLazy, SimReplay} {
		for _, link := range []Link{{30 * time.Millisecond, 1_000_000_000}, {10 * time.Millisecond, 200_000_000}} {
			compareModel(t, ws, link, mode)
		}
	}
}

// compareModel plays ws both ways.
func compareModel(t *testing.T, ws []*Workload, link Link, mode SimMode) {
	real := playBackstore(t, ws, link, mode)
	s, err := newSimulation(ws, mode, &SimOptions{Link: link, RequestCPU: -1})
	require.NoError(t, err)
	for _, st := range s.starts {
		if st.plan != nil {
			st.replay()
		}
		s.c.after(0, st.advance)
	}
	s.c.run()
	model := s.result()
	t.Logf("%v,%d %s: ready %v, modelled %v; requests %d, modelled %d; bytes %d, modelled %d", link.Delay, link.Rate, mode,
		real.ready, model.Starts, real.requests, s.h.requests, real.bytes, s.h.bytes)
	require.InEpsilon(t, slices.Max(real.ready), model.Ready, modelError)
	require.InEpsilon(t, real.requests, s.h.requests, modelRequestError)
	require.InEpsilon(t, real.bytes, s.h.bytes, modelError)
}

type played struct {
	ready           []time.Duration
	requests, bytes int64
}

// playBackstore reads what ws read, and thinks, on a fake clock.
func playBackstore(t *testing.T, ws []*Workload, link Link, mode SimMode) played {
	p := played{ready: make([]time.Duration, len(ws))}
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		cache, err := backstore.OpenCache(dir, nil)
		require.NoError(t, err)
		net := &fakeLink{link: link}
		var blobs []backstore.Stack
		for _, w := range ws {
			blobs = append(blobs, openBlobs(t, cache, w, net))
		}
		begun := time.Now()
		var starts sync.WaitGroup
		for i, w := range ws {
			if mode == SimReplay {
				plan, err := NewPlan(w.trace, Unopened(w.layers), nil)
				require.NoError(t, err)
				starts.Go(func() { Replay(context.Background(), blobs[i], plan) })
			}
		}
		synctest.Wait()
		for i, w := range ws {
			starts.Go(func() {
				readChain(t, blobs[i], w)
				p.ready[i] = time.Since(begun)
			})
		}
		starts.Wait()
		seen := map[*backstore.Blob]bool{}
		for _, stack := range blobs {
			for _, b := range stack {
				if !seen[b] {
					st := backstore.Stack{b}.Stats()
					p.requests += st.DemandRequests + st.BackgroundRequests
					p.bytes += st.DemandBytes + st.BackgroundBytes
				}
				seen[b] = true
				require.NoError(t, b.Close())
			}
		}
		require.NoError(t, cache.Close())
		net.all.Wait()
	})
	return p
}

func openBlobs(t *testing.T, cache *backstore.Cache, w *Workload, net *fakeLink) (blobs backstore.Stack) {
	for _, l := range w.layers {
		b, err := cache.Blob(l.Digest, l.Size, net)
		require.NoError(t, err)
		blobs = append(blobs, b)
	}
	return blobs
}

// readChain reads what a warm recording has, one read after the other.
func readChain(t *testing.T, blobs backstore.Stack, w *Workload) {
	for i := range w.reads {
		time.Sleep(w.reads[i].think)
		readAll(t, blobs, &w.reads[i])
	}
	time.Sleep(w.readyThink)
}

func readAll(t *testing.T, blobs backstore.Stack, r *simRead) {
	var parts sync.WaitGroup
	for _, p := range r.parts {
		parts.Go(func() {
			_, err := blobs[p.layer].ReadAt(make([]byte, p.n), p.off)
			require.NoError(t, err)
		})
	}
	parts.Wait()
}

// clusteredTrace is a warm recording whose reads go through files, as those of
// a start do, of one layer after the other.
func clusteredTrace(r *rand.Rand, n int) *tracefmt.Trace {
	tr := randomStart(r, n, false)
	for i := range tr.Events {
		e := &tr.Events[i]
		if i > 0 && r.IntN(4) > 0 {
			before := tr.Events[i-1]
			e.Layer, e.BlobOff = before.Layer, before.BlobOff+before.BlobLen+r.Int64N(2)*r.Int64N(64<<10)
		}
		size := tr.Layers[e.Layer].Size
		e.BlobOff = min(e.BlobOff, size-1)
		e.BlobLen = min(e.BlobLen, size-e.BlobOff)
		e.Off, e.Len = 2*e.BlobOff, 2*e.BlobLen
	}
	return tr
}

// fakeLink is a registry of zeros behind a link.
type fakeLink struct {
	link Link
	all  sync.WaitGroup

	mu   sync.Mutex // guards the fields below
	free time.Time
	idle [2]int
}

func (l *fakeLink) Host() string { return "fake" }

func (l *fakeLink) Fetch(ctx context.Context, _, n int64, lane backstore.Lane) (io.ReadCloser, error) {
	wait := l.link.Delay
	l.mu.Lock()
	if l.idle[lane]--; l.idle[lane] < 0 {
		l.idle[lane] = 0
		wait += l.link.Delay
	}
	l.mu.Unlock()
	body := &fakeBody{left: n, come: make(chan struct{}, 1), begun: make(chan struct{})}
	due := time.Now().Add(wait)
	l.all.Go(func() {
		time.Sleep(time.Until(due))
		for sent := int64(0); sent < n; {
			q := min(n-sent, wireQuantum)
			l.mu.Lock()
			if l.free.Before(due) {
				l.free = due
			}
			l.free = l.free.Add(l.link.wireTime(q))
			due = l.free
			l.mu.Unlock()
			time.Sleep(time.Until(due))
			sent += q
			if sent == n {
				l.mu.Lock()
				l.idle[lane]++
				l.mu.Unlock()
			}
			body.add(q)
		}
	})
	<-body.begun // the response's header comes with its first bytes
	return body, nil
}

// fakeBody gives what has come of a response.
type fakeBody struct {
	left  int64
	come  chan struct{}
	begun chan struct{} // closed by the first bytes

	mu         sync.Mutex // guards the fields below
	here, sent int64
}

func (b *fakeBody) add(n int64) {
	b.mu.Lock()
	b.here += n
	if b.sent == 0 {
		close(b.begun)
	}
	b.sent += n
	b.mu.Unlock()
	select {
	case b.come <- struct{}{}:
	default:
	}
}

func (b *fakeBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	for {
		b.mu.Lock()
		n := min(b.here, int64(len(p)))
		b.here -= n
		b.mu.Unlock()
		if n > 0 {
			b.left -= n
			return int(n), nil
		}
		<-b.come
	}
}

func (b *fakeBody) Close() error { return nil }
