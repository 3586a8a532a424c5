package lsmt

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// CreateSparse makes a sparse writable layer of an empty file, opened for
// reading and writing, on a file system that keeps holes. It owns the file, and
// that of WritableOptions.Discards, if it succeeds.
func CreateSparse(data *os.File, o *WritableOptions) (*Writable, error) {
	h, err := o.header(flagHeader | flagData | flagSparse)
	if err == nil {
		err = create(data, h)
	}
	if err == nil {
		err = data.Truncate(headerSpace + int64(h.virtualSize))
	}
	if err == nil {
		err = checkHoles(data, int64(h.virtualSize))
	}
	var l *discardLog
	if err == nil && o != nil && o.Discards != nil {
		if l, err = createDiscards(o.Discards); err == nil {
			err = writePair(data, l.name)
		}
	}
	w := newWritable(data, nil, h)
	w.discards = l
	if err == nil {
		err = w.setGrain()
	}
	if err != nil {
		return nil, fmt.Errorf("create sparse layer: %w", err)
	}
	return w, nil
}

// setGrain finds out in which unit the file system keeps holes. A larger one
// than the header would not have passed checkHoles, whatever the file system
// likes best.
func (w *Writable) setGrain() error {
	var st unix.Stat_t
	if err := control(w.data, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return err
	}
	w.grain = SectorSize
	for w.grain < int64(st.Blksize) && w.grain < headerSpace {
		w.grain *= 2
	}
	return nil
}

// checkHoles fails if a new file is not one hole behind its header.
func checkHoles(f *os.File, size int64) error {
	from, _, err := nextData(f, headerSpace)
	if err == nil && from < headerSpace+size {
		err = fmt.Errorf("%s: the file system does not keep holes in files; "+
			"use another one or an append-only layer: %w", f.Name(), errors.ErrUnsupported)
	}
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	return err
}

// OpenSparse reopens a sparse writable layer whose file is open for reading and
// writing, with its discard log, nil if it has none. It owns the files if it
// succeeds. What is not a hole of the data file is Data; of the holes, what the
// log says is Zero, and without a log everything is Hole. A layer without a log
// that is opened with an empty file gets it for one.
func OpenSparse(data, discards *os.File) (*Writable, error) {
	w, err := openSparse(data, discards)
	if err != nil {
		return nil, fmt.Errorf("open sparse layer: %w", err)
	}
	return w, nil
}

func openSparse(data, discards *os.File) (*Writable, error) {
	h, size, err := openHeader(data)
	if err != nil {
		return nil, err
	}
	if !h.is(flagData|flagSealed|flagSparse, flagData|flagSparse) {
		return nil, fmt.Errorf("%s: flags %#x are not those of a sparse data file: %w",
			data.Name(), h.flags, ErrCorrupt)
	}
	if need := headerSpace + int64(h.virtualSize); size < need {
		return nil, fmt.Errorf("%s: %d bytes instead of %d: cut short: %w",
			data.Name(), size, need, ErrCorrupt)
	}
	if at, ok := sealedAt(data, size, &h); ok && at >= headerSpace+int64(h.virtualSize) {
		return nil, fmt.Errorf("%s: %w", data.Name(), errSealed)
	}
	w := newWritable(data, nil, h)
	if err := w.setGrain(); err != nil {
		return nil, err
	}
	if err := w.openDiscards(discards); err != nil {
		return nil, err
	}
	if err := w.scan(); err != nil {
		return nil, fmt.Errorf("%s: find holes: %w", data.Name(), err)
	}
	return w, nil
}

// openDiscards maps what the log says, before the data are mapped over it.
func (w *Writable) openDiscards(f *os.File) error {
	l, said, err := openPair(w.data, f, int64(w.hdr.virtualSize)/SectorSize)
	if err != nil || l == nil {
		return err
	}
	for _, x := range said {
		w.insert(x, maxLength)
	}
	if err := l.compact(w.ext.all()); err != nil {
		return fmt.Errorf("%s: compact: %w", f.Name(), err)
	}
	w.discards = l
	return nil
}

// scan maps what is not a hole of the data file.
func (w *Writable) scan() error {
	end := headerSpace + int64(w.hdr.virtualSize)
	for at := int64(headerSpace); at < end; {
		from, to, err := nextData(w.data, at)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return err
		}
		if to <= at {
			return fmt.Errorf("hole at %d before %d: %w", to, at, unix.EIO)
		}
		at = to
		lo := from / SectorSize
		hi := (min(to, end) + SectorSize - 1) / SectorSize
		if hi > lo {
			w.ext.insert(extent{lo - firstSector, hi - lo, lo})
		}
	}
	return nil
}

// nextData finds the first range at or behind off that is not a hole.
func nextData(f *os.File, off int64) (from, to int64, err error) {
	err = control(f, func(fd int) (err error) {
		if from, err = unix.Seek(fd, off, unix.SEEK_DATA); err != nil {
			return err
		}
		to, err = unix.Seek(fd, from, unix.SEEK_HOLE)
		return err
	})
	return from, to, err
}

// writeSparse is WriteAt.
func (w *Writable) writeSparse(p []byte, off int64) (int, error) {
	if _, err := w.data.WriteAt(p, headerSpace+off); err != nil {
		return 0, fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	s := off / SectorSize
	w.insert(extent{s, int64(len(p)) / SectorSize, firstSector + s}, maxLength)
	return len(p), nil
}

// block is the range of the device in the file system's block at off.
func (w *Writable) block(off int64) (from, to int64) {
	from = (headerSpace+off)/w.grain*w.grain - headerSpace
	return max(0, from), min(from+w.grain, w.vsize.Load())
}

// shadows tells whether a write of [off, end) would turn into data what is Hole
// in the rest of its first and last block. A block that holds data has been
// filled when these were written.
func (w *Writable) shadows(off, end int64) bool {
	if w.below == nil || off >= end {
		return false
	}
	first, _ := w.block(off)
	last, to := w.block(end - SectorSize)
	return first < off && w.unfilled(off) || end < to && w.unfilled(last)
}

// unfilled tells whether the block at off has Hole and no Data.
func (w *Writable) unfilled(off int64) bool {
	from, to := w.block(off)
	hole := false
	var buf [8]Segment
	for _, s := range w.Lookup(buf[:0], from, to-from) {
		switch s.Kind {
		case Data:
			return false
		case Hole:
			hole = true
		}
	}
	return hole
}

// writeFilled is WriteAt where that would shadow: it writes whole blocks, with
// what is below in the place of what is Hole. To this layer that stays Hole
// until it is opened again.
func (w *Writable) writeFilled(p []byte, off int64) (int, error) {
	end := off + int64(len(p))
	from, _ := w.block(off)
	_, to := w.block(end - SectorSize)
	buf := make([]byte, to-from)
	for _, part := range [][2]int64{{from, off}, {end, to}} {
		if q := buf[part[0]-from : part[1]-from]; len(q) > 0 {
			if err := readFull(w.below, q, part[0]); err != nil {
				return 0, fmt.Errorf("write %d bytes at %d: read the rest of the block: %w", len(p), off, err)
			}
		}
	}
	copy(buf[off-from:], p)
	w.gate.Lock()
	defer w.gate.Unlock()
	if err := w.writable("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if !w.unfilled(off) {
		buf, from = buf[off-from:], off
	}
	if !w.unfilled(end - SectorSize) {
		buf = buf[:end-from]
	}
	w.clearZeros(buf, from, off, end)
	if _, err := w.data.WriteAt(buf, headerSpace+from); err != nil {
		return 0, fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	s := off / SectorSize
	w.insert(extent{s, int64(len(p)) / SectorSize, firstSector + s}, maxLength)
	return len(p), nil
}

// clearZeros clears the parts of buf, which is for the device from that offset
// on, that are Zero, outside of [off, end).
func (w *Writable) clearZeros(buf []byte, from, off, end int64) {
	var segs [16]Segment
	for _, s := range w.Lookup(segs[:0], from, int64(len(buf))) {
		if s.Kind != Zero {
			continue
		}
		if lo, hi := s.Off, min(s.End(), off); lo < hi {
			clear(buf[lo-from : hi-from])
		}
		if lo, hi := max(s.Off, end), s.End(); lo < hi {
			clear(buf[lo-from : hi-from])
		}
	}
}

// hasData tells whether there is Data in [off, off+n).
func (w *Writable) hasData(off, n int64) bool {
	w.mu.RLock()
	defer w.mu.RUnlock()
	for p := w.ext.seek(off / SectorSize); !w.ext.atEnd(p); p = w.ext.next(p) {
		x := w.ext.at(p)
		if x.off*SectorSize >= off+n {
			return false
		}
		if !x.zero() {
			return true
		}
	}
	return false
}

// discardSparse is Discard. With a log, the record comes first, and is durable
// before data are taken away: else a crash could leave neither the data nor
// zeros but what is below.
func (w *Writable) discardSparse(off, n int64) error {
	s := off / SectorSize
	x := extent{s, n / SectorSize, zeroAt(firstSector + s)}
	end, err := w.recordDiscard(x, off, n)
	if err != nil {
		return fmt.Errorf("discard %d bytes at %d: %w", n, off, err)
	}
	w.gate.Lock()
	defer w.gate.Unlock()
	if err := w.writable("discard", off, n); err != nil {
		return err
	}
	if w.discards != nil && w.hasData(off, n) { // it may have come meanwhile
		err = w.syncDiscards(end)
	}
	if err == nil {
		err = punch(w.data, headerSpace+off, n)
	}
	if err != nil {
		return fmt.Errorf("discard %d bytes at %d: %w", n, off, err)
	}
	w.insert(x, maxLength)
	return nil
}

// recordDiscard writes the record of a discard, and returns where the log ends
// then.
func (w *Writable) recordDiscard(x extent, off, n int64) (end int64, err error) {
	w.gate.RLock()
	defer w.gate.RUnlock()
	if err := w.writable("discard", off, n); err != nil || w.discards == nil {
		return 0, err
	}
	if end, err = w.discards.add(x); err != nil {
		return 0, err
	}
	if w.hasData(off, n) {
		err = w.syncDiscards(end)
	}
	return end, err
}

// syncDiscards makes the log durable up to end. Its failure is the layer's.
func (w *Writable) syncDiscards(end int64) error {
	err := w.discards.sync(end, w.fdatasync)
	if err != nil {
		w.failSync(err)
	}
	return err
}
