package backstore

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What of a data file is locked. The lock on use is held shared while a blob is
// open and taken exclusively to take bytes away from it; the lock on making is
// held while the files beside it are looked at and made.
const (
	lockUse = iota
	lockMaking
)

// The wait for another process is bounded, in tries that are lockPause apart: it
// may be stopped, or stuck while it dies.
const (
	lockPause      = 10 * time.Millisecond
	makingPatience = 200
	usePatience    = 1000
)

// lockFile changes this descriptor's lock on the use of f, if that can be done
// at once: F_RDLCK while a blob is open, F_WRLCK to take bytes away from it.
// Open file description locks change atomically and do not conflict with
// themselves.
func lockFile(f *os.File, kind int16) error { return lockByte(f, lockUse, kind, 1) }

func lockByte(f *os.File, at int64, kind int16, patience int) error {
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: at, Len: 1})
		switch {
		case err == unix.EINTR:
			continue
		case err != unix.EAGAIN && err != unix.EACCES:
			return err
		}
		if patience--; patience <= 0 {
			return err
		}
		time.Sleep(lockPause)
	}
}

// alone reports whether nobody else has the blob open. The caller has the lock
// on making, so that nobody else comes in.
func alone(f *os.File) bool {
	if lockFile(f, unix.F_WRLCK) != nil {
		return false
	}
	return lockFile(f, unix.F_RDLCK) == nil
}

// openShared opens a data file, makes it if need be, and holds it against
// removal by other processes. With making it also has the lock on making.
func openShared(path string) (f *os.File, making bool, err error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, false, err
		}
		making := lockByte(f, lockMaking, unix.F_WRLCK, makingPatience) == nil
		if err := lockByte(f, lockUse, unix.F_RDLCK, usePatience); err != nil {
			_ = f.Close()
			return nil, false, fmt.Errorf("lock %s: %w", path, err)
		}
		have, err := f.Stat()
		if err == nil {
			if now, e := os.Stat(path); e == nil && os.SameFile(have, now) {
				return f, making, nil
			}
		}
		_ = f.Close() // removed between open and lock
		if err != nil {
			return nil, false, err
		}
	}
}
