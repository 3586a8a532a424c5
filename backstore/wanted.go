package backstore

import "sync/atomic"

// bareBlock stands for the block of a layer that is not compressed, in bytes.
const bareBlock = 4096

// blocksRead are the blocks of a blob's compression that demand has read in
// this process, and how much of what background fetches had brought that was.
// A block that nobody asked for is waste, also where a chunk or a gap brings it
// along with others.
type blocksRead struct {
	set   atomic.Pointer[bitset] // nil before the first read
	ahead atomic.Int64           // bytes of the blob
}

// of returns the set for n blocks.
func (r *blocksRead) of(n int64) bitset {
	if s := r.set.Load(); s != nil {
		return *s
	}
	s := newBitset(n)
	r.set.CompareAndSwap(nil, &s)
	return *r.set.Load()
}

// noteRead notes a demand read of [off, off+n) of layer space, whose bytes are
// here, n at least 1.
func (l *layer) noteRead(off, n int64) {
	size := int64(bareBlock)
	if l.z != nil {
		size = int64(l.z.Info().BlockSize)
	}
	blocks := (l.info.Decoded + size - 1) / size
	read := l.blob.read.of(blocks)
	from, to := off/size, min((off+n-1)/size+1, blocks)
	for i := read.next(from, to, false); i < to; i = read.next(i+1, to, false) {
		if read.addAll(i, i+1) == 0 {
			continue // another read was faster
		}
		bo, bn := l.blobRange(i*size, min(size, l.info.Decoded-i*size))
		l.blob.read.ahead.Add(l.blob.prefetched(bo, bn))
	}
}

// prefetched is how many bytes of [off, off+n) background fetches have brought.
func (b *Blob) prefetched(off, n int64) (sum int64) {
	from, to := b.chunksOf(off, n)
	to = min(to, b.chunks)
	for c := b.ahead.next(from, to, true); c < to; c = b.ahead.next(c+1, to, true) {
		sum += min(off+n, (c+1)*b.chunk) - max(off, c*b.chunk)
	}
	return sum
}
