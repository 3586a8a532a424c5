package tracefmt

import (
	"bytes"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBlobRangesSurvive(t *testing.T) {
	tr := withBlobs()
	got, err := Read(bytes.NewReader(plain(t, tr)))
	require.NoError(t, err)
	require.Equal(t, tr, got)
	var b bytes.Buffer
	require.NoError(t, Encode(&b, tr))
	got, err = Read(&b)
	require.NoError(t, err)
	require.EqualValues(t, 90, got.Events[1].BlobLen)
}

// TestBlobRangesAnyOrder has ranges that follow no expectation.
func TestBlobRangesAnyOrder(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 200 {
		tr := &Trace{Header: Header{Layers: []Layer{{}, {Decoded: math.MaxInt64, Size: 1}, {Decoded: 1, Size: math.MaxInt64}}}.filled()}
		for range rnd.IntN(50) {
			e := Event{Layer: rnd.IntN(3), Off: rnd.Int64() >> rnd.IntN(63), BlobOff: rnd.Int64() >> rnd.IntN(63)}
			e.Len = 1 + rnd.Int64N(math.MaxInt64-e.Off)>>rnd.IntN(63)
			e.BlobLen = 1 + rnd.Int64N(math.MaxInt64-e.BlobOff)>>rnd.IntN(63)
			if tr.checkEvent(&e) == nil {
				tr.Events = append(tr.Events, e)
			}
		}
		got, err := Read(bytes.NewReader(plain(t, tr)))
		require.NoError(t, err)
		require.Equal(t, tr.Events, got.Events)
	}
}

func TestBlobRangesCheck(t *testing.T) {
	layers := Header{Layers: []Layer{{Size: 1000}}}.filled()
	for name, c := range map[string]struct {
		h   Header
		e   Event
		err string
	}{
		"good":             {layers, Event{Len: 1, BlobOff: 990, BlobLen: 10}, ""},
		"unknown":          {layers, Event{Len: 1}, ""},
		"no layers":        {Header{}.filled(), Event{Len: 1, BlobOff: 1 << 40, BlobLen: 1}, ""},
		"beyond":           {layers, Event{Len: 1, BlobOff: 990, BlobLen: 11}, "has 1000 bytes"},
		"negative offset":  {layers, Event{Len: 1, BlobOff: -1, BlobLen: 1}, "not a range"},
		"negative length":  {layers, Event{Len: 1, BlobLen: -1}, "not a range"},
		"offset alone":     {layers, Event{Len: 1, BlobOff: 1}, "not a range"},
		"overflow":         {layers, Event{Len: 1, BlobOff: math.MaxInt64, BlobLen: 1}, "overflow"},
		"trace of devices": {Header{Space: DeviceSpace}.filled(), Event{Len: 1, BlobLen: 1}, "of a device"},
	} {
		w, err := NewWriter(&bytes.Buffer{}, c.h)
		require.NoError(t, err)
		if err = w.Add(c.e); c.err == "" {
			require.NoError(t, err, name)
		} else {
			require.ErrorContains(t, err, c.err, name)
		}
	}
}

func TestCompactBlobRanges(t *testing.T) {
	tr := &Trace{Header: Header{}.filled(), Events: []Event{
		{Off: 0, Len: 4096, BlobOff: 100, BlobLen: 50},
		{Off: 4096, Len: 2048, BlobOff: 150, BlobLen: 60}, // half of a block
		{Off: 6144, Len: 4096, BlobOff: 150, BlobLen: 90}, // the other half, and more
		{Off: 10240, Len: 4096},                           // of unknown place
		{Off: 1 << 20, Len: 8192, BlobOff: 9000, BlobLen: 80},
		{Off: 1<<20 - 4096, Len: 16384, BlobOff: 8960, BlobLen: 160},
	}}
	parts := tr.FirstTouch()
	require.Len(t, parts, 7)
	require.Equal(t, Event{Off: 1<<20 + 8192, Len: 4096, BlobOff: 8960, BlobLen: 160}, parts[6])
	tr.Compact()
	require.Equal(t, []Event{
		{Off: 0, Len: 10240, BlobOff: 100, BlobLen: 140},
		{Off: 10240, Len: 4096},
		{Off: 1 << 20, Len: 8192, BlobOff: 9000, BlobLen: 80},
		{Off: 1<<20 - 4096, Len: 4096, BlobOff: 8960, BlobLen: 160},
		{Off: 1<<20 + 8192, Len: 4096, BlobOff: 8960, BlobLen: 160},
	}, tr.Events)
}

// TestBlobRangesAreSmall bounds what the columns add to a trace as it is
// attached.
func TestBlobRangesAreSmall(t *testing.T) {
	const n = 5000
	tr := start(n)
	with := encodedLen(t, tr)
	for i := range tr.Events {
		tr.Events[i].BlobOff, tr.Events[i].BlobLen = 0, 0
	}
	without := encodedLen(t, tr)
	events := len(tr.FirstTouch())
	t.Logf("%d events: %d bytes without blob ranges, %d with them", events, without, with)
	require.Less(t, with-without, 5*events)
}

func encodedLen(t *testing.T, tr *Trace) int {
	var b bytes.Buffer
	require.NoError(t, Encode(&b, tr))
	return b.Len()
}
