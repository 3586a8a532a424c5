package tracefmt

import (
	"bytes"
	"encoding/binary"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func FuzzRead(f *testing.F) {
	f.Add(plain(f, sample()))
	file := plain(f, withBlobs())
	f.Add(file)
	f.Add(file[:len(file)-3])
	var packed bytes.Buffer
	require.NoError(f, Encode(&packed, withBlobs()))
	f.Add(packed.Bytes())
	head := plain(f, &Trace{Header: sample().Header})
	for p := len(file[:len(head)]); p < len(file); {
		n := frameHead + int(binary.LittleEndian.Uint32(file[p+4:]))
		f.Add(file[p+frameHead : p+n]) // a payload
		p += n
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		checkRead(t, fixSums(b))
		checkRead(t, slices.Concat([]byte(fileMagic), frame(frameHeader, b)))
		checkRead(t, slices.Concat(head, frame(frameEvents, b), frame(frameEnd, b)))
	})
}

// checkRead reads a file; what Read accepts, a Writer accepts too.
func checkRead(t *testing.T, b []byte) {
	tr, err := Read(bytes.NewReader(b))
	if err != nil {
		return
	}
	require.NoError(t, tr.Check())
	again, err := Read(bytes.NewReader(plain(t, tr)))
	require.NoError(t, err)
	require.Equal(t, tr.Header, again.Header)
	require.Equal(t, tr.Events, again.Events)
}

// fixSums makes the checksums of all frames right, so that fuzzing reaches
// what is behind them.
func fixSums(b []byte) []byte {
	b = bytes.Clone(b)
	for p := len(fileMagic); p+frameHead <= len(b); {
		n := int(b[p+4]) | int(b[p+5])<<8 | int(b[p+6])<<16
		if b[p+7] != 0 || p+frameHead+n > len(b) {
			break
		}
		typ := b[p]
		putFrameHead(b[p:p+frameHead+n], typ)
		p += frameHead + n
	}
	return b
}

func FuzzReadReference(f *testing.F) {
	var b bytes.Buffer
	require.NoError(f, WriteReference(&b, sample()))
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= refHeader {
			b = bytes.Clone(b)
			sum := refSum(0, b[refHeader:])
			b[16], b[17], b[18], b[19] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
		}
		tr, err := ReadReference(bytes.NewReader(b))
		if err != nil {
			return
		}
		var out bytes.Buffer
		require.NoError(t, WriteReference(&out, tr))
		again, err := ReadReference(&out)
		require.NoError(t, err)
		require.Equal(t, tr, again)
	})
}

// fuzzTrace makes a trace of arbitrary bytes.
func fuzzTrace(b []byte) *Trace {
	take := func(n int) (v int64) {
		for range n {
			var c byte
			if len(b) > 0 {
				c, b = b[0], b[1:]
			}
			v = v<<8 | int64(c)
		}
		return v
	}
	name := func() string {
		if c := take(1); c < 200 {
			return string(rune('a' + c%8))
		}
		return ""
	}
	t := &Trace{Header: Header{Image: name(), Workload: name(), Args: []string{name()}}.filled()}
	for range take(1) % 4 {
		t.Layers = append(t.Layers, Layer{Size: take(5), Decoded: take(5)})
	}
	for len(b) > 0 {
		e := Event{
			At: time.Duration(take(3)) * time.Microsecond, Wait: time.Duration(take(2)) * time.Microsecond,
			Layer: int(take(1)) % MaxLayers, Len: 1 + take(3), Origin: uint8(take(1)), Path: name(), FileOff: take(2), Process: name(),
		}
		e.Off = (take(8) & math.MaxInt64) >> (take(1) & 63)
		if take(1)&1 == 0 {
			e.BlobOff, e.BlobLen = (take(8)&math.MaxInt64)>>(take(1)&63), 1+take(3)
		}
		if t.checkEvent(&e) == nil {
			t.Events = append(t.Events, e)
		}
	}
	if take(1)&1 == 0 {
		t.End = &End{Reason: name(), Events: len(t.Events), Bytes: sumLen(t.Events)}
	}
	return t
}

func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz"))
	f.Fuzz(func(t *testing.T, b []byte) {
		tr := fuzzTrace(b)
		got, err := Read(bytes.NewReader(plain(t, tr)))
		require.NoError(t, err)
		require.Equal(t, tr, got)

		var packed bytes.Buffer
		require.NoError(t, Encode(&packed, tr))
		got, err = Read(&packed)
		require.NoError(t, err)
		want := *tr
		want.Compact()
		require.Equal(t, &want, got)
		require.Equal(t, tr.Bytes(), got.Bytes())
		got.Compact()
		require.Equal(t, want.Events, got.Events, "Compact is not idempotent")
	})
}
