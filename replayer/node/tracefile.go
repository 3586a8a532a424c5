package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A TraceFile is a trace that is being recorded into a file. The file gets its
// name with the first bytes that are written, the trace's header: under its name
// there is a trace at every moment, or nothing. Close it.
type TraceFile struct {
	f     *os.File
	path  string
	named bool
}

// CreateTrace makes the file of a trace. The error wraps [fs.ErrExist] where
// there is something of that name.
func CreateTrace(path string) (*TraceFile, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o666)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR):
		// The file system cannot: it has its name at once.
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		return &TraceFile{f: f, path: path, named: true}, err
	case err != nil:
		return nil, &fs.PathError{Op: "create", Path: path, Err: err}
	}
	return &TraceFile{f: os.NewFile(uintptr(fd), path), path: path}, nil
}

// Name is the path of the file.
func (t *TraceFile) Name() string { return t.path }

// Write implements [io.Writer].
func (t *TraceFile) Write(p []byte) (int, error) {
	n, err := t.f.Write(p)
	if err != nil || t.named || n == 0 {
		return n, err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", t.f.Fd())
	if err := unix.Linkat(unix.AT_FDCWD, from, unix.AT_FDCWD, t.path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return n, &fs.PathError{Op: "create", Path: t.path, Err: err}
	}
	t.named = true
	return n, nil
}

// Close closes the file. One into which nothing was written is gone.
func (t *TraceFile) Close() error {
	fi, err := t.f.Stat()
	if err == nil && fi.Size() == 0 && t.named {
		err = os.Remove(t.path)
	}
	return errors.Join(err, t.f.Close())
}

var _ io.WriteCloser = (*TraceFile)(nil)
