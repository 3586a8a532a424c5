package lsmt

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// memFile is a file in memory.
func memFile(t testing.TB, content []byte) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("lsmt", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	f := os.NewFile(uintptr(fd), "memory")
	t.Cleanup(func() { f.Close() })
	_, err = f.WriteAt(content, 0)
	require.NoError(t, err)
	return f
}

// seedLayers are small files of every kind: committed, sealed, and the data and
// index log of a writable layer.
func seedLayers(t testing.TB) (committed, sealed, data, log []byte) {
	t.Helper()
	w, err := CreateAppend(memFile(t, nil), memFile(t, nil), &WritableOptions{VirtualSize: 1 << 20})
	require.NoError(t, err)
	for i := range int64(8) {
		_, err := w.WriteAt(pattern(i*1536, 1024, i), i*1536)
		require.NoError(t, err)
		require.NoError(t, w.Discard(i*5120, 512*(i%3)))
	}
	committed = commit(t, w, CommitOptions{Message: "seed"})
	data = fileBytes(t, w.data)
	log = fileBytes(t, w.log)
	require.NoError(t, w.Seal())
	sealed = fileBytes(t, w.data)
	require.NoError(t, w.Close())
	return committed, sealed, data, log
}

func fileBytes(t testing.TB, f *os.File) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	require.NoError(t, err)
	return b
}

// space is the 4096 bytes of a header or trailer that begins with fields.
func space(fields []byte) []byte {
	return append(bytes.Clone(fields[:min(len(fields), headerSpace)]), make([]byte, headerSpace-min(len(fields), headerSpace))...)
}

// FuzzOpenLayer opens a file of any index and trailer. What opens obeys the
// format, and opening it takes memory in proportion to its bytes, whatever size
// is claimed. The file comes in parts, so that fuzzing does not waste its time
// on data and padding.
func FuzzOpenLayer(f *testing.F) {
	committed, sealed, data, _ := seedLayers(f)
	for _, b := range [][]byte{committed, sealed, data} {
		trailer := b[len(b)-headerSpace:]
		off := int(min(binary.LittleEndian.Uint64(trailer[32:]), uint64(len(b)-headerSpace)))
		f.Add(uint16(off), b[off:len(b)-headerSpace], trailer[:headerSize], int64(0))
		f.Add(uint16(off), b[off:len(b)-headerSpace], trailer[:headerSize], int64(1)<<40)
	}
	f.Fuzz(func(t *testing.T, body uint16, index, trailer []byte, more int64) {
		b := append(append(make([]byte, body), index...), space(trailer)...)
		size := int64(len(b)) + more
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		l, err := OpenLayer(bytes.NewReader(b), size)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 2<<20+8*uint64(len(b)) {
			t.Fatalf("%d bytes took %d bytes of memory", len(b), n)
		}
		if err != nil {
			return
		}
		checkIndex(t, l.Index())
		_, err = flatten(l.Index(), []*Layer{l}, min(l.VirtualSize(), 1<<20))
		require.NoError(t, err)
		l.Index().Lookup(nil, maxSize-100, 200)
		off, n := l.IndexRange()
		require.LessOrEqual(t, off+n, size)
	})
}

// checkIndex checks the order of an index and that seek finds its entries.
func checkIndex(t *testing.T, x *Index) {
	t.Helper()
	end := int64(0)
	for s := range x.All() {
		require.GreaterOrEqual(t, s.Off, end)
		require.Positive(t, s.Len)
		end = s.End()
	}
	for i, e := range x.entries() {
		require.Equal(t, i, x.seek(e.off()))
		require.Equal(t, i, x.seek(e.end()-1))
	}
}

// FuzzMergeLookup merges layers read from the input and compares lookups with
// a map of sectors.
func FuzzMergeLookup(f *testing.F) {
	f.Add([]byte{0, 10, 1, 5, 10, 2, 255, 0, 0, 5, 3, 2}, uint8(0), uint16(0), uint16(3000))
	f.Add([]byte{1, 255, 1, 0, 0, 255, 3, 3, 2, 0, 1, 1, 255, 0, 255, 9, 9, 9}, uint8(30), uint16(700), uint16(9))
	f.Fuzz(func(t *testing.T, in []byte, scale uint8, off, n uint16) {
		layers, want := naiveLayers(in, uint64(scale%34))
		x, err := Merge(layers)
		require.NoError(t, err)
		checkIndex(t, x)
		base := int64(want.base) * SectorSize
		at := base + int64(off)
		dst := x.Lookup([]Segment{{Off: 1}}, at, int64(n))
		require.Equal(t, Segment{Off: 1}, dst[0])
		for i, s := range dst[1:] {
			require.Equal(t, at, s.Off)
			require.Positive(t, s.Len)
			if i > 0 {
				require.False(t, s.follows(&dst[i]), "%v continues %v", s, dst[i])
			}
			for ; at < s.End(); at++ {
				got := Segment{Off: at, Kind: s.Kind, Layer: s.Layer}
				if s.Kind == Data {
					got.LayerOff = s.LayerOff + at - s.Off
				}
				require.Equal(t, want.at(at), got)
			}
		}
		require.Equal(t, base+int64(off)+int64(n), at)
	})
}

// naive is a stack as a map of sectors.
type naive struct {
	base    uint64 // all layers map only what is behind this sector
	sectors map[uint64]entry
}

func (m *naive) at(off int64) Segment {
	e, ok := m.sectors[uint64(off/SectorSize)]
	if !ok {
		return Segment{Off: off, Layer: -1}
	}
	s := e.segment()
	if s.Kind == Data {
		s.LayerOff += off - s.Off
	}
	s.Off, s.Len = off, 0
	return s
}

// naiveLayers makes layers: three bytes are a gap, a length and a kind, a gap
// of 255 begins the next layer. The first bits of the device may be far away.
func naiveLayers(in []byte, scale uint64) ([]*Layer, *naive) {
	m := &naive{sectors: map[uint64]entry{}}
	if scale > 0 {
		m.base = 1 << scale
	}
	layers := []*Layer{}
	var ents []entry
	off := m.base
	end := func() {
		layers = append(layers, &Layer{index: newIndex(ents)})
		ents, off = nil, m.base
	}
	for ; len(in) >= 3 && len(layers) < MaxLayers-1; in = in[3:] {
		if in[0] == 255 {
			end()
			continue
		}
		off += uint64(in[0])
		n := uint64(in[1])
		if n == 0 {
			continue
		}
		if in[2] == 255 {
			n = maxLength
		}
		e := newEntry(off, n, 8+off*7+uint64(in[2]), in[2]%3 == 0)
		ents = append(ents, e)
		tagged := e
		tagged.val |= uint64(len(layers)) << layerShift
		for s := e.off(); s < e.end(); s++ {
			m.sectors[s] = tagged.from(s)
		}
		off = e.end()
	}
	end()
	return layers, m
}

// FuzzOpenAppend opens a writable layer of any header and log. What opens can
// be read, written, committed and reopened.
func FuzzOpenAppend(f *testing.F) {
	_, sealed, data, log := seedLayers(f)
	for _, end := range []int{len(log), len(log) - 5, headerSpace} {
		f.Add(data[:headerSize], data[headerSpace:], log[:headerSize], log[headerSpace:end])
	}
	f.Add(data[:headerSize], sealed[headerSpace:], log[:headerSize], log[headerSpace:])
	f.Add(data[:headerSize], data[headerSpace:len(data)-700], log[:headerSize], log[headerSpace:])
	f.Add(data[:headerSize], data[headerSpace:], log[:headerSize], append(bytes.Clone(log[headerSpace:]), make([]byte, 40)...))
	f.Fuzz(func(t *testing.T, header, data, logHeader, log []byte) {
		fd := memFile(t, append(space(header), data...))
		fl := memFile(t, append(space(logHeader), log...))
		w, err := OpenAppend(fd, fl)
		if err != nil {
			return
		}
		if w.VirtualSize() > 1<<20 || w.VirtualSize()%SectorSize != 0 {
			require.NoError(t, w.Resize(max(1<<20, mappedEnd(w))))
		}
		before := readSome(t, w)
		l := openLayer(t, commit(t, w, CommitOptions{}))
		checkIndex(t, l.Index())
		got, err := flatten(l.Index(), []*Layer{l}, int64(len(before)))
		require.NoError(t, err)
		sameBytes(t, before, got, "committed")
		if w.VirtualSize() == 0 {
			return
		}
		sector := bytes.Repeat([]byte{9}, SectorSize)
		_, err = w.WriteAt(sector, 0)
		require.NoError(t, err)
		copy(before, sector)
		again, err := OpenAppend(fd, fl)
		require.NoError(t, err)
		require.Zero(t, again.Dropped())
		sameBytes(t, before, readSome(t, again), "reopened")
	})
}

func mappedEnd(w *Writable) int64 {
	end := int64(0)
	for _, x := range w.ext.all() {
		end = x.end() * SectorSize
	}
	return end
}

// readSome reads the first MiB at most.
func readSome(t *testing.T, w *Writable) []byte {
	t.Helper()
	p := make([]byte, min(w.VirtualSize(), 1<<20)/SectorSize*SectorSize)
	n, err := w.ReadAt(p, 0)
	require.NoError(t, err)
	require.Equal(t, len(p), n)
	return p
}

// FuzzOpenSparse opens a sparse writable layer of any file.
func FuzzOpenSparse(f *testing.F) {
	w, err := CreateSparse(memFile(f, nil), &WritableOptions{VirtualSize: 1 << 16})
	require.NoError(f, err)
	_, err = w.WriteAt(pattern(8192, 4096, 1), 8192)
	require.NoError(f, err)
	b := fileBytes(f, w.data)
	big := bytes.Clone(b[:headerSize])
	binary.LittleEndian.PutUint64(big[48:], 1<<40)
	for _, h := range [][]byte{b[:headerSize], big, nil} {
		f.Add(h, []byte{0, 0, 1, 2, 0, 3}, uint16(0))
	}
	f.Add(b[:headerSize], []byte{1}, uint16(60_000))
	f.Fuzz(func(t *testing.T, header, blocks []byte, tail uint16) {
		data := memFile(t, space(header))
		for i, fill := range blocks {
			if fill != 0 {
				_, err := data.WriteAt(bytes.Repeat([]byte{fill}, 4096), headerSpace+int64(i)*4096)
				require.NoError(t, err)
			}
		}
		require.NoError(t, data.Truncate(headerSpace+int64(len(blocks))*4096+int64(tail)))
		w, err := OpenSparse(data, nil)
		if err != nil {
			return
		}
		before := readSome(t, w)
		l := openLayer(t, commit(t, w, CommitOptions{}))
		got, err := flatten(l.Index(), []*Layer{l}, int64(len(before)))
		require.NoError(t, err)
		sameBytes(t, before, got, "committed")
	})
}
