package tracefmt

import (
	"bytes"
	"encoding/binary"
	"math"
	"path"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
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
	f.Add(plain(f, withRuns()))
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
		if sumLen(tr.Events) > 64*refLongest {
			return // many records
		}
		var out bytes.Buffer
		require.NoError(t, WriteReference(&out, tr))
		again, err := ReadReference(&out)
		require.NoError(t, err)
		require.Equal(t, joinedAll(tr.Events), joinedAll(again.Events))
		for _, e := range again.Events {
			require.LessOrEqual(t, e.Len, int64(refLongest))
		}
	})
}

// joinedAll joins events that follow each other, of whatever length.
func joinedAll(events []Event) []Event { return joined(slices.Clone(events)) }

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
	t.Runs = int(take(1)) % 4
	for range take(1) % 4 {
		if take(1)&1 == 0 {
			t.Layers = append(t.Layers, Layer{Digest: digest.FromString(name())})
			continue
		}
		t.Layers = append(t.Layers, Layer{Size: take(5), Decoded: take(5)})
	}
	for len(b) > 0 {
		e := Event{
			At: time.Duration(take(3)) * time.Microsecond, Wait: time.Duration(take(2)) * time.Microsecond,
			Layer: int(take(1)) % MaxLayers, Len: 1 + take(3), Origin: uint8(take(1)), Path: name(), FileOff: take(2), Process: name(),
			Pid: int(take(2)), Container: name(), Hits: int(take(1)) % 4,
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

// FuzzMerge merges arbitrary traces: what comes out can be written, is compact,
// and has each byte as often as the traces have it.
func FuzzMerge(f *testing.F) {
	seed := []byte("0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz")
	f.Add(seed, seed[7:], uint8(0))
	f.Add(seed, seed[:40], uint8(1))
	f.Fuzz(func(t *testing.T, a, b []byte, mode uint8) {
		one, two := fuzzTrace(a), fuzzTrace(b)
		d := Diff(one, two)
		require.LessOrEqual(t, d.Order, 1.0)
		require.GreaterOrEqual(t, d.Order, -1.0)
		require.Equal(t, one.inLayers(), saturated(d.OnlyA, d.Both))
		got, agreement, err := Merge([]*Trace{one, two}, MergeMode(mode%3))
		if err != nil {
			return
		}
		require.Equal(t, saturated(d.OnlyA, d.OnlyB, d.Both), agreement.Bytes)
		again, err := Read(bytes.NewReader(plain(t, got)))
		require.NoError(t, err)
		require.Equal(t, got, again)
		got.Compact()
		require.Equal(t, again.Events, got.Events)
		want := map[MergeMode]int64{MergeUnion: agreement.Bytes, MergeIntersection: agreement.BytesAll}
		if n, ok := want[MergeMode(mode%3)]; ok {
			require.Equal(t, n, got.Bytes())
		}
	})
}

// inLayers is how many distinct bytes of distinct layers the trace has.
func (t *Trace) inLayers() int64 {
	_, all := t.Covers(nil)
	return all
}

func saturated(list ...int64) (sum int64) {
	for _, n := range list {
		addUp(&sum, n)
	}
	return sum
}

func FuzzReadAccesses(f *testing.F) {
	f.Add([]byte("# paths\n/usr/bin/python3\n/usr/lib/*\n"))
	f.Add([]byte(`{"path":"usr/bin/bash","manifestDigest":"sha256:0","layerIndex":0}`))
	f.Add([]byte("path,size,elapsed\n/usr/bin/bash,1234376,102\n\"/a,b\",5 B,1.250 ms\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, format, err := ReadAccesses(bytes.NewReader(b))
		if err != nil {
			require.Nil(t, list)
			return
		}
		require.Contains(t, []string{AccessPaths, AccessEStargz, AccessNydus}, format)
		for _, a := range list {
			require.Equal(t, path.Clean("/"+a.Path), a.Path)
			require.Less(t, len(a.Path), maxString+2)
			require.NotContains(t, a.Path, "\x00")
			require.GreaterOrEqual(t, a.At, time.Duration(0))
		}
	})
}

func FuzzReadAcceleration(f *testing.F) {
	var b bytes.Buffer
	require.NoError(f, WriteAcceleration(&b, sample()))
	f.Add(b.Bytes())
	f.Add(gzipped(f, b.Bytes()))
	f.Add(tarOf(f, "x", "y", "trace", "/bin/sh\n"))
	f.Add([]byte("/bin/sh\n"))
	f.Add(plain(f, withRuns()))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, layer := range [][]byte{b, tarOf(t, "trace", string(b))} {
			tr, list, err := ReadAcceleration(bytes.NewReader(layer))
			switch {
			case err != nil:
				require.Nil(t, tr)
				require.Nil(t, list)
			case tr != nil:
				require.Nil(t, list)
				require.NoError(t, tr.Check())
			}
		}
	})
}
