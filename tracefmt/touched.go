package tracefmt

import (
	"slices"
	"sort"
)

// Touched remembers which bytes of each layer have been touched. The zero
// value remembers nothing. Adding costs O(log n) and moves at most a few
// kilobytes, whatever the order of the events.
type Touched struct {
	layers []spans
}

// Add appends to dst the parts of e that no event before it has touched, and
// remembers them. e.Layer is 0 to MaxLayers-1, e.Off+e.Len does not overflow;
// other events have no new parts.
func (t *Touched) Add(dst []Event, e Event) []Event {
	if e.Layer < 0 || e.Layer >= MaxLayers || e.Off < 0 || e.Len <= 0 || e.Off+e.Len < 0 {
		return dst
	}
	for len(t.layers) <= e.Layer {
		t.layers = append(t.layers, spans{})
	}
	return t.layers[e.Layer].add(dst, e)
}

// A span is the bytes [off, end).
type span struct{ off, end int64 }

// maxBlock is how many spans a block has before it is cut in two.
const maxBlock = 256

// spans is a set of bytes as sorted spans that neither overlap nor touch. They
// are kept in blocks, none empty, so that an insertion moves one block only.
type spans struct {
	blocks [][]span
}

// pos is a span's block and its place there.
type pos struct{ block, i int }

// find returns the first span that ends at or behind off, which may be one
// past the last.
func (s *spans) find(off int64) pos {
	b := sort.Search(len(s.blocks), func(i int) bool {
		blk := s.blocks[i]
		return blk[len(blk)-1].end >= off
	})
	if b == len(s.blocks) {
		return pos{b, 0}
	}
	blk := s.blocks[b]
	return pos{b, sort.Search(len(blk), func(i int) bool { return blk[i].end >= off })}
}

func (s *spans) next(p pos) pos {
	if p.i++; p.i == len(s.blocks[p.block]) {
		return pos{p.block + 1, 0}
	}
	return p
}

func (s *spans) add(dst []Event, e Event) []Event {
	in := span{e.Off, e.Off + e.Len}
	first := s.find(in.off)
	all, at, p := in, in.off, first
	for p.block < len(s.blocks) {
		old := s.blocks[p.block][p.i]
		if old.off > in.end {
			break
		}
		if old.off <= in.off && in.end <= old.end {
			return dst
		}
		dst = appendPart(dst, e, at, old.off)
		at = max(at, old.end)
		all = span{min(all.off, old.off), max(all.end, old.end)}
		p = s.next(p)
	}
	dst = appendPart(dst, e, at, in.end)
	s.replace(first, p, all)
	return dst
}

// appendPart appends the part [off, end) of e, if there is any.
func appendPart(dst []Event, e Event, off, end int64) []Event {
	end = min(end, e.Off+e.Len)
	if off >= end {
		return dst
	}
	if e.Path != "" {
		e.FileOff += off - e.Off
	}
	e.Off, e.Len = off, end-off
	return append(dst, e)
}

// replace puts v in the place of the spans [from, to).
func (s *spans) replace(from, to pos, v span) {
	if from.block == len(s.blocks) {
		s.push(v)
		return
	}
	if from.block == to.block {
		s.blocks[from.block] = slices.Replace(s.blocks[from.block], from.i, to.i, v)
		s.split(from.block)
		return
	}
	s.blocks[from.block] = append(s.blocks[from.block][:from.i], v)
	if to.block < len(s.blocks) {
		s.blocks[to.block] = slices.Delete(s.blocks[to.block], 0, to.i)
	}
	s.blocks = slices.Delete(s.blocks, from.block+1, to.block)
	s.split(from.block)
}

// push adds v behind all others.
func (s *spans) push(v span) {
	n := len(s.blocks)
	if n == 0 || len(s.blocks[n-1]) >= maxBlock {
		s.blocks = append(s.blocks, nil)
		n++
	}
	s.blocks[n-1] = append(s.blocks[n-1], v)
}

func (s *spans) split(b int) {
	blk := s.blocks[b]
	if len(blk) <= maxBlock {
		return
	}
	half := len(blk) / 2
	s.blocks = slices.Insert(s.blocks, b+1, slices.Clone(blk[half:]))
	s.blocks[b] = blk[:half:half]
}
