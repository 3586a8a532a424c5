package backstore

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// measuredLink is a link of which 10 ms and 100 MB/s are known: a window of 2 MB.
func measuredLink(o Limits) *link {
	l := newLink("test", newNode(o), quiet, o.PerMinute)
	l.rtt, l.bw, l.guess = 10*time.Millisecond, 100e6, 0
	return l
}

// admitted has each name ask for so many bytes n times, one request after the
// other, and gives the order in which they were let in until nothing more is.
func admitted(t *testing.T, l *link, n int, bytes int64, shares map[string]*share) func() string {
	var mu sync.Mutex
	var order strings.Builder
	for _, name := range slices.Sorted(maps.Keys(shares)) {
		go func() {
			for range n {
				if _, err := l.admit(t.Context(), shares[name], bytes); err != nil {
					return
				}
				mu.Lock()
				order.WriteString(name)
				mu.Unlock()
			}
		}()
		synctest.Wait()
	}
	return func() string {
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		defer order.Reset()
		return order.String()
	}
}

// back gives back n bytes of what the link is waiting for.
func (l *link) back(n int64) {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	l.bgOut -= n
	l.node.advance()
}

func TestAdmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink(Limits{})
		order := admitted(t, l, 9, 1e6, map[string]*share{"a": {}, "b": {}, "c": {}})
		require.Equal(t, "aa", order(), "a request is let in while the window is not full")
		var got string
		for range 9 {
			l.back(1e6)
			got += order()
		}
		require.Equal(t, "bcabcabca", got, "they take turns")
		for range 20 {
			l.back(1e6)
		}
		order()
	})
}

func TestContainersThatWaitGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink(Limits{})
		waits := &Blob{}
		waits.waited.Store(time.Now().UnixNano())
		l.bgOut = 2e6
		order := admitted(t, l, 8, 1e6, map[string]*share{"a": {}, "b": {blobs: Stack{nil, waits}}, "z": {idle: true}})
		var got string
		for range 24 {
			l.back(1e6)
			got += order()
		}
		require.Equal(t, "abbbbabbbbaaaaaa", got[:16])
		require.Equal(t, "zzzzzzzz", got[16:], "completion is last")
	})
}

func TestAdmissionCanBeCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink(Limits{PerMinute: 100})
		long, err := l.admit(t.Context(), &share{}, 5e6)
		require.NoError(t, err, "a long request is admitted alone")
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error)
		go func() {
			_, err := l.admit(ctx, &share{}, 1e6)
			got <- err
		}()
		synctest.Wait()
		cancel()
		require.ErrorIs(t, <-got, context.Canceled)
		require.Empty(t, l.queue)
		long.release((*grant).cancel)
		require.Zero(t, l.bgOut)
		require.Zero(t, l.under)
		require.Zero(t, l.node.all.out)
		require.Zero(t, l.node.all.under)
		require.Empty(t, l.sent.at)
		require.Zero(t, long.s.out)
		require.Zero(t, long.s.under)
	})
}

// TestBudgets: how many of ten requests of 100 KB each are let in at once, and
// how many after a second and after a minute, while nothing is given back.
func TestBudgets(t *testing.T) {
	for name, tc := range map[string]struct {
		node, image Limits
		want        [3]int
	}{
		"none":                {Limits{}, Limits{}, [3]int{10, 10, 10}},
		"bytes of the node":   {Limits{InFlight: 350e3}, Limits{}, [3]int{4, 4, 4}},
		"bytes of the image":  {Limits{}, Limits{InFlight: 300e3}, [3]int{3, 3, 3}},
		"requests":            {Limits{Requests: 7}, Limits{Requests: 6}, [3]int{6, 6, 6}},
		"requests, the node":  {Limits{Requests: 5}, Limits{Requests: 6}, [3]int{5, 5, 5}},
		"bandwidth":           {Limits{Rate: 200e3}, Limits{}, [3]int{1, 3, 10}},
		"bandwidth, image":    {Limits{}, Limits{Rate: 100e3}, [3]int{1, 2, 10}},
		"a minute":            {Limits{PerMinute: 8}, Limits{}, [3]int{7, 7, 10}}, // one is kept for demand
		"a minute, the image": {Limits{}, Limits{PerMinute: 4}, [3]int{4, 4, 8}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := measuredLink(tc.node)
				l.rtt = time.Second // room for all
				order := admitted(t, l, 10, 100e3, map[string]*share{"a": {budget: newBudget(tc.image)}})
				n := len(order())
				got := [3]int{n}
				for i, d := range []time.Duration{time.Second, time.Minute - time.Second} {
					time.Sleep(d)
					n += len(order())
					got[i+1] = n
				}
				require.Equal(t, tc.want, got)
			})
		})
	}
}

// In no minute more is let in than the limit, whenever demand adds to it.
func TestRequestsAMinute(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 50 {
		m := minute{limit: 1 + r.IntN(20)}
		now := time.Now()
		var at []time.Time
		for range 300 {
			now = now.Add(time.Duration(r.Int64N(int64(2 * time.Minute / time.Duration(m.limit)))))
			within := 0
			for _, a := range at {
				if now.Sub(a) < time.Minute {
					within++
				}
			}
			spare := r.IntN(m.limit)
			require.Equal(t, within+spare < m.limit, m.wait(now, spare) <= 0, "%d of %d", within, m.limit)
			if m.wait(now, spare) <= 0 || r.IntN(5) == 0 {
				m.add(now)
				at = append(at, now)
				if r.IntN(5) == 0 && len(at) < m.limit {
					m.undo()
					at = at[:len(at)-1]
				}
			}
		}
	}
}

func TestBackgroundGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink(Limits{})
		wanted := make(chan struct{}, 1)
		waited := func() time.Duration {
			start := time.Now()
			l.giveWay(t.Context(), wanted)
			return time.Since(start)
		}
		require.Zero(t, waited(), "nobody else is there")
		for _, lane := range []Lane{Demand, Background} {
			l.demands(lane, true)
			require.Equal(t, quantumPause, waited(), "demand lasts: go on slowly")
			go func() {
				time.Sleep(3 * time.Millisecond)
				l.demands(lane, false)
			}()
			require.Equal(t, 3*time.Millisecond, waited(), "demand has ended: go on")
		}
		l.demands(Background, true)
		go func() {
			time.Sleep(2 * time.Millisecond)
			wanted <- struct{}{}
		}()
		require.Equal(t, 2*time.Millisecond, waited(), "somebody waits for this one")
		full := l.window()
		l.demands(Demand, true)
		require.Equal(t, full, l.window(), "what a plan has may be waited for by many")
		l.stray()
		require.Greater(t, full, l.window(), "the window is smaller after a miss that no plan has")
	})
}

func TestLinkIsMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink("test", newNode(Limits{}), quiet, 0)
		require.EqualValues(t, guessBandwidth*guessRTT.Seconds(), l.bdp(), "guesses at first")
		get := func(delay time.Duration, pieces int) { // 10 MB/s in pieces of 64 KiB
			begun, alone := time.Now(), l.quiet()
			time.Sleep(delay)
			for i := range pieces {
				if i == 0 {
					l.flows(begun, alone)
				}
				l.received(quantum, nil, i == 0)
				time.Sleep(6554 * time.Microsecond)
			}
			l.ebbs()
		}
		get(30*time.Millisecond, 1)
		require.Equal(t, Estimate{RTT: 30 * time.Millisecond}, l.estimate(), "one piece says nothing of the bandwidth")
		for range 20 {
			get(30*time.Millisecond, 16)
		}
		e := l.estimate()
		require.Equal(t, 30*time.Millisecond, e.RTT)
		require.InEpsilon(t, 10e6, float64(e.Bandwidth), 0.05, "the round trips between are not counted")
		require.InEpsilon(t, 600e3, float64(l.runLength()), 0.05, "a miss is worth two round trips")

		go get(30*time.Millisecond, 100)
		time.Sleep(100 * time.Millisecond)
		get(200*time.Millisecond, 2)
		require.Equal(t, 30*time.Millisecond, l.estimate().RTT, "a request that queued says nothing of it")
		time.Sleep(time.Second)
		for range 50 {
			get(60*time.Millisecond, 2)
		}
		require.InEpsilon(t, 60*time.Millisecond, l.estimate().RTT, 0.1, "a longer way is noticed")
	})
}

func TestReadaheadGrowsForForwardReaders(t *testing.T) {
	const base = 256 << 10
	var r readahead
	var script string
	off := int64(0)
	for range 5 {
		n := r.next(off, off+4096, base)
		script += fmt.Sprint(n>>10, " ")
		off += n
	}
	require.Equal(t, "256 512 1024 2048 2048 ", script)
	require.EqualValues(t, base, r.next(900<<20, 900<<20+4096, base), "somewhere else")
	require.EqualValues(t, 2<<20, r.next(off, off+4096, base), "the first reader is still known")
	for i := range int64(8) {
		r.next(i<<24+1<<30, i<<24+1<<30+1, base)
	}
	require.EqualValues(t, base, r.next(off+2<<20, off+2<<20+1, base), "forgotten among many")
}

// A host's 429 is remembered for a while.
func TestThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink(Limits{})
		require.False(t, l.estimate().Throttled)
		l.throttle()
		require.True(t, l.estimate().Throttled)
		time.Sleep(resentful)
		require.False(t, l.estimate().Throttled)
	})
}
