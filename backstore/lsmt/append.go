package lsmt

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
)

// maxRun is the longest record of a write, in sectors: the format's limit,
// rounded down to 32 KiB, where a committed layer cuts long runs too.
const maxRun = maxLength / 64 * 64

// CreateAppend makes an append-only writable layer of two empty files, opened
// for reading and writing. It owns them if it succeeds.
func CreateAppend(data, index *os.File, o *WritableOptions) (*Writable, error) {
	h, err := o.header(flagHeader | flagData)
	if err == nil {
		err = create(data, h)
	}
	if err == nil {
		err = create(index, logHeader(h))
	}
	if err != nil {
		return nil, fmt.Errorf("create append-only layer: %w", err)
	}
	w := newWritable(data, index, h)
	w.dataEnd.Store(firstSector)
	w.logEnd = headerSpace
	w.boot = thisBoot()
	if err := w.writeSynced(headerSpace); err != nil {
		return nil, fmt.Errorf("create append-only layer: %w", err)
	}
	return w, nil
}

// logHeader is the header of the index log beside the data file with header h.
func logHeader(h header) header {
	h.flags = flagHeader
	h.indexOffset = headerSpace
	return h
}

// OpenAppend reopens an append-only writable layer whose files are open for
// reading and writing. It owns them if it succeeds. The log is read up to the
// first record that a crash tore or whose data are missing; Dropped tells if
// there was one.
func OpenAppend(data, index *os.File) (*Writable, error) {
	w, err := openAppend(data, index)
	if err != nil {
		return nil, fmt.Errorf("open append-only layer: %w", err)
	}
	return w, nil
}

func openAppend(data, index *os.File) (*Writable, error) {
	h, size, err := openHeader(data)
	if err != nil {
		return nil, err
	}
	if h.is(flagSparse, flagSparse) {
		return nil, fmt.Errorf("%s: the data file of a sparse layer: open it as such", data.Name())
	}
	if !h.is(flagData|flagSealed, flagData) {
		return nil, fmt.Errorf("%s: flags %#x are not those of a writable data file: %w",
			data.Name(), h.flags, ErrCorrupt)
	}
	hi, logSize, err := openHeader(index)
	if err != nil {
		return nil, err
	}
	if !hi.is(flagData|flagSealed, 0) || hi.indexOffset != headerSpace {
		return nil, fmt.Errorf("%s: flags %#x, index at %d: not those of an index log: %w",
			index.Name(), hi.flags, hi.indexOffset, ErrCorrupt)
	}
	if hi.uuid != h.uuid {
		return nil, fmt.Errorf("%s is of layer %s, %s of layer %s: not a pair",
			data.Name(), h.uuid, index.Name(), hi.uuid)
	}
	h.virtualSize = hi.virtualSize
	w := newWritable(data, index, h)
	w.dataEnd.Store((size + SectorSize - 1) / SectorSize)
	w.boot = thisBoot()
	boot, synced, err := readSynced(index)
	if err != nil {
		return nil, fmt.Errorf("%s: read header: %w", index.Name(), err)
	}
	w.doubt = math.MaxInt64
	if boot != (bootID{}) && boot != w.boot {
		w.doubt = synced
	}
	end, err := w.replay(logSize, size/SectorSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", index.Name(), err)
	}
	if boot != w.boot { // else the last Sync is still this boot's
		synced = w.logEnd
	}
	if at, ok := sealedAt(data, size, &h); ok && end*SectorSize <= at {
		return nil, fmt.Errorf("%s: %w", data.Name(), errSealed)
	}
	if w.logEnd < logSize {
		// Before the data file grows to where a bad record says its data are.
		if err := w.cutLog(); err != nil {
			return nil, fmt.Errorf("%s: %w", index.Name(), err)
		}
	}
	if err := w.writeSynced(synced); err != nil {
		return nil, fmt.Errorf("%s: write header: %w", index.Name(), err)
	}
	return w, nil
}

// cutLog cuts the log file behind the last good record, durably.
func (w *Writable) cutLog() error {
	if err := w.log.Truncate(w.logEnd); err != nil {
		return fmt.Errorf("cut behind the last good record: %w", err)
	}
	if err := fdatasync(w.log); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	w.logCut = false
	return nil
}

// errEndOfLog ends the reading of a log early.
var errEndOfLog = errors.New("end of log")

// replay reads the log file of size bytes into ext. dataEnd is the number of
// whole sectors of the data file. It returns the sector behind the last one
// that a record refers to.
func (w *Writable) replay(size, dataEnd int64) (end int64, err error) {
	w.logEnd = headerSpace
	r := io.NewSectionReader(w.log, headerSpace, size-headerSpace)
	buf := make([]byte, min(256<<10, (size-headerSpace)/entrySize*entrySize))
	for left := (size - headerSpace) / entrySize; left > 0; {
		p := buf[:min(int64(len(buf)), left*entrySize)]
		if _, err := io.ReadFull(r, p); err != nil {
			return end, fmt.Errorf("read records: %w", err)
		}
		for ; len(p) > 0; p = p[entrySize:] {
			x, err := w.record(p[:entrySize], dataEnd)
			if errors.Is(err, errEndOfLog) {
				w.dropped = int(left)
				return end, nil
			}
			if err != nil {
				return end, fmt.Errorf("record %d: %w", (w.logEnd-headerSpace)/entrySize, err)
			}
			if x.n > 0 {
				w.ext.insert(x)
			}
			if !x.zero() {
				end = max(end, x.moff+x.n)
			}
			w.logEnd += entrySize
			left--
		}
	}
	if size > w.logEnd {
		w.dropped++ // a torn record
	}
	return end, nil
}

// record decodes a record of the log; padding comes as an extent of length 0.
func (w *Writable) record(p []byte, dataEnd int64) (extent, error) {
	if binary.LittleEndian.Uint64(p)|binary.LittleEndian.Uint64(p[8:]) == 0 {
		// The file had grown, its bytes were not there yet.
		return extent{}, errEndOfLog
	}
	e := parseEntry(p)
	if e.padding() || e.len() == 0 {
		return extent{}, nil
	}
	// Whether the data are there is asked below: if not, that is no error.
	if err := e.check(math.MaxUint64); err != nil {
		return extent{}, err
	}
	x := extent{int64(e.off()), int64(e.len()), int64(e.moffset())}
	if e.zeroed() {
		x.moff = zeroAt(x.moff)
	} else if x.moff+x.n > dataEnd {
		return extent{}, errEndOfLog
	} else if w.logEnd >= w.doubt {
		if there, err := w.isThere(x); err != nil || !there {
			return extent{}, cmp.Or(err, errEndOfLog)
		}
	}
	return x, nil
}

// writeAppend is WriteAt. Data go to their own place in the file, with no lock
// held; the record that makes them count follows once they are there.
func (w *Writable) writeAppend(p []byte, off int64) (int, error) {
	n := int64(len(p)) / SectorSize
	moff := w.dataEnd.Add(n) - n
	if _, err := w.data.WriteAt(p, moff*SectorSize); err != nil {
		return 0, fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	if err := w.commitRecords(extent{off / SectorSize, n, moff}, maxRun); err != nil {
		return 0, fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return len(p), nil
}

// discardAppend is Discard.
func (w *Writable) discardAppend(off, n int64) error {
	x := extent{off / SectorSize, n / SectorSize, zeroAt(w.dataEnd.Load())}
	if err := w.commitRecords(x, maxLength); err != nil {
		return fmt.Errorf("discard %d bytes at %d: %w", n, off, err)
	}
	return nil
}

// commitRecords writes x to the log, in records of at most limit sectors, and
// to ext.
func (w *Writable) commitRecords(x extent, limit int64) error {
	w.logMu.Lock()
	defer w.logMu.Unlock()
	if w.logCut {
		if err := w.cutLog(); err != nil {
			return fmt.Errorf("index log: %w", err)
		}
	}
	var one [entrySize]byte
	b := one[:0]
	for part := range x.cut(limit) {
		b = part.entry().append(b)
	}
	if _, err := w.log.WriteAt(b, w.logEnd); err != nil {
		w.logCut = true
		return fmt.Errorf("write index record: %w", err)
	}
	w.logEnd += int64(len(b))
	w.insert(x, limit)
	return nil
}

// insert maps x; discards in parts of at most limit sectors.
func (w *Writable) insert(x extent, limit int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !x.zero() {
		w.ext.insert(x)
		return
	}
	for part := range x.cut(limit) {
		w.ext.insert(part)
	}
}

// cut yields x in parts of at most limit sectors.
func (e extent) cut(limit int64) iter.Seq[extent] {
	return func(yield func(extent) bool) {
		for ; e.n > limit; e = e.from(e.off + limit) {
			if !yield(e.upTo(e.off + limit)) {
				return
			}
		}
		yield(e)
	}
}
