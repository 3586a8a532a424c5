package zfile

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

// Blocks are where they are wanted, and nothing is written anywhere else but in
// the slack of a place.
func TestReadBlocks(t *testing.T) {
	content := mixed(5, 3<<20+123)
	for _, algo := range []Algo{LZ4, Zstd} {
		for _, bs := range []int{4 << 10, 16 << 10, 64 << 10} {
			t.Run(fmt.Sprintf("%s/%d", algo, bs), func(t *testing.T) {
				src := &counter{r: bytes.NewReader(compress(t, content, &Options{Algo: algo, BlockSize: bs}))}
				r, err := Open(src, int64(src.r.(*bytes.Reader).Len()))
				if err != nil {
					t.Fatal(err)
				}
				rnd := rand.New(rand.NewPCG(6, uint64(bs)))
				for range 50 {
					n := 1 + rnd.IntN(min(12, r.Info().Blocks))
					readBlocks(t, r, src, content, rnd, rnd.IntN(r.Info().Blocks-n+1), n)
				}
				readBlocks(t, r, src, content, rnd, r.Info().Blocks-1, 1)
			})
		}
	}
}

func readBlocks(t *testing.T, r *Reader, src *counter, content []byte, rnd *rand.Rand, first, n int) {
	t.Helper()
	const guard = 64
	dst := make([][]byte, n)
	bufs := make([][]byte, n)
	wanted := 0
	for i := range dst {
		if rnd.IntN(3) == 0 {
			continue
		}
		want := r.info.blockLen(first + i)
		room := want + []int{0, 1, Slack, Slack + 7}[rnd.IntN(4)]
		bufs[i] = bytes.Repeat([]byte{0xee}, room+guard)
		dst[i] = bufs[i][:room]
		wanted++
	}
	src.reads = nil
	if err := r.ReadBlocks(first, dst); err != nil {
		t.Fatal(err)
	}
	if len(src.reads) != min(wanted, 1) {
		t.Errorf("%d reads of the blob for %d blocks", len(src.reads), wanted)
	}
	for i, b := range bufs {
		if b == nil {
			continue
		}
		want := content[(first+i)<<r.shift:][:r.info.blockLen(first+i)]
		if !bytes.Equal(b[:len(want)], want) {
			t.Errorf("block %d differs", first+i)
		}
		if !bytes.Equal(b[len(dst[i]):], bytes.Repeat([]byte{0xee}, guard)) {
			t.Errorf("block %d: written behind its place", first+i)
		}
	}
}

// Places that follow each other may be each other's slack.
func TestReadBlocksSideBySide(t *testing.T) {
	content := mixed(7, 1<<20)
	r := open(t, compress(t, content, &Options{Algo: Zstd, BlockSize: 16 << 10}))
	p := make([]byte, 8*16<<10)
	dst := make([][]byte, 8)
	for i := range dst {
		dst[i] = p[i*16<<10 : min((i+1)*16<<10+Slack, len(p))]
	}
	if err := r.ReadBlocks(3, dst); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, content[3*16<<10:][:len(p)]) {
		t.Error("blocks differ")
	}
}

func TestReadBlocksErrors(t *testing.T) {
	blob := compress(t, mixed(8, 1<<20), &Options{BlockSize: 16 << 10})
	r := open(t, blob)
	for _, bad := range []struct{ first, n int }{{-1, 1}, {r.Info().Blocks, 1}, {0, r.Info().Blocks + 1}, {1 << 62, 1}} {
		if err := r.ReadBlocks(bad.first, make([][]byte, bad.n)); err == nil {
			t.Errorf("blocks [%d, +%d) were read", bad.first, bad.n)
		}
	}
	if err := r.ReadBlocks(5, make([][]byte, 3)); err != nil { // none of which is wanted
		t.Error(err)
	}
	blob[r.starts.at(6)+7] ^= 1
	dst := [][]byte{make([]byte, 16<<10), make([]byte, 16<<10)}
	err := r.ReadBlocks(5, dst)
	var bad *CorruptError
	if !errors.As(err, &bad) || bad.Off != r.starts.at(6) {
		t.Errorf("a bad block gives %v", err)
	}
	if err := r.ReadBlocks(5, [][]byte{dst[0], nil, dst[1]}); err != nil {
		t.Errorf("a bad block that is not wanted gives %v", err)
	}
}

func TestReadBlocksDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget")
	}
	for _, algo := range []Algo{LZ4, Zstd} {
		r := open(t, compress(t, mixed(9, 1<<20), &Options{Algo: algo, BlockSize: 16 << 10}))
		dst := [][]byte{make([]byte, 16<<10+Slack), nil, make([]byte, 16<<10)}
		if n := testing.AllocsPerRun(200, func() {
			if err := r.ReadBlocks(2, dst); err != nil {
				t.Fatal(err)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations", algo, n)
		}
	}
}
