package lsmt

import (
	"errors"
	"fmt"
	"io"
)

// A Layer is one sealed layer. It is immutable and safe for concurrent use.
type Layer struct {
	r     io.ReaderAt
	size  int64
	ht    header // the trailer
	index *Index
}

// OpenLayer opens the sealed layer in the size bytes of r: a committed, sealed
// or merged LSMT file, without the ZFile or the tar that may lie around it.
// It reads the trailer and the index, at the end of the file, and nothing else
// if they are good. What contradicts the format is an error that wraps
// ErrCorrupt.
func OpenLayer(r io.ReaderAt, size int64) (*Layer, error) {
	ht, err := readTrailer(r, size)
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	ents, err := readIndex(r, size, &ht)
	if err != nil {
		return nil, fmt.Errorf("open layer: read index: %w", err)
	}
	return &Layer{r: r, size: size, ht: ht, index: newIndex(ents)}, nil
}

// readTrailer reads and checks the trailer of a sealed layer.
func readTrailer(r io.ReaderAt, size int64) (header, error) {
	if size < 2*headerSpace {
		return header{}, fmt.Errorf("%d bytes are too few for a header and a trailer: %w", size, ErrCorrupt)
	}
	var buf [headerSpace]byte
	if err := readFull(r, buf[:], size-headerSpace); err != nil {
		return header{}, fmt.Errorf("read trailer: %w", err)
	}
	ht, err := parseHeader(buf[:])
	if err == nil && !ht.is(flagHeader|flagData|flagSealed, flagData|flagSealed) {
		err = fmt.Errorf("flags %#x are not those of a sealed layer: %w", ht.flags, ErrCorrupt)
	}
	if err != nil && errors.Is(err, ErrCorrupt) && unsealed(r) {
		err = fmt.Errorf("a writable layer that is not sealed yet (commit or seal it first), or one cut short: %w", err)
	}
	if err != nil {
		return header{}, fmt.Errorf("read trailer: %w", err)
	}
	return ht, nil
}

// unsealed tells whether r begins like the data file of a writable layer.
func unsealed(r io.ReaderAt) bool {
	var buf [headerSpace]byte
	if readFull(r, buf[:], 0) != nil {
		return false
	}
	h, err := parseHeader(buf[:])
	return err == nil && h.is(flagHeader|flagData|flagSealed, flagHeader|flagData)
}

// readIndex reads and checks the index that ht describes.
func readIndex(r io.ReaderAt, size int64, ht *header) ([]entry, error) {
	const maxPadded = (MaxSegments + indexPad - 1) / indexPad * indexPad
	if ht.indexSize > maxPadded {
		return nil, fmt.Errorf("%d entries, more than %d: %w", ht.indexSize, MaxSegments, ErrCorrupt)
	}
	n, room := int64(ht.indexSize)*entrySize, uint64(size-headerSpace)
	if ht.indexOffset < headerSpace || ht.indexOffset > room || room-ht.indexOffset < uint64(n) {
		return nil, fmt.Errorf("%d bytes at %d are outside the file of %d: %w",
			n, ht.indexOffset, size, ErrCorrupt)
	}
	c := indexChecker{dataEnd: ht.indexOffset / SectorSize}
	// Read in parts, so that memory grows only with what is really there.
	const part = 256 << 10
	buf := make([]byte, min(n, part))
	for done := int64(0); done < n; {
		p := buf[:min(n-done, part)]
		if err := readFull(r, p, int64(ht.indexOffset)+done); err != nil {
			return nil, err
		}
		done += int64(len(p))
		for ; len(p) > 0; p = p[entrySize:] {
			if err := c.add(parseEntry(p)); err != nil {
				return nil, err
			}
		}
	}
	return c.ents, nil
}

// indexChecker collects the entries of a sealed layer's index.
type indexChecker struct {
	ents    []entry
	dataEnd uint64 // sector behind the data
	end     uint64 // sector behind the last entry
	seen    int    // entries, padding included
}

func (c *indexChecker) add(e entry) error {
	i := c.seen
	c.seen++
	if e.padding() {
		return nil
	}
	if e.len() == 0 {
		return fmt.Errorf("entry %d: empty: %w", i, ErrCorrupt)
	}
	if e.off() < c.end {
		return fmt.Errorf("entry %d: begins at sector %d, before the end %d of the one before it: %w",
			i, e.off(), c.end, ErrCorrupt)
	}
	if err := e.check(c.dataEnd); err != nil {
		return fmt.Errorf("entry %d: %w", i, err)
	}
	if len(c.ents) == MaxSegments {
		return fmt.Errorf("more than %d entries: %w", MaxSegments, ErrCorrupt)
	}
	c.end = e.end()
	c.ents = append(c.ents, e)
	return nil
}

// Index returns the layer's own index.
func (l *Layer) Index() *Index { return l.index }

// Size is the size of the LSMT file in bytes.
func (l *Layer) Size() int64 { return l.size }

// VirtualSize is the size of the device in bytes that the layer states, 0 if
// it states none.
func (l *Layer) VirtualSize() int64 { return int64(l.ht.virtualSize) }

// UUID is the layer's UUID as upper-case text; all zeros if it has none.
func (l *Layer) UUID() string { return l.ht.uuid }

// ParentUUID is the UUID of the layer below as this layer states it; all zeros
// if it states none. It is not checked anywhere.
func (l *Layer) ParentUUID() string { return l.ht.parentUUID }

// Message is the commit message, up to 256 bytes.
func (l *Layer) Message() string { return l.ht.userTag }

// IndexRange is where the index lies in the LSMT file, padding included. What
// is behind it, up to the end, belongs to the trailer.
func (l *Layer) IndexRange() (off, n int64) {
	return int64(l.ht.indexOffset), int64(l.ht.indexSize) * entrySize
}

// ReadAt reads from the LSMT file itself, where Segment.LayerOff points.
func (l *Layer) ReadAt(p []byte, off int64) (int, error) { return l.r.ReadAt(p, off) }
