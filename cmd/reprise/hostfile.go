package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// A hostFile is a file as it is to be on the host.
type hostFile struct {
	path string
	mode os.FileMode
	open func() (io.ReadCloser, error)
}

// oldSuffix marks what a file was before it was replaced.
const oldSuffix = ".old"

// same tells whether the file is there already.
func (f *hostFile) same() (bool, error) {
	has, err := os.Open(f.path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer has.Close()
	want, err := f.open()
	if err != nil {
		return false, err
	}
	defer want.Close()
	return equal(has, want)
}

// equal compares what two readers give.
func equal(a, b io.Reader) (bool, error) {
	const size = 256 << 10
	x, y := bufio.NewReaderSize(a, size), bufio.NewReaderSize(b, size)
	for {
		p, perr := x.Peek(size)
		q, qerr := y.Peek(size)
		if !bytes.Equal(p, q) {
			return false, nil
		}
		for _, err := range []error{perr, qerr} {
			if err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
		}
		if len(p) < size {
			return true, nil
		}
		_, _ = x.Discard(size)
		_, _ = y.Discard(size)
	}
}

// write makes the file as it is to be, in one step, and tells whether it was
// otherwise. What was there stays beside it, see [replaced].
func (f *hostFile) write() (changed bool, err error) {
	same, err := f.same()
	if err != nil || same {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil {
		return false, err
	}
	next, err := f.next()
	if err != nil {
		return false, fmt.Errorf("write %s: %w", f.path, err)
	}
	if err := keepOld(f.path); err != nil {
		return false, errors.Join(err, os.Remove(next))
	}
	return true, os.Rename(next, f.path)
}

// next writes the file under a name of its own.
func (f *hostFile) next() (name string, err error) {
	from, err := f.open()
	if err != nil {
		return "", err
	}
	defer from.Close()
	to, err := os.CreateTemp(filepath.Dir(f.path), ".reprise-*")
	if err != nil {
		return "", err
	}
	_, err = io.Copy(to, from)
	err = errors.Join(err, to.Chmod(f.mode), to.Sync(), to.Close())
	if err != nil {
		return "", errors.Join(err, os.Remove(to.Name()))
	}
	return to.Name(), nil
}

// keepOld gives a file that is there a second name.
func keepOld(path string) error {
	if err := removeOld(path); err != nil {
		return err
	}
	if err := os.Link(path, path+oldSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func removeOld(path string) error {
	if err := os.Remove(path + oldSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// replaced are the paths of files that were written, each with what was there
// before, if anything was, beside it.
type replaced []string

// back undoes the writing.
func (r replaced) back() (err error) {
	for _, path := range r {
		e := os.Rename(path+oldSuffix, path)
		if errors.Is(e, os.ErrNotExist) {
			e = os.Remove(path)
		}
		err = errors.Join(err, e)
	}
	return err
}

// forget removes what was there before.
func (r replaced) forget() (err error) {
	for _, path := range r {
		err = errors.Join(err, removeOld(path))
	}
	return err
}
