package backstore

import (
	"sync"

	"github.com/reprise-project/reprise/zfile"
)

// maxKeptRead is the longest read that uses the decoded blocks; longer ones
// have little to gain.
const maxKeptRead = 256 << 10

// maxReadBlocks is how many blocks such a read touches.
const maxReadBlocks = maxKeptRead/minKept + 1

// decodedRead is a read of a layer by way of the decoded blocks: block first+i,
// where it is wanted whole and is not kept, is decoded to its place in p, and
// from slots[i] otherwise.
type decodedRead struct {
	l     *layer
	p     []byte
	off   int64
	first int
	n     int // blocks
	slots [maxReadBlocks]*slot
	dst   [maxReadBlocks][]byte
}

var decodedReads = sync.Pool{New: func() any { return new(decodedRead) }}

// readAt reads layer space. Blocks of which only a part is wanted are kept for
// the reads of the rest; a block that is wanted whole has been used up.
func (l *layer) readAt(p []byte, off int64) (int, error) {
	if !l.keepsDecoded() || len(p) == 0 || len(p) > maxKeptRead || off < 0 || off > l.info.Decoded-int64(len(p)) {
		return l.raw.ReadAt(p, off)
	}
	r := decodedReads.Get().(*decodedRead)
	r.l, r.p, r.off = l, p, off
	r.plan()
	err := r.decode()
	if err == nil {
		err = r.copy()
	}
	r.end()
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (l *layer) keepsDecoded() bool {
	return l.blob != nil && l.z != nil && l.blob.cache.decoded != nil && l.z.Info().BlockSize >= minKept
}

// block is number first+i: its range in layer space, and what of it is wanted.
func (r *decodedRead) block(i int) (start, end, from, to int64) {
	size := int64(r.l.z.Info().BlockSize)
	start = int64(r.first+i) * size
	end = min(start+size, r.l.info.Decoded)
	return start, end, max(start, r.off), min(end, r.off+int64(len(r.p)))
}

// plan finds the blocks that are kept and the places for those that are not.
func (r *decodedRead) plan() {
	d, size := r.l.blob.cache.decoded, int64(r.l.z.Info().BlockSize)
	r.first = int(r.off / size)
	r.n = int((r.off+int64(len(r.p))-1)/size) + 1 - r.first
	for i := range r.n {
		k := blockKey{r.l.blob.number, r.first + i}
		start, end, from, to := r.block(i)
		if from == start && to == end {
			if r.slots[i] = d.find(k); r.slots[i] == nil {
				r.dst[i] = r.p[from-r.off : min(to-r.off+zfile.Slack, int64(len(r.p)))]
			}
			continue
		}
		r.slots[i] = d.claim(k, int(size))
		if s := r.slots[i]; s != nil && !s.ready {
			r.dst[i] = s.mem
		}
	}
}

// decode decodes what is not kept.
func (r *decodedRead) decode() error {
	err := r.l.z.ReadBlocks(r.first, r.dst[:r.n])
	for i, s := range r.slots[:r.n] {
		if s != nil && r.dst[i] != nil {
			r.l.blob.cache.decoded.settle(s, err == nil)
		}
	}
	return err
}

// copy fills what decode has not: it comes after, since decode scribbles.
func (r *decodedRead) copy() error {
	for i, s := range r.slots[:r.n] {
		start, _, from, to := r.block(i)
		dst := r.p[from-r.off : to-r.off]
		switch {
		case s != nil:
			copy(dst, s.mem[from-start:])
		case r.dst[i] == nil: // there was no room to keep it
			if _, err := r.l.raw.ReadAt(dst, from); err != nil {
				return err
			}
		}
	}
	return nil
}

// end lets go of everything.
func (r *decodedRead) end() {
	for i, s := range r.slots[:r.n] {
		if s != nil {
			s.release()
		}
		r.slots[i], r.dst[i] = nil, nil
	}
	r.l, r.p = nil, nil
	decodedReads.Put(r)
}
