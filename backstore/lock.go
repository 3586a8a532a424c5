package backstore

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// lockFile takes or changes this descriptor's lock on f: F_RDLCK while a blob
// is open, F_WRLCK to take bytes away from it. Open file description locks
// change atomically and do not conflict with themselves.
func lockFile(f *os.File, kind int16, wait bool) error {
	cmd := unix.F_OFD_SETLK
	if wait {
		cmd = unix.F_OFD_SETLKW
	}
	for {
		err := unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: kind, Len: 1})
		if err != unix.EINTR {
			return err
		}
	}
}

// openShared opens a data file, makes it if need be, and holds it against
// removal by other processes.
func openShared(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lockFile(f, unix.F_RDLCK, true); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		have, err := f.Stat()
		if err == nil {
			if now, e := os.Stat(path); e == nil && os.SameFile(have, now) {
				return f, nil
			}
		}
		_ = f.Close() // removed between open and lock
		if err != nil {
			return nil, err
		}
	}
}
