package lsmt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// TestOpenLayerRejects breaks a good layer, one thing at a time.
func TestOpenLayerRejects(t *testing.T) {
	good, _, _, _ := seedLayers(t)
	trailer := len(good) - headerSpace
	le := binary.LittleEndian
	for _, tc := range []struct {
		name, want string
		mutate     func(b []byte) []byte
	}{
		{"empty", "too few", func(b []byte) []byte { return nil }},
		{"header only", "too few", func(b []byte) []byte { return b[:headerSpace] }},
		{"cut short", "bad magic", func(b []byte) []byte { return b[:len(b)-1] }},
		{"magic 0", "bad magic", func(b []byte) []byte { b[trailer]++; return b }},
		{"magic 1", "bad magic", func(b []byte) []byte { b[trailer+23]++; return b }},
		{"a header", "not those of a sealed layer", func(b []byte) []byte { le.PutUint32(b[trailer+28:], 7); return b }},
		{"not sealed", "not those of a sealed layer", func(b []byte) []byte { le.PutUint32(b[trailer+28:], 2); return b }},
		{"an index file", "not those of a sealed layer", func(b []byte) []byte { le.PutUint32(b[trailer+28:], 4); return b }},
		{"index in the header", "outside the file", func(b []byte) []byte { le.PutUint64(b[trailer+32:], 4095); return b }},
		{"index in the trailer", "outside the file", func(b []byte) []byte { le.PutUint64(b[trailer+32:], uint64(trailer)-1); return b }},
		{"index far away", "outside the file", func(b []byte) []byte { le.PutUint64(b[trailer+32:], 1<<63); return b }},
		{"index too long", "outside the file", func(b []byte) []byte { le.PutUint64(b[trailer+40:], 100_000); return b }},
		{"too many entries", "more than 1000000", func(b []byte) []byte { le.PutUint64(b[trailer+40:], 1<<60); return b }},
		{"virtual size", "above the format's limit", func(b []byte) []byte { le.PutUint64(b[trailer+48:], 1<<60); return b }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := tc.mutate(bytes.Clone(good))
			_, err := OpenLayer(bytes.NewReader(b), int64(len(b)))
			require.ErrorIs(t, err, ErrCorrupt)
			require.ErrorContains(t, err, tc.want)
		})
	}
	t.Run("version", func(t *testing.T) {
		b := bytes.Clone(good)
		b[trailer+132] = 2
		_, err := OpenLayer(bytes.NewReader(b), int64(len(b)))
		require.ErrorIs(t, err, errors.ErrUnsupported)
	})
	t.Run("writable", func(t *testing.T) {
		_, _, data, _ := seedLayers(t)
		_, err := OpenLayer(bytes.NewReader(data), int64(len(data)))
		require.ErrorContains(t, err, "commit or seal it first")
	})
	t.Run("read error", func(t *testing.T) {
		_, err := OpenLayer(failingReader{}, int64(len(good)))
		require.ErrorIs(t, err, unix.EIO)
		require.NotErrorIs(t, err, ErrCorrupt)
	})
}

type failingReader struct{}

func (failingReader) ReadAt([]byte, int64) (int, error) { return 0, unix.EIO }

// TestOpenLayerReadsTail checks that opening a layer reads nothing but index
// and trailer, each byte once.
func TestOpenLayerReadsTail(t *testing.T) {
	b, _, _, _ := seedLayers(t)
	r := &countingReader{r: bytes.NewReader(b), from: int64(len(b))}
	l, err := OpenLayer(r, int64(len(b)))
	require.NoError(t, err)
	off, n := l.IndexRange()
	require.Equal(t, off, r.from)
	require.Equal(t, n+headerSpace, r.n)
	require.EqualValues(t, len(b), off+n+headerSpace)
}

type countingReader struct {
	r       io.ReaderAt
	from, n int64 // the lowest offset and the number of bytes read
}

func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	c.from = min(c.from, off)
	c.n += int64(len(p))
	return c.r.ReadAt(p, off)
}

// TestMaxSegments opens the longest index there may be, and one longer.
func TestMaxSegments(t *testing.T) {
	for _, n := range []int{MaxSegments, MaxSegments + 1} {
		var b []byte
		for i := range n {
			b = newEntry(uint64(i)*2, 1, 0, true).append(b)
		}
		for range -n & (indexPad - 1) {
			b = appendPadding(b)
		}
		h := header{flags: flagData | flagSealed, indexOffset: headerSpace, indexSize: uint64(len(b) / entrySize)}
		b = h.append(append(make([]byte, headerSpace), b...))
		l, err := OpenLayer(bytes.NewReader(b), int64(len(b)))
		if n > MaxSegments {
			require.ErrorIs(t, err, ErrCorrupt)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, n, l.Index().Len())
	}
}

func TestMaxLayers(t *testing.T) {
	layers := make([]*Layer, MaxLayers+1)
	for i := range layers {
		layers[i] = &Layer{index: newIndex([]entry{newEntry(uint64(i), 1, 8, false)})}
	}
	_, err := Merge(layers)
	require.ErrorContains(t, err, "merge 256 layers")
	x, err := Merge(layers[:MaxLayers])
	require.NoError(t, err)
	i := 0
	for s := range x.All() {
		require.Equal(t, i, s.Layer)
		i++
	}
	require.Equal(t, MaxLayers, i)
}

func TestVirtualSize(t *testing.T) {
	layer := func(n uint64) *Layer { return &Layer{ht: header{virtualSize: n}} }
	require.EqualValues(t, 0, VirtualSize(nil))
	require.EqualValues(t, 0, VirtualSize([]*Layer{layer(0)}))
	require.EqualValues(t, 4096, VirtualSize([]*Layer{layer(8192), layer(4096), layer(0)}))
}

// TestSkewedIndex looks up where nearly all entries share a bucket.
func TestSkewedIndex(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 1000, 5000} {
		for _, far := range []uint64{0, 1 << 20, 1 << 49} {
			var ents []entry
			for i := range n {
				ents = append(ents, newEntry(uint64(i)*3, 2, 8, false))
			}
			if far > 0 {
				ents = append(ents, newEntry(far, 1, 8, false))
			}
			x := newIndex(ents)
			checkIndex(t, x)
			for i := range n {
				require.Equal(t, i+1, x.seek(uint64(i)*3+2), "the gap behind entry %d", i)
			}
		}
	}
}

func TestLookupAllocates(t *testing.T) {
	x := benchIndex(1000)
	dst := make([]Segment, 0, 4096)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		dst = x.Lookup(dst[:0], 0, 1<<22)
	}))
	w, err := CreateSparse(newFile(t), &WritableOptions{VirtualSize: 1 << 20})
	require.NoError(t, err)
	defer w.Close()
	p := make([]byte, 4096)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		_, err = w.WriteAt(p, 8192)
		dst = w.Lookup(dst[:0], 0, 1<<20)
		_, err = w.ReadAt(p, 8192)
	}))
	require.NoError(t, err)
}

func TestLookupOutside(t *testing.T) {
	x := newIndex([]entry{newEntry(8, 8, 8, false)})
	require.Empty(t, x.Lookup(nil, -1, 10))
	require.Empty(t, x.Lookup(nil, 0, 0))
	require.Empty(t, x.Lookup(nil, 0, -5))
	require.Equal(t, []Segment{{Off: 1 << 61, Len: 10, Layer: -1}}, x.Lookup(nil, 1<<61, 10))
	// Any alignment will do.
	require.Equal(t, []Segment{
		{Off: 4095, Len: 1, Layer: -1},
		{Off: 4096, Len: 9, Kind: Data, LayerOff: 4096},
	}, x.Lookup(nil, 4095, 10))
	require.Equal(t, []Segment{{Off: 4100, Len: 2, Kind: Data, LayerOff: 4100}}, x.Lookup(nil, 4100, 2))
}

func TestWritableRejects(t *testing.T) {
	w, err := CreateSparse(newFile(t), &WritableOptions{VirtualSize: 8192})
	require.NoError(t, err)
	sector := make([]byte, SectorSize)
	_, err = w.WriteAt(sector[:100], 0)
	require.ErrorIs(t, err, unix.EINVAL)
	require.EqualError(t, err, "write 100 bytes at 0: not a whole number of 512-byte sectors: invalid argument")
	_, err = w.ReadAt(sector, 1)
	require.ErrorIs(t, err, unix.EINVAL)
	require.ErrorIs(t, w.Discard(-512, 512), unix.EINVAL)
	_, err = w.WriteAt(sector, 8192)
	require.ErrorContains(t, err, "beyond the end of the device of 8192 bytes")
	_, err = w.ReadAt(sector, 8192)
	require.Equal(t, io.EOF, err)
	n, err := w.ReadAt(make([]byte, 1024), 8192-512)
	require.Equal(t, 512, n)
	require.Equal(t, io.EOF, err)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, w.Commit(ctx, io.Discard, CommitOptions{}), context.Canceled)
	require.ErrorIs(t, w.Commit(context.Background(), failingWriter{}, CommitOptions{}), unix.ENOSPC)
	err = w.Commit(context.Background(), io.Discard, CommitOptions{Message: string(make([]byte, 257))})
	require.ErrorContains(t, err, "message of 257 bytes")
	err = w.Commit(context.Background(), io.Discard, CommitOptions{UUID: "not a uuid"})
	require.ErrorContains(t, err, `uuid "not a uuid"`)
	err = w.Commit(context.Background(), io.Discard, CommitOptions{ParentUUID: "11111111-2222-3333-4444-55555555555g"})
	require.ErrorContains(t, err, "parent: uuid")

	require.NoError(t, w.Close())
	require.NoError(t, w.Close())
	_, err = w.WriteAt(sector, 0)
	require.ErrorIs(t, err, os.ErrClosed)
	_, err = w.ReadAt(sector, 0)
	require.ErrorIs(t, err, os.ErrClosed)
	require.ErrorIs(t, w.Sync(), os.ErrClosed)
	require.ErrorIs(t, w.Seal(), os.ErrClosed)
	require.ErrorIs(t, w.Commit(context.Background(), io.Discard, CommitOptions{}), os.ErrClosed)
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestCreateRejects(t *testing.T) {
	_, err := CreateSparse(fileOf(t, []byte("precious")), nil)
	require.ErrorIs(t, err, os.ErrExist)
	_, err = CreateAppend(newFile(t), fileOf(t, []byte("precious")), nil)
	require.ErrorIs(t, err, os.ErrExist)
	_, err = CreateSparse(newFile(t), &WritableOptions{VirtualSize: 100})
	require.ErrorContains(t, err, "virtual size of 100 bytes")
	_, err = CreateSparse(newFile(t), &WritableOptions{UUID: "1"})
	require.ErrorContains(t, err, `uuid "1"`)
}

func TestOpenRejects(t *testing.T) {
	committed, _, data, log := seedLayers(t)
	sparse, err := CreateSparse(newFile(t), &WritableOptions{VirtualSize: 1 << 20})
	require.NoError(t, err)
	sparseData := fileBytes(t, sparse.data)
	require.NoError(t, sparse.Close())
	other := bytes.Clone(log)
	copy(other[56:], uuidA)
	for _, tc := range []struct {
		name, want string
		data, log  []byte
	}{
		{"empty", "read header", nil, log},
		{"committed", "not those of a writable data file", committed, log},
		{"sparse", "open it as such", sparseData, log},
		{"no log", "read header", data, nil},
		{"two data files", "not those of an index log", data, data},
		{"another layer's log", "not a pair", data, other},
		{"swapped", "not those of a writable data file", log, data},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := OpenAppend(memFile(t, tc.data), memFile(t, tc.log))
			require.ErrorContains(t, err, "open append-only layer: memory")
			require.ErrorContains(t, err, tc.want)
		})
	}
	_, err = OpenSparse(memFile(t, data), nil)
	require.ErrorContains(t, err, "not those of a sparse data file")
	_, err = OpenSparse(memFile(t, sparseData[:len(sparseData)-1]), nil)
	require.ErrorContains(t, err, "cut short")

	bad := newEntry(0, 1, 7, false).append(bytes.Clone(log))
	_, err = OpenAppend(memFile(t, data), memFile(t, bad))
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorContains(t, err, "record 13: data at sector 7, in the header")
}

// TestFullDisk lets writes fail in the middle: what failed is not there, and
// what comes after is not harmed.
func TestFullDisk(t *testing.T) {
	fd, fl := memFile(t, nil), memFile(t, nil)
	w, err := CreateAppend(fd, fl, &WritableOptions{VirtualSize: 1 << 20})
	require.NoError(t, err)
	_, err = w.WriteAt(pattern(0, 1024, 1), 0)
	require.NoError(t, err)
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fl.Fd()))
	require.NoError(t, err)
	defer ro.Close()
	w.log = ro // the record cannot be written
	_, err = w.WriteAt(pattern(0, 1024, 2), 0)
	require.ErrorContains(t, err, "write index record")
	require.Error(t, w.Discard(0, 512))
	w.log = fl
	_, err = w.WriteAt(pattern(4096, 1024, 3), 4096)
	require.NoError(t, err)

	want := make([]byte, 1<<20)
	copy(want, pattern(0, 1024, 1))
	copy(want[4096:], pattern(4096, 1024, 3))
	sameBytes(t, want, content(t, w), "content")
	w, err = OpenAppend(fd, fl)
	require.NoError(t, err)
	sameBytes(t, want, content(t, w), "reopened")
}

// TestDataLikeTrailer writes what looks like the trailer of this very layer at
// the end of the data: it must not be taken for sealed.
func TestDataLikeTrailer(t *testing.T) {
	fd, fl := memFile(t, nil), memFile(t, nil)
	w, err := CreateAppend(fd, fl, &WritableOptions{VirtualSize: 1 << 20, UUID: uuidA})
	require.NoError(t, err)
	h := w.hdr
	h.flags = flagData | flagSealed
	h.indexOffset = headerSpace
	_, err = w.WriteAt(h.append(nil), 0)
	require.NoError(t, err)
	w, err = OpenAppend(fd, fl)
	require.NoError(t, err)
	require.Equal(t, 1, w.Len())
}

// TestConcurrent lets writers, each in its own part of the device, readers,
// discards, syncs and commits run together. Odd and even sectors of a writer's
// block are written by one call, so that they are always equal.
func TestConcurrent(t *testing.T) {
	for _, sparse := range []bool{false, true} {
		t.Run(fmt.Sprintf("sparse=%v", sparse), func(t *testing.T) {
			const parts, part = 4, 64 << 10
			o := &WritableOptions{VirtualSize: parts * part}
			var w *Writable
			var err error
			if sparse {
				w, err = CreateSparse(memFile(t, nil), o)
			} else {
				w, err = CreateAppend(memFile(t, nil), memFile(t, nil), o)
			}
			require.NoError(t, err)
			defer w.Close()
			var g errgroup.Group
			for i := range int64(parts) {
				g.Go(func() error { return hammer(w, i*part, part, uint64(i)) })
			}
			g.Go(func() error {
				for range 20 {
					var b bytes.Buffer
					if err := errors.Join(w.Sync(), w.Commit(t.Context(), &b, CommitOptions{})); err != nil {
						return err
					}
					l, err := OpenLayer(bytes.NewReader(b.Bytes()), int64(b.Len()))
					if err != nil {
						return err
					}
					if _, err := flatten(l.Index(), []*Layer{l}, l.VirtualSize()); err != nil {
						return err
					}
				}
				return nil
			})
			require.NoError(t, g.Wait())
			sameBytes(t, content(t, w), device(t, openLayer(t, commit(t, w, CommitOptions{}))), "committed")
		})
	}
}

// hammer writes, discards and reads blocks in [off, off+n).
func hammer(w *Writable, off, n int64, seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 1))
	state := make([]byte, n/4096)
	got := make([]byte, 4096)
	for range 500 {
		i := r.IntN(len(state))
		at := off + int64(i)*4096
		fill := byte(r.IntN(5))
		var err error
		if fill == 0 {
			err = w.Discard(at, 4096)
		} else {
			_, err = w.WriteAt(bytes.Repeat([]byte{fill}, 4096), at)
		}
		if err != nil {
			return err
		}
		state[i] = fill
		i = r.IntN(len(state))
		if _, err := w.ReadAt(got, off+int64(i)*4096); err != nil {
			return err
		}
		if !bytes.Equal(got, bytes.Repeat([]byte{state[i]}, 4096)) {
			return fmt.Errorf("block %d of part at %d: not %d", i, off, state[i])
		}
	}
	return nil
}

// TestExtentMap compares the map with a slice through splits and joins of
// chunks.
func TestExtentMap(t *testing.T) {
	const sectors = 1 << 15
	r := rand.New(rand.NewPCG(3, 4))
	var m extentMap
	want := make([]int64, sectors) // 0: not mapped
	for i := range int64(12_000) {
		off := r.Int64N(sectors)
		n := min(1+r.Int64N(3), sectors-off)
		if r.IntN(200) == 0 {
			n = min(r.Int64N(4000)+1, sectors-off)
		}
		x := extent{off, n, 8 + i*10}
		if i%5 == 0 {
			x.moff = zeroAt(8 + i)
		}
		m.insert(x)
		for s := range n {
			want[off+s] = x.from(off + s).moff
		}
		if i%1000 != 0 {
			continue
		}
		got := make([]int64, sectors)
		all := m.all()
		require.Len(t, all, m.count)
		for _, x := range all {
			for s := x.off; s < x.end(); s++ {
				require.Zero(t, got[s])
				got[s] = x.from(s).moff
			}
		}
		require.Equal(t, want, got)
		for _, c := range m.chunks {
			require.Equal(t, c.first, c.ext[0].off)
			require.LessOrEqual(t, len(c.ext), maxChunk)
		}
	}
	require.Greater(t, len(m.chunks), 5)
}

func TestKindString(t *testing.T) {
	require.Equal(t, "hole zero data kind(9)", fmt.Sprint(Hole, Zero, Data, Kind(9)))
}
