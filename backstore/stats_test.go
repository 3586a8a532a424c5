package backstore

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestLateness reads what a prefetch is bringing, for as long as it takes.
func TestLateness(t *testing.T) {
	model := bigImage(t)
	synctest.Test(t, func(t *testing.T) {
		im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		const delay = 50 * time.Millisecond
		model.origins[0].before = func(int64, int64, Lane) error { time.Sleep(delay); return nil }
		off, n := im.BlobRange(0, 1<<20, 256<<10)
		done := make(chan error)
		go func() {
			_, err := im.Prefetch(context.Background(), []Want{{Off: off, Len: n}}, nil)
			done <- err
		}()
		synctest.Wait()
		time.Sleep(delay / 2)
		p := make([]byte, 4096)
		read := func(off int64) {
			_, err := im.ReadAt(p, off)
			require.NoError(t, err)
		}
		read(1 << 20)
		require.NoError(t, <-done)
		read(1<<20 + 64<<10)
		read(4 << 20)

		s := im.Stats()
		require.Equal(t, OriginStats{Reads: 1, Bytes: 4096, Wait: delay / 2}, s.Late)
		require.Equal(t, OriginStats{Reads: 1, Bytes: 4096, Wait: delay}, s.Demand["fetch"])
		require.Equal(t, OriginStats{Reads: 1, Bytes: 4096}, s.Demand["prefetch"])
		require.Equal(t, delay*3/2, s.Wait)
		require.Equal(t, delay*3/2, s.Stall)
		require.InDelta(t, 2.0/3, s.Coverage(), 1e-9)
		require.EqualValues(t, 3, s.Latency.Count)
		require.Equal(t, s.Wait, s.Latency.Sum)
		require.Less(t, s.Latency.Quantile(0.3), 2*time.Microsecond)
		require.InEpsilon(t, float64(delay/2), float64(s.Latency.Quantile(0.6)), 0.04)
		require.InEpsilon(t, float64(delay), float64(s.Latency.Quantile(1)), 0.04)
		require.GreaterOrEqual(t, s.BackgroundBytes, n)
		require.Equal(t, s.BackgroundBytes, s.Used+s.Unused)
		require.Greater(t, s.Unused, s.Used, "two blocks of 64 were read")
	})
}

func TestOriginStatsAdd(t *testing.T) {
	require.Equal(t, OriginStats{5, 7, 9}, OriginStats{1, 2, 3}.Add(OriginStats{4, 5, 6}))
}

// TestHostsNeverFall closes and opens images; what was counted stays.
func TestHostsNeverFall(t *testing.T) {
	model := bigImage(t)
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	require.Empty(t, c.Hosts())
	host := func() HostStats {
		list := c.Hosts()
		require.Len(t, list, 1)
		return list[0]
	}
	im := model.open(t, c)
	first := host()
	require.EqualValues(t, 1, first.DemandRequests, "the tail")
	_, err := im.Prefetch(t.Context(), []Want{{Len: 100 << 10}}, nil)
	require.NoError(t, err)
	_, err = im.ReadAt(make([]byte, 4096), 0)
	require.NoError(t, err)
	open := host()
	require.EqualValues(t, 1, open.BackgroundRequests)
	require.GreaterOrEqual(t, open.BackgroundBytes, int64(100<<10))
	require.Positive(t, open.Used)
	require.Equal(t, model.origins[0].Host(), open.Host)
	require.Positive(t, open.Estimate.RTT)
	require.NoError(t, im.Close())
	closed := host()
	require.GreaterOrEqual(t, closed.DemandBytes, open.DemandBytes)
	open.DemandBytes, open.Estimate = closed.DemandBytes, closed.Estimate // of what went on beyond the read
	require.Equal(t, open, closed)

	im = model.open(t, c)
	_, err = im.ReadAt(make([]byte, 64<<10), 4<<20)
	require.NoError(t, err)
	again := host()
	require.Greater(t, again.DemandBytes, open.DemandBytes)
	require.Equal(t, open.Used, again.Used)
}

func TestHostsOutages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: testData(1 << 20), name: "busy.test", after: time.Second}
		c := openTestCache(t, t.TempDir(), CacheOptions{})
		b := a.open(t, c)
		a.set("busy")
		got := readAt(t, b, a, 0)
		time.Sleep(10 * time.Second)
		h := c.Hosts()[0]
		require.True(t, h.Away)
		require.EqualValues(t, 1, h.Outages)
		require.Positive(t, h.Throttled)
		a.set("")
		require.NoError(t, <-got)
		synctest.Wait() // for what it has fetched beyond the read
		again := c.Hosts()[0]
		require.False(t, again.Away)
		require.EqualValues(t, 1, again.Outages)
		require.NoError(t, b.Close())
		require.Equal(t, again, c.Hosts()[0])
	})
}

// TestUsedIsOfBlocks reads single blocks of what was prefetched in whole chunks.
func TestUsedIsOfBlocks(t *testing.T) {
	model := bigImage(t)
	c := openTestCache(t, t.TempDir(), CacheOptions{ChunkSize: 64 << 10})
	im := model.open(t, c)
	const base = 1<<20 + 4096 // in layer space, behind the header
	off, n := im.BlobRange(0, base, 40<<10)
	_, err := im.Prefetch(t.Context(), []Want{{Off: off, Len: n}}, nil)
	require.NoError(t, err)
	brought := im.Stats().BackgroundBytes
	require.Greater(t, brought, n, "whole chunks")
	require.Zero(t, im.Stats().Used)

	other := model.open(t, c) // of the same blob
	p := make([]byte, 4096)
	for _, read := range []int64{0, 0, 100, 4096, 20 << 10} {
		_, err := im.ReadAt(p[:512], 1<<20+read)
		require.NoError(t, err)
		_, err = other.ReadAt(p[:512], 1<<20+read)
		require.NoError(t, err)
	}
	want := int64(0)
	for _, block := range []int64{0, 4096, 20 << 10} {
		_, n := im.BlobRange(0, base+block, 4096)
		want += n
	}
	require.Equal(t, want, im.Stats().Used)
	require.Equal(t, want, other.Stats().Used)
	require.Equal(t, brought-want, im.Stats().Unused)

	// What demand has fetched by itself is not used of a prefetch.
	_, err = im.ReadAt(p, 4<<20)
	require.NoError(t, err)
	require.Equal(t, want, im.Stats().Used)
	require.NoError(t, other.Close())
}

func BenchmarkNoteRead(b *testing.B) {
	model := bigImage(b)
	im := model.open(b, openTestCache(b, b.TempDir(), CacheOptions{}))
	l := im.layers[0]
	off := int64(0)
	b.ReportAllocs()
	for b.Loop() {
		if off += 128 << 10; off+128<<10 > l.info.Decoded {
			off = 0
			b.StopTimer()
			l.blob.read.set.Store(nil)
			b.StartTimer()
		}
		l.noteRead(off, 128<<10)
	}
}
