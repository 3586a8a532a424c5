package lsmt

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The discard log of a sparse layer is a file beside the data file. It lists
// ranges of the device that read as zeros where the data file has a hole, so
// that a write needs no record: it makes the hole go away. Integers are
// little-endian.
//
//	slot 0 | slot 1 | … 4096 … | record | record | …
//
//	slot, 512 bytes; of the good ones the one with the greater sequence counts:
//	0   8  magic "RPRSDIS\1"
//	8   16 name of the pair, the same as in the data file's header
//	24  8  sequence
//	32  8  where the first record is, in bytes
//	40  4  CRC-32C of the bytes before this field
//
//	record, 32 bytes:
//	0   8  offset   sectors on the device
//	8   8  length   sectors
//	16  8  where this record is, in bytes
//	24  4  0
//	28  4  CRC-32C of the name of the pair and of the bytes before this field
//
// The first record that is not good ends the log. The data file of the pair has
// at byte 4072 of its header, which the LSMT format leaves unused, the magic
// and the name; without its log it is not opened, since what had been discarded
// would show the layers below.
//
// The log is compacted when it is opened: what it says is written again behind
// its end and synced, then the other slot is made to point there.
const (
	discardMagic  = "RPRSDIS\x01"
	slotSpace     = 512
	slotSize      = 44
	recordSize    = 32
	recordsAt     = 4096
	pairAt        = headerSpace - len(discardMagic) - pairSize // in the data file
	pairSize      = 16
	compactAbove  = 1024 // records, beside twice of what is needed
	maxDiscardLog = 1 << 32
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// pairName joins a data file to its discard log; the zero one is none.
type pairName [pairSize]byte

// discardLog is an open discard log.
type discardLog struct {
	f    *os.File
	name pairName

	mu    sync.Mutex // guards the fields below; orders the records
	seq   uint64     // of the slot that counts
	start int64      // of the first record
	end   int64      // behind the last good one
	cut   bool       // there may be bytes behind end

	syncMu sync.Mutex // guards synced, and is held while the file is synced
	synced int64      // records before this are durable
}

// createDiscards makes a log of an empty file.
func createDiscards(f *os.File) (*discardLog, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() != 0 {
		return nil, fmt.Errorf("%s: not empty, it belongs to another layer: %w", f.Name(), os.ErrExist)
	}
	l := &discardLog{f: f, start: recordsAt, end: recordsAt}
	_, _ = rand.Read(l.name[:]) // it never fails
	if err := l.writeSlot(); err != nil {
		return nil, err
	}
	return l, nil
}

// writeSlot makes the slot that does not count the one that does.
func (l *discardLog) writeSlot() error {
	var b [slotSpace]byte
	copy(b[:], discardMagic)
	copy(b[8:], l.name[:])
	le := binary.LittleEndian
	le.PutUint64(b[24:], l.seq+1)
	le.PutUint64(b[32:], uint64(l.start))
	le.PutUint32(b[40:], crc32.Checksum(b[:40], castagnoli))
	if _, err := l.f.WriteAt(b[:], int64((l.seq+1)%2)*slotSpace); err != nil {
		return fmt.Errorf("write slot: %w", err)
	}
	l.seq++
	return nil
}

// parseSlot reads a slot into l, if it is good and newer.
func (l *discardLog) parseSlot(b []byte) {
	le := binary.LittleEndian
	if string(b[:8]) != discardMagic || le.Uint32(b[40:]) != crc32.Checksum(b[:40], castagnoli) {
		return
	}
	seq, start := le.Uint64(b[24:]), le.Uint64(b[32:])
	if seq <= l.seq || start < recordsAt || start > maxDiscardLog {
		return
	}
	l.seq, l.start, l.name = seq, int64(start), pairName(b[8:24])
}

// openDiscards reads a log; the extents are what it says, in its order. A file
// without a good slot is an empty log of no name.
func openDiscards(f *os.File, sectors int64) (*discardLog, []extent, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	l := &discardLog{f: f, start: recordsAt}
	var b [2 * slotSpace]byte
	if _, err := f.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%s: read slots: %w", f.Name(), err)
	}
	l.parseSlot(b[:slotSpace])
	l.parseSlot(b[slotSpace:])
	l.end = l.start
	if l.seq == 0 {
		return l, nil, nil
	}
	said, err := l.replay(min(fi.Size(), maxDiscardLog), sectors)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: read records: %w", f.Name(), err)
	}
	l.cut = fi.Size() > l.end
	return l, said, nil
}

// replay reads the good records up to size bytes; said are their ranges, cut at
// the end of the device.
func (l *discardLog) replay(size, sectors int64) (said []extent, err error) {
	buf := make([]byte, 64<<10)
	for l.end+recordSize <= size {
		n, err := l.f.ReadAt(buf[:min(int64(len(buf)), (size-l.end)/recordSize*recordSize)], l.end)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if n < recordSize {
			return said, nil
		}
		for p := buf[:n]; len(p) >= recordSize; p = p[recordSize:] {
			off, n, ok := l.parse(p[:recordSize], l.end)
			if !ok {
				return said, nil
			}
			l.end += recordSize
			if off < sectors {
				said = append(said, extent{off, min(n, sectors-off), zeroAt(firstSector + off)})
			}
		}
	}
	return said, nil
}

func (l *discardLog) parse(p []byte, at int64) (off, n int64, ok bool) {
	le := binary.LittleEndian
	if le.Uint32(p[28:]) != l.sum(p[:28]) || le.Uint64(p[16:]) != uint64(at) {
		return 0, 0, false
	}
	a, b := le.Uint64(p), le.Uint64(p[8:])
	if a >= maxOffset || b == 0 || b > maxOffset-a {
		return 0, 0, false
	}
	return int64(a), int64(b), true
}

func (l *discardLog) sum(p []byte) uint32 {
	return crc32.Update(crc32.Checksum(l.name[:], castagnoli), castagnoli, p)
}

func (l *discardLog) encode(b []byte, off, n, at int64) []byte {
	le := binary.LittleEndian
	from := len(b)
	b = le.AppendUint64(b, uint64(off))
	b = le.AppendUint64(b, uint64(n))
	b = le.AppendUint64(b, uint64(at))
	b = le.AppendUint32(b, 0)
	return le.AppendUint32(b, l.sum(b[from:]))
}

// add writes records and returns where they end. They are not durable yet.
func (l *discardLog) add(ranges ...extent) (end int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		if err := l.f.Truncate(l.end); err != nil {
			return 0, fmt.Errorf("discard log: cut behind the last good record: %w", err)
		}
		l.cut = false
	}
	b := make([]byte, 0, len(ranges)*recordSize)
	for _, x := range ranges {
		b = l.encode(b, x.off, x.n, l.end+int64(len(b)))
	}
	if l.end+int64(len(b)) > maxDiscardLog {
		return 0, fmt.Errorf("discard log: larger than %d bytes: open the layer again: %w", int64(maxDiscardLog), unix.ENOSPC)
	}
	if _, err := l.f.WriteAt(b, l.end); err != nil {
		l.cut = true
		return 0, fmt.Errorf("discard log: %w", err)
	}
	l.end += int64(len(b))
	return l.end, nil
}

// sync makes the records before end durable. Those who come while the file is
// being synced for another one share the next time.
func (l *discardLog) sync(end int64, fdatasync func(*os.File) error) error {
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	if l.synced >= end {
		return nil
	}
	l.mu.Lock()
	covers := l.end
	l.mu.Unlock()
	if err := fdatasync(l.f); err != nil {
		return fmt.Errorf("sync discard log: %w", err)
	}
	l.synced = covers
	return nil
}

// all is where the records end at present.
func (l *discardLog) all() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end
}

// compact writes what the log says, which is said, anew if the log is much
// longer than that.
func (l *discardLog) compact(said []extent) error {
	if (l.end-l.start)/recordSize <= 2*int64(len(said))+compactAbove {
		return nil
	}
	old, start := l.start, l.end
	if _, err := l.add(said...); err != nil {
		return nil // another time: it works as it is
	}
	if err := fdatasync(l.f); err != nil {
		return err
	}
	l.start = start
	if err := l.writeSlot(); err != nil {
		return err
	}
	if err := fdatasync(l.f); err != nil {
		return err
	}
	from, to := (old+headerSpace-1)/headerSpace*headerSpace, start/headerSpace*headerSpace
	if to > from {
		_ = punch(l.f, from, to-from) // not every file system can
	}
	return nil
}

// readPair returns the name in the header of a data file; zero if it has none.
func readPair(data *os.File) (name pairName, err error) {
	var b [len(discardMagic) + pairSize]byte
	if err := readFull(data, b[:], int64(pairAt)); err != nil {
		return name, fmt.Errorf("%s: read header: %w", data.Name(), err)
	}
	if string(b[:len(discardMagic)]) == discardMagic {
		name = pairName(b[len(discardMagic):])
	}
	return name, nil
}

func writePair(data *os.File, name pairName) error {
	if _, err := data.WriteAt(append([]byte(discardMagic), name[:]...), int64(pairAt)); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}

// openPair opens the discard log of a data file, f, which may be nil. A data
// file that has none yet gets the new log in f.
func openPair(data, f *os.File, sectors int64) (*discardLog, []extent, error) {
	name, err := readPair(data)
	if err != nil {
		return nil, nil, err
	}
	if f == nil {
		if name != (pairName{}) {
			return nil, nil, fmt.Errorf("%s: it has a discard log: open both together: %w", data.Name(), os.ErrInvalid)
		}
		return nil, nil, nil
	}
	l, said, err := openDiscards(f, sectors)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case l.seq != 0 && l.name == name:
		return l, said, nil
	case name != pairName{} || l.end > l.start:
		return nil, nil, fmt.Errorf("%s is not the discard log of %s: %w", f.Name(), data.Name(), ErrCorrupt)
	}
	l, err = bind(data, f)
	return l, nil, err
}

// bind gives a data file that has none a discard log in f, durably: the log
// first, since a name in the data file demands it.
func bind(data, f *os.File) (*discardLog, error) {
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	l, err := createDiscards(f)
	if err == nil {
		err = fdatasync(f)
	}
	if err == nil {
		err = writePair(data, l.name)
	}
	if err == nil {
		err = fdatasync(data)
	}
	return l, err
}

// punch makes [off, off+n) of the file a hole; parts of blocks become zeros.
func punch(f *os.File, off, n int64) error {
	return control(f, func(fd int) error {
		for {
			err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
			if err != unix.EINTR {
				return err
			}
		}
	})
}
