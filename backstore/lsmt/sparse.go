package lsmt

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// CreateSparse makes a sparse writable layer of an empty file, opened for
// reading and writing, on a file system that keeps holes. It owns the file if
// it succeeds.
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
	if err != nil {
		return nil, fmt.Errorf("create sparse layer: %w", err)
	}
	return newWritable(data, nil, h), nil
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
// writing. It owns the file if it succeeds. What is not a hole of the file is
// Data; ranges that had been discarded are Hole again.
func OpenSparse(data *os.File) (*Writable, error) {
	w, err := openSparse(data)
	if err != nil {
		return nil, fmt.Errorf("open sparse layer: %w", err)
	}
	return w, nil
}

func openSparse(data *os.File) (*Writable, error) {
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
	if err := w.scan(); err != nil {
		return nil, fmt.Errorf("%s: find holes: %w", data.Name(), err)
	}
	return w, nil
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

// discardSparse is Discard; no write is going on.
func (w *Writable) discardSparse(off, n int64) error {
	err := control(w.data, func(fd int) error {
		const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		for {
			if err := unix.Fallocate(fd, mode, headerSpace+off, n); err != unix.EINTR {
				return err
			}
		}
	})
	if err != nil {
		return fmt.Errorf("discard %d bytes at %d: punch hole: %w", n, off, err)
	}
	s := off / SectorSize
	w.insert(extent{s, n / SectorSize, zeroAt(firstSector + s)}, maxLength)
	return nil
}
