package backstore

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/zfile"
)

// raceEnabled: the race detector makes sync.Pool forget, so that allocations
// cannot be counted.
var raceEnabled bool

// stamp fills a block with what tells it from others.
func stamp(p []byte, k blockKey) {
	for i := 0; i+16 <= len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], k.blob)
		binary.LittleEndian.PutUint64(p[i+8:], uint64(k.block))
	}
}

// Whatever several readers do at the same time, a block that is there is the
// right one for as long as it is held, and there is never more memory than was
// allowed.
func TestDecodedModel(t *testing.T) {
	for _, limit := range []int64{frameBytes, 3*frameBytes + 5, 20 * frameBytes, 200 * frameBytes} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			d := newDecoded(limit)
			var wg sync.WaitGroup
			var kept atomic.Int64
			for g := range 6 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(g), 9))
					for range 1500 {
						if useDecoded(t, d, r) {
							kept.Add(1)
						}
						if got := d.figures().Bytes; got > limit {
							t.Errorf("%d bytes of %d", got, limit)
							return
						}
					}
				})
			}
			wg.Wait()
			require.Positive(t, kept.Load())
			require.Positive(t, d.figures().Hits)
			d.checkIdle(t)
			d.close()
			require.Zero(t, d.figures().Bytes)
		})
	}
}

// useDecoded does one thing at random; it reports whether a block was kept.
func useDecoded(t *testing.T, d *decoded, r *rand.Rand) bool {
	k := blockKey{blob: uint64(r.IntN(4)), block: r.IntN(60)}
	size := minKept << (k.blob & 3) // a blob has blocks of one size
	want := make([]byte, size)
	stamp(want, k)
	switch r.IntN(50) {
	case 0:
		d.drop(k.blob)
		return false
	case 1:
		d.sweep()
		return false
	}
	var s *slot
	if r.IntN(3) == 0 {
		if s = d.find(k); s == nil {
			return false
		}
	} else if s = d.claim(k, size); s == nil {
		return false
	}
	if !s.ready {
		stamp(s.mem[:size], k)
		if r.IntN(10) == 0 {
			d.settle(s, false)
			s.release()
			return false
		}
		d.settle(s, true)
	}
	if !bytes.Equal(s.mem[:size], want) {
		t.Errorf("block %v is another one", k)
	}
	s.release()
	return true
}

// checkIdle looks over a cache that nobody uses.
func (d *decoded) checkIdle(t *testing.T) {
	t.Helper()
	for i := range d.shards {
		sh := &d.shards[i]
		require.LessOrEqual(t, len(sh.frames), sh.max)
		for k, s := range sh.index {
			require.True(t, s.ready)
			require.Equal(t, k, s.key)
			require.Contains(t, sh.frames, s.f)
		}
		for _, f := range sh.frames {
			require.Zero(t, f.held.Load())
		}
	}
}

func TestDecodedLimits(t *testing.T) {
	require.Nil(t, newDecoded(-1))
	require.Nil(t, newDecoded(frameBytes-1))
	for _, frames := range []int64{1, 2, 15, 16, 31, 481, 10_000} {
		d, n := newDecoded(frames*frameBytes), 0
		for i := range d.shards {
			require.Positive(t, d.shards[i].max)
			n += d.shards[i].max
		}
		require.LessOrEqual(t, int64(n), frames)
		require.Greater(t, int64(n), frames*7/8-1)
	}
	var none *decoded
	none.sweep()
	none.drop(1)
	none.close()
	require.Zero(t, none.figures())
}

// A frame in use is not taken for another block; who finds no room goes without.
func TestDecodedWithoutRoom(t *testing.T) {
	d := newDecoded(frameBytes)
	a := d.claim(blockKey{1, 1}, 64<<10)
	require.NotNil(t, a)
	require.Nil(t, d.claim(blockKey{1, 2}, 64<<10))
	require.Nil(t, d.find(blockKey{1, 1}), "it is not decoded yet")
	d.settle(a, true)
	require.Nil(t, d.claim(blockKey{1, 2}, 64<<10), "it is still held")
	a.release()
	b := d.claim(blockKey{1, 2}, 64<<10)
	require.NotNil(t, b)
	require.Nil(t, d.find(blockKey{1, 1}))
	d.drop(1) // while it is being decoded
	d.settle(b, true)
	require.EqualValues(t, frameBytes, d.figures().Bytes)
	b.release()
	require.Nil(t, d.find(blockKey{1, 2}))
	d.sweep()
	require.Zero(t, d.figures().Bytes)
}

// Memory that nobody uses is given back, other memory is not.
func TestDecodedIdle(t *testing.T) {
	d := newDecoded(64 * frameBytes)
	for i := range 40 {
		s := d.claim(blockKey{1, i}, 64<<10)
		d.settle(s, true)
		s.release()
	}
	all := d.figures().Bytes
	for range idleSweeps {
		d.sweep()
		d.find(blockKey{1, 7}).release()
	}
	require.Equal(t, all, d.figures().Bytes)
	d.sweep()
	require.EqualValues(t, frameBytes, d.figures().Bytes)
	require.NotNil(t, d.find(blockKey{1, 7}))
}

// blocksImage is one layer of compressible content.
func blocksImage(t testing.TB, o *zfile.Options) *testImage {
	device := make([]byte, testDevice)
	r := rand.New(rand.NewPCG(5, 5))
	for i := range device {
		device[i] = byte(r.IntN(4))
	}
	return oneLayer(t, device, o)
}

var big = &zfile.Options{Algo: zfile.Zstd, BlockSize: 64 << 10}

// Every mixture of limit, codec and block size gives the same bytes.
func TestDecodedReads(t *testing.T) {
	for _, o := range []*zfile.Options{{}, {BlockSize: 8 << 10}, {Algo: zfile.Zstd, BlockSize: 16 << 10}, big, {BlockSize: 64 << 10, NoVerify: true}} {
		model := newTestImage(t, 3, o)
		for _, limit := range []int64{-1, frameBytes, 5 * frameBytes, DefaultDecodedBytes} {
			t.Run(fmt.Sprintf("%s/%d/%d", o.Algo, o.BlockSize, limit), func(t *testing.T) {
				c := openTestCache(t, t.TempDir(), CacheOptions{DecodedBytes: limit})
				im := model.open(t, c)
				var wg sync.WaitGroup
				for g := range 4 {
					wg.Go(func() {
						r := rand.New(rand.NewPCG(uint64(g), 2))
						for range 150 {
							off := r.Int64N(testDevice)
							n := min(1+r.Int64N(1<<(1+r.IntN(19))), testDevice-off)
							p := bytes.Repeat([]byte{0xee}, int(n)+zfile.Slack)
							_, err := im.ReadAt(p[:n], off)
							if err != nil || !bytes.Equal(p[:n], model.device[off:off+n]) {
								t.Errorf("read %d at %d: %v", n, off, err)
								return
							}
							if !bytes.Equal(p[n:], bytes.Repeat([]byte{0xee}, zfile.Slack)) {
								t.Errorf("read %d at %d: more was written", n, off)
								return
							}
						}
					})
				}
				wg.Wait()
				st := c.Decoded()
				require.LessOrEqual(t, st.Bytes, max(limit, 0))
				require.Equal(t, limit > 0 && o.BlockSize > 4096, st.Hits > 0)
			})
		}
	}
}

// Reads of 4 KiB next to each other, several at a time, decode each block once.
func TestNeighboursDecodeOnce(t *testing.T) {
	model := blocksImage(t, big)
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	im := model.open(t, c)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			p := make([]byte, 4096)
			for off := int64(0); off < 1<<20; off += 4096 {
				if _, err := im.ReadAt(p, off); err != nil || !bytes.Equal(p, model.device[off:off+4096]) {
					t.Errorf("read at %d: %v", off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	st := c.Decoded()
	require.LessOrEqual(t, st.Misses, int64(17)) // layer space begins with a header, so parts of 17
	require.EqualValues(t, 17*frameBytes, st.Bytes)
}

// A block that is wanted whole is not kept.
func TestWholeBlocksAreNotKept(t *testing.T) {
	model := blocksImage(t, big)
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	im := model.open(t, c)
	l := im.layers[0]
	p := make([]byte, 128<<10)
	for off := int64(0); off < 1<<20; off += int64(len(p)) {
		require.NoError(t, l.readFull(p, off))
	}
	require.Zero(t, c.Decoded())
	// Unless it is there already.
	require.NoError(t, l.readFull(p[:4096], 4096))
	require.NoError(t, l.readFull(p, 0))
	require.Equal(t, DecodedStats{Hits: 1, Misses: 1, Bytes: frameBytes}, c.Decoded())
}

// The blocks of a blob go with the last image that has it.
func TestDecodedBlocksGoWithTheImage(t *testing.T) {
	model := blocksImage(t, big)
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	a, b := model.open(t, c), model.open(t, c)
	p := make([]byte, 4096)
	for _, im := range []*Image{a, b} {
		_, err := im.ReadAt(p, 2<<20)
		require.NoError(t, err)
	}
	require.Equal(t, DecodedStats{Hits: 1, Misses: 1, Bytes: frameBytes}, c.Decoded())
	require.NoError(t, a.Close())
	require.NotZero(t, c.Decoded().Bytes)
	require.NoError(t, b.Close())
	require.Zero(t, c.Decoded().Bytes)
}

// A bad block is fetched again and is not kept before it is good.
func TestBadBlockIsNotKept(t *testing.T) {
	model := blocksImage(t, big)
	o, at := model.origins[0], int64(0)
	bad := 1
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	im := model.open(t, c)
	at, _ = im.BlobRange(0, 3<<20, 1)
	o.before = func(off, n int64, _ Lane) error {
		o.body = nil
		if off <= at && at+100 <= off+n && bad > 0 {
			bad--
			o.body = func(p []byte) io.Reader {
				p = bytes.Clone(p)
				p[at+50-off] ^= 1
				return bytes.NewReader(p)
			}
		}
		return nil
	}
	p := make([]byte, 4096)
	for range 2 {
		require.NoError(t, im.layers[0].readFull(p, 3<<20))
	}
	require.Zero(t, bad)
	require.EqualValues(t, 1, im.Stats().Corrupt)
	require.EqualValues(t, 1, c.Decoded().Hits)

	bad = attempts
	require.NoError(t, im.layers[0].readFull(p, 3<<20), "it is kept")
	im.layers[0].blob.Invalidate(0, im.layers[0].blob.size)
	require.NoError(t, im.layers[0].readFull(p, 3<<20), "still")
	c.decoded.drop(im.layers[0].blob.number)
	err := im.layers[0].readFull(p, 3<<20)
	var corrupt *zfile.CorruptError
	require.ErrorAs(t, err, &corrupt)
	c.decoded.sweep()
	require.Zero(t, c.Decoded().Bytes, "the place was given back")
	require.NoError(t, im.layers[0].readFull(p, 3<<20))
}

// What was decoded of a blob whose digest is wrong is forgotten.
func TestWrongDigestDropsDecodedBlocks(t *testing.T) {
	model := blocksImage(t, big)
	c := openTestCache(t, t.TempDir(), CacheOptions{})
	o := model.origins[0]
	b, err := c.Blob(digest.FromString("another"), int64(len(o.data)), o)
	require.NoError(t, err)
	im, err := OpenImage(t.Context(), []LayerSource{{Blob: b}})
	require.NoError(t, err)
	defer im.Close()
	_, err = im.ReadAt(make([]byte, 4096), 1<<20)
	require.NoError(t, err)
	require.NotZero(t, c.Decoded().Bytes)
	_, err = b.ensure(0, b.size, newPatience(0))
	require.NoError(t, err)
	require.ErrorIs(t, b.Verify(t.Context()), ErrDigest)
	require.Zero(t, c.Decoded().Bytes)
}

// A read of what is on the node allocates nothing: blocks that are kept, that
// are not, that displace others, and that are not kept at all.
func TestReadsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget")
	}
	for _, o := range []*zfile.Options{{}, {BlockSize: 16 << 10}, {Algo: zfile.Zstd, BlockSize: 16 << 10}, big} {
		model := blocksImage(t, o)
		for _, limit := range []int64{-1, 10 * frameBytes, DefaultDecodedBytes} {
			im := model.open(t, openTestCache(t, t.TempDir(), CacheOptions{DecodedBytes: limit}))
			require.NoError(t, im.Complete(t.Context(), nil))
			for _, n := range []int64{4 << 10, 128 << 10} {
				p := make([]byte, n)
				r := rand.New(rand.NewPCG(1, 1))
				read := func() {
					if _, err := im.ReadAt(p, r.Int64N((testDevice-n)>>12)<<12); err != nil {
						t.Fatal(err)
					}
				}
				for range 150 {
					read() // maps and frames grow
				}
				require.Zero(t, testing.AllocsPerRun(100, read), "%s %d, limit %d, read %d", o.Algo, o.BlockSize, limit, n)
			}
		}
	}
}
