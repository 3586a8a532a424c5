package lsmt

import (
	"iter"
	"math"
	"math/bits"
)

// An Index tells which layer holds which range of the device. It is immutable
// and safe for concurrent use.
//
// Entries are packed into 16 bytes and sorted. Above them lies a table that
// divides the device into buckets of equal size, about as many as there are
// entries. A lookup reads its bucket, which says where to search among the
// entries and in how many halvings: few as a rule, log n where all entries
// crowd into few buckets. The number of halvings is the same for most buckets
// and no halving branches, so that the processor can work on several lookups
// at a time.
type Index struct {
	// ents ends with indexTail entries behind all others: room for the
	// shortest search in any index, and a stop for what walks along it.
	ents []entry
	// top[b] is the search for sectors in [b<<shift, (b+1)<<shift):
	// start << 8 | halvings.
	top   []uint32
	shift uint8
}

// A search has 3, 6, 9, ... halvings.
const (
	searchStep = 3
	indexTail  = 1<<searchStep - 1
)

// newIndex makes an index of sorted entries.
func newIndex(ents []entry) *Index {
	n := len(ents)
	x := &Index{ents: make([]entry, n+indexTail)}
	copy(x.ents, ents)
	for i := range indexTail {
		x.ents[n+i].key = math.MaxUint64
	}
	last := uint64(0)
	if n > 0 {
		last = ents[n-1].off()
	}
	if s := bits.Len64(last) - bits.Len(uint(n)); s > 0 {
		x.shift = uint8(s)
	}
	x.top = make([]uint32, last>>x.shift+1)
	i := 0
	for b := range x.top {
		from := i
		for i < n && ents[i].off()>>x.shift == uint64(b) {
			i++
		}
		x.top[b] = x.search(from, i-from)
	}
	return x
}

// search encodes a search among n entries at position from. It may as well
// begin earlier and end later: those entries are not in the bucket and are
// found to be before or behind the sector.
func (x *Index) search(from, n int) uint32 {
	k := max(1, (bits.Len(uint(n))+searchStep-1)/searchStep) * searchStep
	return uint32(min(from, len(x.ents)-x.window(k)))<<8 | uint32(k)
}

// window is how many entries a search with k halvings covers.
func (x *Index) window(k int) int { return min(1<<k-1, len(x.ents)) }

// Len is the number of mapped segments.
func (x *Index) Len() int { return len(x.ents) - indexTail }

// entries are the packed segments.
func (x *Index) entries() []entry { return x.ents[:len(x.ents)-indexTail] }

// All yields the mapped segments, Zero and Data, in order of their offset, as
// they are stored: a long run may come in several parts.
func (x *Index) All() iter.Seq[Segment] {
	return func(yield func(Segment) bool) {
		for _, e := range x.entries() {
			if !yield(e.segment()) {
				return
			}
		}
	}
}

// seek returns the position of the first entry that ends behind sector s.
func (x *Index) seek(s uint64) int {
	t := x.top[min(s>>x.shift, uint64(len(x.top)-1))]
	ents, want := x.ents[t>>8:], s<<lengthBits|maxLength
	i := 0 // of the entries so far, so many begin at or before s
	for n := x.window(int(t & 31)); n > 0; {
		half := (n + 1) >> 1
		n -= half
		_, behind := bits.Sub64(want, ents[i+half-1].key, 0)
		i += half & (int(behind) - 1)
	}
	i += int(t >> 8)
	if i > 0 && x.ents[i-1].end() > s {
		i--
	}
	return i
}

// Lookup appends to dst the segments that cover exactly [off, off+n), in
// order, holes included, and returns it. Neighbours that continue each other
// are one segment. The range may have any alignment and may lie beyond the end
// of the device, where all is hole; negative offsets and empty ranges give
// nothing. It does not allocate if dst has the capacity.
func (x *Index) Lookup(dst []Segment, off, n int64) []Segment {
	if off < 0 || n <= 0 || off >= maxSize {
		return appendHole(dst, off, n)
	}
	end := off + min(n, maxSize-off)
	beyond := n - (end - off)
	base := len(dst)
	for i := x.seek(uint64(off) / SectorSize); off < end; i++ {
		s := x.ents[i].segment()
		if s.Off >= end {
			break
		}
		if s.Off > off {
			dst = append(dst, Segment{Off: off, Len: s.Off - off, Layer: -1})
			off = s.Off
		}
		s.clip(off, end)
		off += s.Len
		dst = appendSegment(dst, base, s)
	}
	return appendHole(dst, off, end-off+beyond)
}

// clip cuts s to what lies in [from, end).
func (s *Segment) clip(from, end int64) {
	if d := from - s.Off; d > 0 {
		s.Off += d
		s.Len -= d
		if s.Kind == Data {
			s.LayerOff += d
		}
	}
	s.Len = min(s.Len, end-s.Off)
}

// appendSegment appends s to dst, or makes the last segment longer if that is
// at base or behind and s continues it.
func appendSegment(dst []Segment, base int, s Segment) []Segment {
	if len(dst) > base && s.follows(&dst[len(dst)-1]) {
		dst[len(dst)-1].Len += s.Len
		return dst
	}
	return append(dst, s)
}

// appendHole appends a hole to dst unless it is empty.
func appendHole(dst []Segment, off, n int64) []Segment {
	if off < 0 || n <= 0 {
		return dst
	}
	return append(dst, Segment{Off: off, Len: n, Layer: -1})
}
