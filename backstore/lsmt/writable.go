package lsmt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// WritableOptions describe a new writable layer.
type WritableOptions struct {
	// VirtualSize is the size of the device in bytes, a multiple of
	// SectorSize. Zero means that it is set later, with Resize; until then
	// nothing can be written.
	VirtualSize int64
	// UUID and ParentUUID are UUIDs as text. Empty means the null UUID.
	UUID, ParentUUID string
	// Discards is an empty file, opened for reading and writing, in which a
	// sparse layer remembers what was discarded. Without it that is forgotten
	// when the layer is opened again. Append-only layers need none.
	Discards *os.File
}

// A Writable is a layer under construction, append-only or sparse.
type Writable struct {
	data *os.File
	log  *os.File // the index log; nil if the layer is sparse

	discards *discardLog // of a sparse layer; may be nil
	grain    int64       // of a sparse layer: the unit of holes in data
	below    io.ReaderAt // what SetBelow was given
	// fdatasync is replaced by tests.
	fdatasync func(*os.File) error

	// gate is held shared by what writes and exclusively by what must not
	// meet a write: discards and commits of a sparse layer, Resize, Seal.
	gate   sync.RWMutex
	hdr    header       // its virtualSize is guarded by gate, the rest never changes
	sealed bool         // guarded by gate
	vsize  atomic.Int64 // hdr.virtualSize
	closed atomic.Bool

	dataEnd atomic.Int64 // append-only: the sector where the next write goes
	boot    bootID       // append-only: this one; zero if unknown
	doubt   int64        // append-only, while opening: see synced.go

	// logMu orders the records of the log and their way into ext.
	logMu  sync.Mutex
	logEnd int64 // bytes of good records, header included
	logCut bool  // writing a record failed: there may be bytes behind logEnd

	mu  sync.RWMutex // guards ext; never held during I/O
	ext extentMap

	syncMu  sync.Mutex // guards syncErr
	syncErr error      // the first failed sync: what it lost cannot be known

	dropped int
}

var (
	errSealed = fmt.Errorf("layer is sealed, it can only be read as a lower layer: %w", os.ErrPermission)
	errClosed = fmt.Errorf("layer is closed: %w", os.ErrClosed)
)

// newWritable fills the parts that all ways to get a Writable share.
func newWritable(data, log *os.File, h header) *Writable {
	w := &Writable{data: data, log: log, hdr: h, fdatasync: fdatasync}
	w.vsize.Store(int64(h.virtualSize))
	return w
}

// header makes the header of a new layer.
func (o *WritableOptions) header(flags uint32) (header, error) {
	if o == nil {
		o = &WritableOptions{}
	}
	h := header{flags: flags, virtualSize: uint64(o.VirtualSize)}
	if err := checkSize(o.VirtualSize); err != nil {
		return h, err
	}
	var err error
	if h.uuid, err = canonicalUUID(o.UUID); err != nil {
		return h, err
	}
	if h.parentUUID, err = canonicalUUID(o.ParentUUID); err != nil {
		return h, fmt.Errorf("parent: %w", err)
	}
	return h, nil
}

func checkSize(n int64) error {
	if n < 0 || n > maxSize || n%SectorSize != 0 {
		return fmt.Errorf("virtual size of %d bytes: not a multiple of %d between 0 and %d: %w",
			n, SectorSize, int64(maxSize), syscall.EINVAL)
	}
	return nil
}

// SetBelow tells the layer what is below it: r reads the device of the lower
// layers, and zeros behind their end. A sparse layer needs it where writes are
// smaller than the file system's blocks: what is below the rest of a block is
// then copied into it, since the file cannot tell it from data. It is to be
// called before the first write.
func (w *Writable) SetBelow(r io.ReaderAt) {
	w.gate.Lock()
	defer w.gate.Unlock()
	if w.log == nil {
		w.below = r
	}
}

// Sparse tells which kind of layer this is.
func (w *Writable) Sparse() bool { return w.log == nil }

// VirtualSize is the size of the device in bytes.
func (w *Writable) VirtualSize() int64 { return w.vsize.Load() }

// UUID is the layer's UUID as upper-case text; all zeros if it has none.
func (w *Writable) UUID() string { return w.hdr.uuid }

// ParentUUID is the UUID of the layer below, all zeros if none was stated.
func (w *Writable) ParentUUID() string { return w.hdr.parentUUID }

// Dropped is the number of records at the end of the index log that the
// reopening of an append-only layer left out, because a crash had torn them or
// lost their data. They were not covered by a Sync. 0 if all is well.
func (w *Writable) Dropped() int { return w.dropped }

// Len is the number of segments that the layer maps at present.
func (w *Writable) Len() int {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.ext.count
}

// Lookup appends to dst the segments that cover exactly [off, off+n) and
// returns it; see Index.Lookup. Segment.Layer is always -1: Data is in this
// layer's data file, and a Hole belongs to the layers below.
func (w *Writable) Lookup(dst []Segment, off, n int64) []Segment {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.ext.lookup(dst, off, n)
}

// aligned checks the range of a request; op names it in the error.
func aligned(op string, off, n int64) error {
	if off < 0 || n < 0 || off%SectorSize != 0 || n%SectorSize != 0 {
		return fmt.Errorf("%s %d bytes at %d: not a whole number of %d-byte sectors: %w",
			op, n, off, SectorSize, syscall.EINVAL)
	}
	return nil
}

// writable checks a request to change [off, off+n). The caller holds gate.
func (w *Writable) writable(op string, off, n int64) error {
	if w.closed.Load() {
		return fmt.Errorf("%s: %w", op, errClosed)
	}
	if w.sealed {
		return fmt.Errorf("%s: %w", op, errSealed)
	}
	if err := aligned(op, off, n); err != nil {
		return err
	}
	if size := w.vsize.Load(); off > size || n > size-off {
		return fmt.Errorf("%s %d bytes at %d: beyond the end of the device of %d bytes: %w",
			op, n, off, size, syscall.EINVAL)
	}
	return nil
}

// ReadAt reads what this layer has of the device at off: its own data, and
// zeros for the rest. off and len(p) are multiples of SectorSize. At the end
// of the device it returns io.EOF.
func (w *Writable) ReadAt(p []byte, off int64) (int, error) {
	if w.closed.Load() {
		return 0, fmt.Errorf("read: %w", errClosed)
	}
	if err := aligned("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	size := w.vsize.Load()
	if off >= size && len(p) > 0 {
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	var buf [8]Segment
	for _, s := range w.Lookup(buf[:0], off, int64(len(p))) {
		q := p[s.Off-off:][:s.Len]
		if s.Kind != Data {
			clear(q)
		} else if err := readFull(w.data, q, s.LayerOff); err != nil {
			return int(s.Off - off), fmt.Errorf("read data of [%d, %d): %w", s.Off, s.End(), err)
		}
	}
	return len(p), eof
}

// WriteAt writes p at off, both multiples of SectorSize. When it returns the
// write is in the page cache; Sync makes it durable.
func (w *Writable) WriteAt(p []byte, off int64) (int, error) {
	if n, err, done := w.tryWrite(p, off); done {
		return n, err
	}
	return w.writeFilled(p, off)
}

// tryWrite writes p at off, unless that would shadow what is below.
func (w *Writable) tryWrite(p []byte, off int64) (n int, err error, done bool) {
	w.gate.RLock()
	defer w.gate.RUnlock()
	if err := w.writable("write", off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err, true
	}
	switch {
	case w.log != nil:
		n, err = w.writeAppend(p, off)
	case w.shadows(off, off+int64(len(p))):
		return 0, nil, false
	default:
		n, err = w.writeSparse(p, off)
	}
	return n, err, true
}

// Discard makes [off, off+n) read as zeros, hiding the layers below. off and n
// are multiples of SectorSize. A sparse layer gives the space back; without a
// discard log it forgets at a reopening that the range was discarded.
func (w *Writable) Discard(off, n int64) error {
	if w.log == nil && n > 0 {
		return w.discardSparse(off, n)
	}
	w.gate.RLock()
	defer w.gate.RUnlock()
	if err := w.writable("discard", off, n); err != nil || n == 0 {
		return err
	}
	return w.discardAppend(off, n)
}

// Sync makes durable what was written before it was called. Once it has failed
// it keeps failing: the kernel does not say which of the writes were lost.
func (w *Writable) Sync() error {
	if w.closed.Load() {
		return fmt.Errorf("sync: %w", errClosed)
	}
	if err := w.syncFailed(); err != nil {
		return err
	}
	if err := w.sync(); err != nil {
		return w.failSync(err)
	}
	return w.syncFailed()
}

func (w *Writable) sync() error {
	// A discard's record says nothing where there are data.
	if w.discards != nil {
		if err := w.discards.sync(w.discards.all(), w.fdatasync); err != nil {
			return err
		}
	}
	var end int64
	if w.log != nil {
		w.logMu.Lock()
		end = w.logEnd
		w.logMu.Unlock()
	}
	// The data before the index log: a durable record must never point to data
	// that are not.
	if err := w.fdatasync(w.data); err != nil {
		return fmt.Errorf("sync data: %w", err)
	}
	if w.log == nil {
		return nil
	}
	if err := w.fdatasync(w.log); err != nil {
		return fmt.Errorf("sync index log: %w", err)
	}
	if err := w.writeSynced(end); err != nil {
		return fmt.Errorf("index log: write header: %w", err)
	}
	return nil
}

// failSync notes the first failure to sync, and returns it.
func (w *Writable) failSync(err error) error {
	w.syncMu.Lock()
	defer w.syncMu.Unlock()
	if w.syncErr == nil {
		w.syncErr = err
	}
	return w.syncErr
}

func (w *Writable) syncFailed() error {
	w.syncMu.Lock()
	defer w.syncMu.Unlock()
	return w.syncErr
}

// Resize sets the size of the device in bytes, a multiple of SectorSize, and
// writes it to the layer's headers. A device cannot get smaller than what is
// mapped of it.
func (w *Writable) Resize(size int64) error {
	w.gate.Lock()
	defer w.gate.Unlock()
	if err := w.writable("resize", 0, 0); err != nil {
		return err
	}
	if err := checkSize(size); err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	if all := w.ext.all(); len(all) > 0 && all[len(all)-1].end()*SectorSize > size {
		return fmt.Errorf("resize to %d bytes: the layer maps up to %d: %w",
			size, all[len(all)-1].end()*SectorSize, syscall.EINVAL)
	}
	h := w.hdr
	h.virtualSize = uint64(size)
	if _, err := w.data.WriteAt(h.append(nil)[:headerSize], 0); err != nil {
		return fmt.Errorf("resize: write header: %w", err)
	}
	if w.log == nil {
		if err := w.data.Truncate(headerSpace + size); err != nil {
			return fmt.Errorf("resize: %w", err)
		}
	} else if _, err := w.log.WriteAt(logHeader(h).append(nil)[:headerSize], 0); err != nil {
		return fmt.Errorf("resize: write index log header: %w", err)
	}
	w.hdr.virtualSize = h.virtualSize
	w.vsize.Store(size)
	return nil
}

// Close closes the layer's files, without syncing them. Calls in progress
// finish or fail with an error that wraps os.ErrClosed. Calling it again does
// nothing.
func (w *Writable) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	err := w.data.Close()
	if w.log != nil {
		err = errors.Join(err, w.log.Close())
	}
	if w.discards != nil {
		err = errors.Join(err, w.discards.f.Close())
	}
	return err
}

// create writes the header of a new file, which must be empty.
func create(f *os.File, h header) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != 0 {
		return fmt.Errorf("%s: not empty, a new layer would destroy it: %w", f.Name(), os.ErrExist)
	}
	_, err = f.WriteAt(h.append(nil), 0)
	return err
}

// openHeader reads the header of a file of a writable layer, with the size of
// the file.
func openHeader(f *os.File) (header, int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return header{}, 0, err
	}
	var buf [headerSpace]byte
	if err := readFull(f, buf[:], 0); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %w", ErrCorrupt, err)
		}
		return header{}, 0, fmt.Errorf("%s: read header: %w", f.Name(), err)
	}
	h, err := parseHeader(buf[:])
	if err == nil && !h.is(flagHeader, flagHeader) {
		err = fmt.Errorf("a trailer: %w", ErrCorrupt)
	}
	if err == nil && h.virtualSize%SectorSize != 0 {
		err = fmt.Errorf("virtual size of %d bytes: not a multiple of %d: %w", h.virtualSize, SectorSize, ErrCorrupt)
	}
	if err != nil {
		return header{}, 0, fmt.Errorf("%s: read header: %w", f.Name(), err)
	}
	return h, fi.Size(), nil
}

// sealedAt tells whether the data file ends with the trailer of h's own layer
// and returns where its index begins, in bytes.
func sealedAt(f *os.File, size int64, h *header) (indexOffset int64, ok bool) {
	ht, err := readTrailer(f, size)
	if err != nil || ht.uuid != h.uuid || ht.parentUUID != h.parentUUID ||
		ht.virtualSize != h.virtualSize || ht.is(flagSparse, flagSparse) != h.is(flagSparse, flagSparse) {
		return 0, false
	}
	n := (int64(ht.indexSize)*entrySize + SectorSize - 1) / SectorSize * SectorSize
	if ht.indexSize > uint64(size) || int64(ht.indexOffset) != size-headerSpace-n {
		return 0, false
	}
	return int64(ht.indexOffset), true
}

// control runs fn on the descriptor of f, which stays open meanwhile.
func control(f *os.File, fn func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := c.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

func fdatasync(f *os.File) error {
	return control(f, func(fd int) error {
		for {
			if err := unix.Fdatasync(fd); err != unix.EINTR {
				return err
			}
		}
	})
}
