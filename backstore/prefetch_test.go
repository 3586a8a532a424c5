package backstore

import (
	"bytes"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A prefetch that cannot be kept stops, and readers read around the cache.
func TestPrefetchStopsWhereNothingIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &away{data: testData(8 << 20)}
		b := a.open(t, openTestCache(t, t.TempDir(), CacheOptions{}))
		f, err := os.Open(b.file.Name()) // not for writing
		require.NoError(t, err)
		require.NoError(t, b.file.Close())
		b.file = f
		var wants []Want
		for off := int64(0); off < 8<<20; off += 16 << 10 {
			wants = append(wants, Want{Off: off, Len: 8 << 10})
		}
		_, err = Stack{b}.Prefetch(t.Context(), &list{wants: wants}, &PrefetchOptions{Limits: Limits{Requests: 2}})
		require.ErrorIs(t, err, ErrStopped)
		require.ErrorIs(t, err, errNotKept)
		require.LessOrEqual(t, a.sent(), 4)
		require.NoError(t, <-readAt(t, b, a, 0))
		require.NoError(t, b.Close())
	})
}

// A reader takes over at once what a background request has failed to bring,
// also where that was refused for good.
func TestReaderTakesOverFromAPrefetch(t *testing.T) {
	for _, fails := range []error{answer503{}, refusal{}} {
		t.Run(fails.Error(), func(t *testing.T) { testTakeOver(t, fails) })
	}
}

func testTakeOver(t *testing.T, fails error) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		o := &origin{data: testData(1 << 20)}
		o.before = func(_, _ int64, l Lane) error {
			if l == Background {
				<-gate
				return fails
			}
			return nil
		}
		b := openTestBlob(t, openTestCache(t, t.TempDir(), CacheOptions{}), o)
		done := make(chan error, 1)
		go func() {
			_, err := Stack{b}.Prefetch(t.Context(), &list{wants: []Want{{Len: 1 << 20}}}, nil)
			done <- err
		}()
		synctest.Wait()
		read := make(chan Origin, 1)
		go func() {
			from, err := b.ensure(4096, 4096, patience{})
			if err != nil {
				t.Error(err)
			}
			read <- from
		}()
		synctest.Wait()
		close(gate)
		synctest.Wait() // no time passes
		require.Equal(t, FromFetch, <-read)
		require.Error(t, <-done)
		p := make([]byte, 8192)
		_, err := b.ReadAt(p, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(o.data[:8192], p))
		require.NoError(t, b.Close())
	})
}

// Two prefetches of one blob live side by side: the end of one does not take
// its plan from the other.
func TestPlansOfASharedBlob(t *testing.T) {
	o := &origin{data: testData(4 << 20)}
	b := openTestBlob(t, openTestCache(t, t.TempDir(), CacheOptions{}), o)
	defer func() { require.NoError(t, b.Close()) }()
	first := Stack{b}.Watch(&list{wants: []Want{{Off: 0, Len: 300 << 10}}})
	second := Stack{nil, b}.Watch(&list{wants: []Want{{Layer: 1, Off: 2 << 20, Len: 700 << 10}}})
	first()
	_, err := b.ensure(2<<20, 4096, patience{})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return b.Present() == 700<<10 }, 10*time.Second, time.Millisecond)
	second()
	require.Empty(t, b.plans)
}
