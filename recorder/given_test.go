package recorder

import (
	"bytes"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

func TestGiven(t *testing.T) {
	const ms = time.Millisecond
	all := []tracefmt.Event{
		{At: 3 * ms, Off: 4096, Len: 8192, Process: "b", Pid: 2},
		{At: 2 * ms, Off: 0, Len: 8192, Wait: ms, Process: "a", Pid: 1, Container: "c"},
		{Off: -1, Len: 1}, {Off: 1}, {Off: math.MaxInt64, Len: 1}, {Layer: tracefmt.MaxLayers, Len: 1}, {Layer: -1, Len: 1},
	}
	var calls atomic.Int32
	given := func(last bool) []tracefmt.Event {
		if calls.Add(1) != 1 {
			return nil
		}
		return all
	}
	var out bytes.Buffer
	r, err := New(&out, tracefmt.Header{Space: tracefmt.DeviceSpace}, &Options{MaxBytes: 12 << 10, Given: given})
	require.NoError(t, err)
	reason, err := r.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "bytes: 12288", reason)
	require.EqualValues(t, 5, r.Stats().Dropped)
	got, err := tracefmt.Read(&out)
	require.NoError(t, err)
	require.Equal(t, []tracefmt.Event{
		{At: 2 * ms, Off: 0, Len: 8192, Wait: ms, Process: "a", Pid: 1, Container: "c"},
		{At: 3 * ms, Off: 8192, Len: 4096, Process: "b", Pid: 2},
	}, got.Events)
	require.Equal(t, tracefmt.DeviceSpace, got.Space)
}

// What has been read when the recording is stopped is in the trace.
func TestGivenLast(t *testing.T) {
	given := func(last bool) []tracefmt.Event {
		if !last {
			return nil
		}
		return []tracefmt.Event{{Off: 512, Len: 512}}
	}
	var out bytes.Buffer
	r, err := New(&out, tracefmt.Header{Space: tracefmt.DeviceSpace}, &Options{Given: given})
	require.NoError(t, err)
	r.Stop("test")
	_, err = r.Wait(t.Context())
	require.NoError(t, err)
	got, err := tracefmt.Read(&out)
	require.NoError(t, err)
	require.Len(t, got.Events, 1)
}
