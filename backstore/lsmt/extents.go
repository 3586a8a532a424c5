package lsmt

import (
	"slices"
	"sort"
)

// An extent is a run of sectors of the device that a writable layer maps.
type extent struct {
	off, n int64
	// moff is the sector in the data file, or zeroAt of it.
	moff int64
}

// zeroAt marks an extent as zeros. The sector, where the next data were going
// when it was discarded, means nothing but is stored.
func zeroAt(sector int64) int64 { return ^sector }

func (e *extent) zero() bool { return e.moff < 0 }

// entry is the extent as an index entry; it must be short enough for one.
func (e *extent) entry() entry {
	if e.zero() {
		return newEntry(uint64(e.off), uint64(e.n), uint64(^e.moff), true)
	}
	return newEntry(uint64(e.off), uint64(e.n), uint64(e.moff), false)
}

func (e *extent) end() int64 { return e.off + e.n }

// upTo and from are the parts of e before and behind sector s.
func (e extent) upTo(s int64) extent {
	e.n = s - e.off
	return e
}

func (e extent) from(s int64) extent {
	if !e.zero() {
		e.moff += s - e.off
	}
	e.off, e.n = s, e.end()-s
	return e
}

// continues tells whether e can be one extent with p before it. Discards are
// kept apart: how they were cut is visible in a committed layer.
func (e *extent) continues(p *extent) bool {
	return p.end() == e.off && !e.zero() && !p.zero() &&
		p.moff+p.n == e.moff
}

// covers tells whether e says already what in says.
func (e *extent) covers(in *extent) bool {
	return !e.zero() && !in.zero() &&
		e.off <= in.off && in.end() <= e.end() && in.moff-in.off == e.moff-e.off
}

// segment is the extent in bytes.
func (e *extent) segment() Segment {
	s := Segment{Off: e.off * SectorSize, Len: e.n * SectorSize, Kind: Zero, Layer: -1}
	if !e.zero() {
		s.Kind = Data
		s.LayerOff = e.moff * SectorSize
	}
	return s
}

// extentMap is an ordered map of extents that do not overlap: a list of chunks
// of up to maxChunk extents. Inserting moves at most a chunk's extents and,
// rarely, the list of chunks, which at a million extents is a few thousand
// long. It is not safe for concurrent use.
type extentMap struct {
	chunks []chunk
	count  int
}

type chunk struct {
	first int64 // offset of ext[0]
	ext   []extent
}

const maxChunk = 256

// pos is a place in an extentMap; chunk == len(chunks) is the end.
type pos struct{ chunk, i int }

func (m *extentMap) at(p pos) *extent { return &m.chunks[p.chunk].ext[p.i] }

func (m *extentMap) atEnd(p pos) bool { return p.chunk == len(m.chunks) }

func (m *extentMap) next(p pos) pos {
	if p.i++; p.i == len(m.chunks[p.chunk].ext) {
		return pos{p.chunk + 1, 0}
	}
	return p
}

// prev is the place before p; ok is false at the beginning.
func (m *extentMap) prev(p pos) (_ pos, ok bool) {
	if p.i > 0 {
		return pos{p.chunk, p.i - 1}, true
	}
	if p.chunk == 0 {
		return p, false
	}
	return pos{p.chunk - 1, len(m.chunks[p.chunk-1].ext) - 1}, true
}

// seek returns the place of the first extent that ends behind sector s.
func (m *extentMap) seek(s int64) pos {
	c := sort.Search(len(m.chunks), func(i int) bool { return m.chunks[i].first > s }) - 1
	if c < 0 {
		return pos{0, 0}
	}
	ext := m.chunks[c].ext
	i := sort.Search(len(ext), func(i int) bool { return ext[i].end() > s })
	if i == len(ext) {
		return pos{c + 1, 0}
	}
	return pos{c, i}
}

// insert maps e, over whatever was there.
func (m *extentMap) insert(e extent) {
	var parts [3]extent
	add := parts[:0]
	from := m.seek(e.off)
	if !m.atEnd(from) && m.at(from).covers(&e) {
		return
	}
	if !m.atEnd(from) && m.at(from).off < e.off {
		add = append(add, m.at(from).upTo(e.off))
	} else if p, ok := m.prev(from); ok && e.continues(m.at(p)) {
		from = p
		add = append(add, *m.at(p))
	}
	if n := len(add); n > 0 && e.continues(&add[n-1]) {
		add[n-1].n += e.n
	} else {
		add = append(add, e)
	}
	to := from
	var tail extent
	for ; !m.atEnd(to) && m.at(to).off < e.end(); to = m.next(to) {
		if x := m.at(to); x.end() > e.end() {
			tail = x.from(e.end())
		}
	}
	if tail.n == 0 && !m.atEnd(to) && m.at(to).continues(&add[len(add)-1]) {
		tail = *m.at(to)
		to = m.next(to)
	}
	if last := &add[len(add)-1]; tail.n > 0 && tail.continues(last) {
		last.n += tail.n
	} else if tail.n > 0 {
		add = append(add, tail)
	}
	m.replace(from, to, add)
}

// replace puts add, which is not empty, in the place of the extents in
// [from, to).
func (m *extentMap) replace(from, to pos, add []extent) {
	if m.atEnd(from) {
		m.append(add)
		return
	}
	c := &m.chunks[from.chunk]
	if from.chunk == to.chunk {
		m.count += len(add) - (to.i - from.i)
		c.ext = slices.Replace(c.ext, from.i, to.i, add...)
	} else {
		m.count += len(add) - (len(c.ext) - from.i)
		c.ext = append(c.ext[:from.i], add...)
		for i := from.chunk + 1; i < to.chunk; i++ {
			m.count -= len(m.chunks[i].ext)
		}
		if to.i > 0 {
			t := &m.chunks[to.chunk]
			m.count -= to.i
			t.ext = slices.Delete(t.ext, 0, to.i)
			t.first = t.ext[0].off
		}
		m.chunks = slices.Delete(m.chunks, from.chunk+1, to.chunk)
	}
	m.chunks[from.chunk].first = m.chunks[from.chunk].ext[0].off
	m.balance(from.chunk)
}

// append puts add behind all other extents.
func (m *extentMap) append(add []extent) {
	m.count += len(add)
	n := len(m.chunks)
	if n == 0 || len(m.chunks[n-1].ext)+len(add) > maxChunk {
		c := chunk{first: add[0].off, ext: make([]extent, 0, maxChunk/2)}
		c.ext = append(c.ext, add...)
		m.chunks = append(m.chunks, c)
		return
	}
	m.chunks[n-1].ext = append(m.chunks[n-1].ext, add...)
}

// balance splits chunk i if it is too long and joins it with the next one if
// both are short.
func (m *extentMap) balance(i int) {
	c := &m.chunks[i]
	switch n := len(c.ext); {
	case n > maxChunk:
		half := slices.Clone(c.ext[n/2:])
		clear(c.ext[n/2:])
		c.ext = c.ext[:n/2]
		m.chunks = slices.Insert(m.chunks, i+1, chunk{first: half[0].off, ext: half})
	case n < maxChunk/8 && i+1 < len(m.chunks) && n+len(m.chunks[i+1].ext) < maxChunk/2:
		c.ext = append(c.ext, m.chunks[i+1].ext...)
		m.chunks = slices.Delete(m.chunks, i+1, i+2)
	}
}

// all returns a copy of the extents in order.
func (m *extentMap) all() []extent {
	out := make([]extent, 0, m.count)
	for i := range m.chunks {
		out = append(out, m.chunks[i].ext...)
	}
	return out
}

// lookup is Index.Lookup over the extents.
func (m *extentMap) lookup(dst []Segment, off, n int64) []Segment {
	if off < 0 || n <= 0 || off >= maxSize {
		return appendHole(dst, off, n)
	}
	end := off + min(n, maxSize-off)
	beyond := n - (end - off)
	base := len(dst)
	for p := m.seek(off / SectorSize); !m.atEnd(p); p = m.next(p) {
		s := m.at(p).segment()
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
