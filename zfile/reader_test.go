package zfile

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
)

// raceEnabled: the race detector makes sync.Pool forget, so that allocations
// cannot be counted.
var raceEnabled bool

// mixed returns n bytes that compress unevenly: zeros, text, noise.
func mixed(seed uint64, n int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+16<<10)
	for len(b) < n {
		run := 1 + rnd.IntN(12<<10)
		switch rnd.IntN(4) {
		case 0:
			b = append(b, make([]byte, run)...)
		case 1:
			for range run / 8 {
				b = binary.BigEndian.AppendUint64(b, rnd.Uint64())
			}
		default:
			for range run / 8 {
				b = fmt.Appendf(b, "%d word ", rnd.IntN(50))
			}
		}
	}
	return b[:n]
}

func TestReadRanges(t *testing.T) {
	content := mixed(1, 5<<20+123)
	for _, algo := range []Algo{LZ4, Zstd} {
		for _, bs := range []int{4 << 10, 32 << 10} {
			t.Run(fmt.Sprintf("%s/%d", algo, bs), func(t *testing.T) {
				r := open(t, compress(t, content, &Options{Algo: algo, BlockSize: bs, Tar: true}))
				size := int64(len(content))
				ranges := []span{
					{0, 1}, {0, size}, {1, size - 1}, {0, size + 1}, {size - 1, 1}, {size - 1, 2},
					{size, 1}, {size + 1, 1}, {4095, 2}, {4096, 4096}, {4095, 4098}, {512, 4096}, {size - 123, 123},
					{0, 0}, {size, 0}, {size + 5, 0},
				}
				rnd := rand.New(rand.NewPCG(2, 2))
				for range 100 {
					ranges = append(ranges, span{rnd.Int64N(size), 1 + rnd.Int64N(1<<(1+rnd.IntN(22)))})
				}
				for _, s := range ranges {
					checkRead(t, r, content, s)
				}
			})
		}
	}
}

// checkRead holds a ReadAt to io.ReaderAt's contract.
func checkRead(t *testing.T, r *Reader, content []byte, s span) {
	t.Helper()
	const guard = 64
	buf := bytes.Repeat([]byte{0xee}, int(s.n)+guard)
	n, err := r.ReadAt(buf[:s.n], s.off)
	want := content[min(s.off, int64(len(content))):min(s.off+s.n, int64(len(content)))]
	if !bytes.Equal(buf[:n], want) {
		t.Errorf("read %v gives %d bytes that differ", s, n)
	}
	if wantErr := int64(n) < s.n; wantErr != (errors.Is(err, io.EOF)) || !wantErr && err != nil {
		t.Errorf("read %v: %d bytes, %v", s, n, err)
	}
	if !bytes.Equal(buf[s.n:], bytes.Repeat([]byte{0xee}, guard)) {
		t.Errorf("read %v writes behind its buffer", s)
	}
}

func TestReadNegative(t *testing.T) {
	r := open(t, compress(t, []byte("x"), nil))
	if _, err := r.ReadAt(make([]byte, 1), -1); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("error is %v", err)
	}
}

// TestReadRuns: neighbouring blocks cost one read of the blob, in bounded runs,
// and never more than the blocks that are wanted.
func TestReadRuns(t *testing.T) {
	content := mixed(3, 8<<20)
	blob := compress(t, content, nil)
	src := &counter{r: bytes.NewReader(blob)}
	r, err := Open(src, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []span{{0, 4096}, {100, 4096}, {4096, 128 << 10}, {5000, 1 << 20}, {0, 8 << 20}} {
		src.reads = nil
		if _, err := r.ReadAt(make([]byte, s.n), s.off); err != nil {
			t.Fatal(err)
		}
		off, n := r.CompressedRange(s.off, s.n)
		if s.n < 2*minPart && len(src.reads) != 1 || len(src.reads) > int(n/minPart)+1 {
			t.Errorf("%v: %d reads of %d bytes", s, len(src.reads), n)
		}
		// A large read is shared out, so that order is left open.
		slices.SortFunc(src.reads, func(a, b span) int { return cmp.Compare(a.off, b.off) })
		for _, got := range src.reads {
			if got.off != off || got.n > largeRun {
				t.Errorf("%v: read %v, want it at %d", s, got, off)
			}
			off += got.n
			n -= got.n
		}
		if n != 0 {
			t.Errorf("%v: %d bytes not read", s, n)
		}
	}
}

func TestCompressedRange(t *testing.T) {
	content := mixed(4, 10*4096+100)
	blob := compress(t, content, &Options{Tar: true})
	r := open(t, blob)
	f := r.Info()
	var starts []int64
	pos := f.Base + headerSize
	for i := range f.Blocks + 1 {
		starts = append(starts, pos)
		if i < f.Blocks {
			pos += int64(binary.LittleEndian.Uint32(blob[f.IndexOffset+4*int64(i):]))
		}
	}
	size := f.Size
	for _, c := range []struct {
		off, n     int64
		first, end int
	}{
		{0, 1, 0, 1}, {0, 4096, 0, 1}, {0, 4097, 0, 2}, {4095, 2, 0, 2}, {4096, 4096, 1, 2},
		{0, size, 0, 11}, {0, size + 1, 0, 11}, {-5, 4096, 0, 1}, {size - 1, 1, 10, 11}, {size - 1, 1 << 62, 10, 11},
		{0, 0, 0, 0}, {8192, 0, 2, 2}, {8192, -1, 2, 2},
	} {
		off, n := r.CompressedRange(c.off, c.n)
		if off != starts[c.first] || n != starts[c.end]-starts[c.first] {
			t.Errorf("(%d, %d) is (%d, %d), want (%d, %d)", c.off, c.n, off, n, starts[c.first], starts[c.end]-starts[c.first])
		}
	}
	if _, n := r.CompressedRange(size, 1); n != 0 {
		t.Errorf("range of %d bytes behind the end", n)
	}
	if off, n := r.CompressedRange(0, size); off+n != f.IndexOffset {
		t.Errorf("blocks end at %d, index is at %d", off+n, f.IndexOffset)
	}
}

func TestReadAllocs(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget")
	}
	content := mixed(5, 4<<20)
	for _, algo := range []Algo{LZ4, Zstd} {
		for _, bs := range []int{4 << 10, 32 << 10} {
			r := open(t, compress(t, content, &Options{Algo: algo, BlockSize: bs}))
			for _, n := range []int{4 << 10, 128 << 10} {
				rnd := rand.New(rand.NewPCG(6, 6))
				p := make([]byte, n)
				got := testing.AllocsPerRun(200, func() {
					off := rnd.Int64N(int64(len(content)-n)) &^ 511
					if _, err := r.ReadAt(p, off); err != nil {
						t.Fatal(err)
					}
				})
				if got != 0 {
					t.Errorf("%s, blocks of %d: %v allocations for each read of %d", algo, bs, got, n)
				}
			}
		}
	}
}

func TestReadConcurrently(t *testing.T) {
	content := mixed(7, 3<<20)
	for _, algo := range []Algo{LZ4, Zstd} {
		r := open(t, compress(t, content, &Options{Algo: algo, BlockSize: 16 << 10}))
		var wg sync.WaitGroup
		for g := range 8 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(8, uint64(g)))
				p := make([]byte, 300<<10)
				for range 100 {
					off := rnd.IntN(len(content))
					n := min(1+rnd.IntN(len(p)), len(content)-off)
					if _, err := r.ReadAt(p[:n], int64(off)); err != nil {
						t.Error(err)
					} else if !bytes.Equal(p[:n], content[off:off+n]) {
						t.Errorf("read of %d at %d differs", n, off)
					}
				}
			})
		}
		wg.Wait()
	}
}

// TestOpenReads counts what Open reads of a blob.
func TestOpenReads(t *testing.T) {
	content := mixed(9, 600<<10)
	zeros := make([]byte, 70<<20)
	bare := compress(t, content, nil)
	stream := compress(t, content, &Options{Stream: true})
	pax := tar.Header{Name: "x", PAXRecords: map[string]string{"a.b": strings.Repeat("c", 600)}}
	damaged := bytes.Clone(bare)
	damaged[len(damaged)-100]++
	for _, c := range []struct {
		name  string
		blob  []byte
		reads int
		head  bool
	}{
		{"bare", bare, 1, false},
		{"stream", stream, 1, false},
		{"tar", compress(t, content, &Options{Tar: true}), 1, false},
		{"ustar", tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, stream), 1, false},
		{"followed by a small member", append(compress(t, content, &Options{Tar: true}), make([]byte, 20<<10)...), 3, true},
		{"index longer than the tail", compress(t, zeros, &Options{Tar: true}), 2, false},
		{"unusual tar header", tarOf(t, pax, bare), 2, true},
		{"damaged trailer, good header", damaged, 2, true},
		{"followed by much", append(compress(t, content, &Options{Tar: true}), make([]byte, 200<<10)...), 3, true},
		{"followed by much, no good header", append(tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, stream), make([]byte, 200<<10)...), 4, true},
	} {
		src := &counter{r: bytes.NewReader(c.blob)}
		r, err := Open(src, int64(len(c.blob)))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		head := false
		for _, s := range src.reads {
			head = head || s.off == 0 && s.n < int64(len(c.blob))
		}
		if len(src.reads) != c.reads || head != c.head {
			t.Errorf("%s: reads %v of %d, want %d", c.name, src.reads, len(c.blob), c.reads)
		}
		want := content
		if r.Size() == int64(len(zeros)) {
			want = zeros
		}
		if got, err := readAll(r); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: content differs, %v", c.name, err)
		}
	}
}

func TestOpenRejects(t *testing.T) {
	z := compress(t, mixed(10, 100<<10), nil)
	other := compress(t, mixed(10, 100<<10), &Options{Stream: true})
	edit := func(b []byte, f func(b []byte)) []byte {
		b = bytes.Clone(b)
		f(b)
		return b
	}
	reseal := func(b []byte, off int, f func(h []byte)) {
		h := b[off:][:headerSize]
		f(h)
		binary.LittleEndian.PutUint32(h[offDigest:], digest(h))
	}
	for _, c := range []struct {
		name string
		blob []byte
		want string
	}{
		{"empty", nil, "no ZFile here"},
		{"zeros", make([]byte, 10000), "no ZFile here"},
		{"text", bytes.Repeat([]byte("text"), 10000), "no ZFile here"},
		{"header only", z[:headerSize], "no ZFile here"},
		{"cut in the blocks", z[:10000], "corrupt header"},
		{"stream cut in the blocks", other[:10000], "corrupt trailer"},
		{"both headers damaged", edit(z, func(b []byte) { b[100]++; b[len(b)-100]++ }), "digest"},
		{"index damaged", edit(z, func(b []byte) { b[len(b)-headerSize-1]++ }), "corrupt index"},
		{"unknown compression", edit(other, func(b []byte) {
			for _, off := range []int{0, len(b) - headerSize} {
				reseal(b, off, func(h []byte) { h[offAlgo] = 7 })
			}
		}), "compression 7: unsupported operation"},
		{"index elsewhere", edit(other, func(b []byte) {
			reseal(b, len(b)-headerSize, func(h []byte) { h[offIndexOffset]++ })
		}), "corrupt trailer"},
	} {
		r, err := Open(bytes.NewReader(c.blob), int64(len(c.blob)))
		if r != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want %q", c.name, err, c.want)
		}
		if got, want := errors.Is(err, ErrNotZFile), strings.HasPrefix(c.want, "no ZFile"); got != want {
			t.Errorf("%s: is ErrNotZFile: %v", c.name, got)
		}
	}
}

// TestTruncated cuts a blob at every byte.
func TestTruncated(t *testing.T) {
	content := mixed(11, 6000)
	for _, o := range []*Options{{}, {Tar: true}, {Stream: true, NoVerify: true}, {Algo: Zstd, Tar: true}} {
		blob := compress(t, content, o)
		end := open(t, blob).Info().Base + open(t, blob).Info().Length
		for n := range blob {
			r, err := Open(bytes.NewReader(blob[:n]), int64(n))
			if int64(n) < end {
				if err == nil {
					t.Fatalf("%+v: opens with %d of %d bytes", *o, n, len(blob))
				}
				continue
			}
			if err != nil {
				t.Fatalf("%+v: does not open without the end of its wrapper: %v", *o, err)
			}
			if got, err := readAll(r); err != nil || !bytes.Equal(got, content) {
				t.Fatalf("%+v: content differs, %v", *o, err)
			}
		}
	}
}

// TestFlipped changes every byte of a blob. The content may not change silently,
// Verify finds it in the ZFile, and a fault in a block names the block.
func TestFlipped(t *testing.T) {
	content := mixed(12, 5000)
	for _, o := range []*Options{{}, {Tar: true}, {Stream: true}, {Algo: Zstd, Tar: true}} {
		blob := compress(t, content, o)
		f := open(t, blob).Info()
		for i := range blob {
			bad := bytes.Clone(blob)
			bad[i] ^= 1 << (i % 8)
			err := verifyAll(t.Context(), bad, content)
			at := int64(i)
			inBlocks := at >= f.Base+headerSize && at < f.IndexOffset
			if err == nil && at >= f.Base && at < f.Base+f.Length {
				t.Errorf("%+v: byte %d: not found", *o, i)
			}
			if !inBlocks {
				continue
			}
			var c *CorruptError
			if !errors.As(err, &c) || at < c.Off || at >= c.Off+c.Len || !strings.HasPrefix(c.What, "block ") {
				t.Errorf("%+v: byte %d: error is %v", *o, i, err)
			}
		}
	}
}

// verifyAll opens, reads and verifies a blob, and fails on other content.
func verifyAll(ctx context.Context, blob, content []byte) error {
	r, err := Open(bytes.NewReader(blob), int64(len(blob)))
	if err != nil {
		return err
	}
	got, err := readAll(r)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, content) {
		panic("content changed silently")
	}
	return r.Verify(ctx)
}

// TestCorruptRead: what is read before a bad block is given, and other blocks
// stay readable. The read is large enough to be shared among processors.
func TestCorruptRead(t *testing.T) {
	content := mixed(13, 300*4096)
	for _, algo := range []Algo{LZ4, Zstd} {
		for _, noVerify := range []bool{false, true} {
			for _, bad := range []int{7, 150, 299} {
				blob := compress(t, content, &Options{Algo: algo, NoVerify: noVerify, Tar: true})
				testCorruptRead(t, content, blob, bad)
			}
		}
	}
}

func testCorruptRead(t *testing.T, content, blob []byte, bad int) {
	t.Helper()
	at := bad * 4096
	off, n := open(t, blob).CompressedRange(int64(at), 4096)
	for i := range n {
		blob[off+i] = 0xff
	}
	r := open(t, blob)
	what := fmt.Sprintf("block %d", bad)
	p := make([]byte, len(content))
	m, err := r.ReadAt(p, 0)
	var c *CorruptError
	if !errors.As(err, &c) || c.Off != off || c.Len != n || c.What != what {
		t.Errorf("%s: error is %v, want %s (%d bytes at %d)", r.Info().Algo, err, what, n, off)
	}
	if m != at || !bytes.Equal(p[:m], content[:m]) {
		t.Errorf("%s: %d good bytes, want %d", r.Info().Algo, m, at)
	}
	rest := p[at+4096:]
	if _, err := io.ReadFull(io.NewSectionReader(r, int64(at+4096), int64(len(rest))), rest); err != nil || !bytes.Equal(rest, content[at+4096:]) {
		t.Errorf("%s: rest: %v", r.Info().Algo, err)
	}
	if err := r.Verify(t.Context()); !errors.As(err, &c) || c.What != what {
		t.Errorf("%s: Verify: %v", r.Info().Algo, err)
	}
}

// TestWrongLength: a block that decodes well, but to another length.
func TestWrongLength(t *testing.T) {
	for _, algo := range []Algo{LZ4, Zstd} {
		long := compress(t, make([]byte, 4096), &Options{Algo: algo, Stream: true})
		for _, size := range []byte{0x01, 0xff} { // 4096 - 255, 4096 - 1
			blob := bytes.Clone(long)
			h := blob[len(blob)-headerSize:]
			copy(h[offOriginalSize:], []byte{size, 0x0f})
			binary.LittleEndian.PutUint32(h[offDigest:], digest(h))
			_, err := readAll(open(t, blob))
			var c *CorruptError
			if !errors.As(err, &c) || c.What != "block 0" {
				t.Errorf("%s: error is %v", algo, err)
			}
		}
	}
}

// failing fails reads that touch a byte.
type failing struct {
	io.ReaderAt
	at  int64
	err error
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if off <= f.at && f.at < off+int64(len(p)) {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(p, off)
}

// TestReadError passes on what the blob's reader returns.
func TestReadError(t *testing.T) {
	content := mixed(14, 1<<20)
	blob := compress(t, content, &Options{Tar: true})
	f := open(t, blob).Info()
	want := errors.New("link is down")
	src := &failing{bytes.NewReader(blob), f.Base + 5000, want}
	r, err := Open(src, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadAt(make([]byte, 1<<20), 0); !errors.Is(err, want) {
		t.Errorf("read: %v", err)
	}
	if err := r.Verify(t.Context()); !errors.Is(err, want) {
		t.Errorf("verify: %v", err)
	}
	src.at = f.IndexOffset
	if _, err := Open(src, int64(len(blob))); !errors.Is(err, want) {
		t.Errorf("open: %v", err)
	}
	// A blob that is shorter than it was said to be.
	if _, err := Open(bytes.NewReader(blob[:len(blob)-1]), int64(len(blob))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("open of a short blob: %v", err)
	}
}

func TestVerifyCancelled(t *testing.T) {
	r := open(t, compress(t, mixed(15, 4<<20), nil))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Verify(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

// TestVerifyMeta: parts that reading does not need, each with a good checksum of
// its own.
func TestVerifyMeta(t *testing.T) {
	blob := compress(t, mixed(16, 50000), &Options{Tar: true})
	f := open(t, blob).Info()
	for _, c := range []struct {
		name string
		off  int64
		edit func(b []byte)
	}{
		{"corrupt tar header", 0, func(b []byte) { copy(b, wrapperHead(f.Length-1)) }},
		{"corrupt header", f.Base, func(h []byte) { h[offIndexCRC]++ }},
		{"corrupt header", f.Base, func(h []byte) { h[offVerify] = 0 }},
		{"corrupt header", f.Base, func(h []byte) { h[offFlags] = flagData | flagSealed | flagDigest }},
	} {
		bad := bytes.Clone(blob)
		b := bad[c.off:]
		c.edit(b)
		if c.off > 0 {
			binary.LittleEndian.PutUint32(b[offDigest:], digest(b))
		}
		if err := open(t, bad).Verify(t.Context()); err == nil || !strings.Contains(err.Error(), c.name) {
			t.Errorf("%s: error is %v", c.name, err)
		}
	}
}
