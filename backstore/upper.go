package backstore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// DiscardsSuffix is what the name of a sparse writable layer's discard log has
// behind the layer's own.
const DiscardsSuffix = ".discards"

// CreateUpper makes a sparse writable layer at path, with its discard log
// beside it, for a device of size bytes. What is there is replaced. When it
// returns the files are durable, so that a Sync of the layer is all that its
// content needs.
func CreateUpper(path string, size int64) (*lsmt.Writable, error) {
	data, discards, err := openPair(path, os.O_TRUNC)
	if err != nil {
		return nil, fmt.Errorf("create upper layer: %w", err)
	}
	w, err := lsmt.CreateSparse(data, &lsmt.WritableOptions{VirtualSize: size, Discards: discards})
	if err != nil {
		return nil, fmt.Errorf("create upper layer %s: %w", path, errors.Join(err, data.Close(), discards.Close()))
	}
	if err = w.Sync(); err == nil {
		err = syncDir(path)
	}
	if err != nil {
		return nil, fmt.Errorf("create upper layer %s: %w", path, errors.Join(err, w.Close()))
	}
	return w, nil
}

// syncDir makes the names in path's folder durable.
func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// OpenUpper opens the sparse writable layer at path with its discard log, as the
// process that has written to it, killed or not, has left it. A layer without a
// log gets one.
func OpenUpper(path string) (*lsmt.Writable, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("open upper layer: %w", err)
	}
	data, discards, err := openPair(path, 0)
	if err != nil {
		return nil, fmt.Errorf("open upper layer: %w", err)
	}
	var w *lsmt.Writable
	if err = syncDir(path); err == nil { // the layer will be bound to a log that may be new
		w, err = lsmt.OpenSparse(data, discards)
	}
	if err != nil {
		return nil, fmt.Errorf("open upper layer %s: %w", path, errors.Join(err, data.Close(), discards.Close()))
	}
	return w, nil
}

// openPair opens data file and discard log. Truncating, it does that to the log
// last: one without its data file is nothing, one of another would be believed.
func openPair(path string, flags int) (data, discards *os.File, err error) {
	if data, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|flags, 0o600); err != nil {
		return nil, nil, err
	}
	if discards, err = os.OpenFile(path+DiscardsSuffix, os.O_RDWR|os.O_CREATE|flags, 0o600); err != nil {
		return nil, nil, errors.Join(err, data.Close())
	}
	return data, discards, nil
}

// RemoveUpper removes the sparse writable layer at path, if it is there.
func RemoveUpper(path string) error { return removeFiles(path, path+DiscardsSuffix) }

// below is the device of an image without its writable layer, and zeros behind
// its end.
type below struct{ im *Image }

func (b below) ReadAt(p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(0, b.im.size-off)))
	if n > 0 {
		if err := b.im.readWith(b.im.index.Lookup, p[:n], off); err != nil {
			return 0, err
		}
	}
	clear(p[n:])
	return len(p), nil
}

var _ io.ReaderAt = below{}
