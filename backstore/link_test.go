package backstore

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// measuredLink is a link of which 10 ms and 100 MB/s are known: a window of
// 1.5 MB.
func measuredLink() *link {
	l := newLink("test", quiet)
	l.rtt, l.bw = 10*time.Millisecond, 100e6
	return l
}

func TestAdmissionKeepsOrderAndBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink()
		order := make(chan int, 10)
		for i := range 4 {
			go func() {
				if err := l.admit(t.Context(), 1e6); err == nil {
					order <- i
				}
			}()
			synctest.Wait() // one after the other
		}
		require.Len(t, order, 2, "a request is admitted while the window is not full")
		l.received(0, 0.6e6)
		synctest.Wait()
		require.Len(t, order, 3)
		l.received(0, 2e6)
		synctest.Wait()
		require.Len(t, order, 4)
		for want := range 4 {
			require.Equal(t, want, <-order)
		}
	})
}

func TestAdmissionCanBeCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink()
		require.NoError(t, l.admit(t.Context(), 5e6), "a long request is admitted alone")
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error)
		go func() { got <- l.admit(ctx, 1e6) }()
		synctest.Wait()
		cancel()
		require.ErrorIs(t, <-got, context.Canceled)
		require.Empty(t, l.queue)
		l.started(Background)
		l.ended(Background)
		l.received(0, 5e6) // nothing of it was read
		require.Zero(t, l.bgOut)
	})
}

func TestBackgroundGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := measuredLink()
		waited := func() time.Duration {
			start := time.Now()
			l.giveWay(t.Context())
			return time.Since(start)
		}
		require.Zero(t, waited(), "nobody else is there")
		l.started(Demand)
		full := l.window()
		require.Equal(t, quantumPause, waited(), "demand lasts: go on slowly")
		go func() {
			time.Sleep(3 * time.Millisecond)
			l.ended(Demand)
		}()
		require.Equal(t, 3*time.Millisecond, waited(), "demand has ended: go on")
		require.Greater(t, l.window(), full, "the window is smaller while demand is fetched")
	})
}

func TestLinkIsMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink("test", quiet)
		require.EqualValues(t, guessBandwidth*guessRTT.Seconds(), l.bdp(), "guesses at first")
		for range 20 { // 10 MB/s in pieces of 64 KiB, 30 ms away
			l.started(Demand)
			time.Sleep(30 * time.Millisecond)
			l.firstByte(30 * time.Millisecond)
			for range 16 {
				time.Sleep(6554 * time.Microsecond)
				l.received(quantum, 0)
			}
			l.ended(Demand)
		}
		e := l.estimate()
		require.Equal(t, 30*time.Millisecond, e.RTT)
		require.InEpsilon(t, 10e6, float64(e.Bandwidth), 0.15)
		require.InEpsilon(t, 300e3, float64(l.runLength()), 0.2, "a miss is worth a round trip")
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
