package keeper

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The numbers that a keeper uses of its descriptor table, from the top: pinned
// programs, a gap in which a fork shuffles descriptors, what is kept.
const (
	tableSize = 8192 // at most
	tableHigh = 64   // for programs
	tableLow  = 128  // left to the rest of the process

	// A table that grows beyond its first 64 descriptors makes who asked for it
	// wait for all processors, some 10 ms. A keeper of few need not wait for that
	// before its first child: fewKept has the program below, and the table grow
	// meanwhile.
	fewKept   = 32
	firstHigh = 60 // for the program then, and for a child's lifeline
)

// shelf holds the kept descriptors. It is not safe for concurrent use.
type shelf struct {
	kept []inherited // in the order of arrival, which is that of falling numbers
	top  int         // highest number for one
	most int         // as many are kept
}

// tableLimit is how many descriptors this process may use.
func tableLimit() (int, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("getrlimit: %w", err)
	}
	return int(min(lim.Cur, tableSize)), nil
}

// newShelf is an empty one for up to most descriptors, 0 for as many as the
// limit of open files allows.
func newShelf(limit, most int) (*shelf, error) {
	top := limit/2 - 1
	room := (top - tableLow) * 3 / 4 // others may sit on some of the numbers
	if room < 1 || most > room {
		return nil, fmt.Errorf("keep %d descriptors: the limit of open files, %d, is too low", max(most, 1), limit)
	}
	if most == 0 {
		most = room
	}
	return &shelf{top: top, most: most}, nil
}

// grow has the table reach as far as descriptors will be kept.
func (s *shelf) grow(fd int) {
	if n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, s.top); err == nil {
		unix.Close(n)
	}
}

// put keeps a descriptor, which it takes over. One that is there already, by
// whatever name, is dropped.
func (s *shelf) put(name string, fd int) error {
	defer unix.Close(fd)
	if slices.ContainsFunc(s.kept, func(k inherited) bool { return sameFile(k.fd, fd) }) {
		return nil
	}
	if len(s.kept) >= s.most {
		return fmt.Errorf("keep %s: %d descriptors are kept: %w", name, s.most, unix.EXFULL)
	}
	n, err := s.below(fd)
	if err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	s.kept = append(s.kept, inherited{name, n})
	return nil
}

// below duplicates fd to a number below all kept ones.
func (s *shelf) below(fd int) (int, error) {
	for range 2 {
		n := s.top
		if len(s.kept) > 0 {
			n = s.kept[len(s.kept)-1].fd - 1
		}
		for ; n >= tableLow; n-- {
			got, err := duplicate(fd, n, n)
			if !errors.Is(err, unix.EBUSY) {
				return got, err
			}
		}
		if err := s.rise(); err != nil {
			return -1, err
		}
	}
	return -1, unix.EMFILE
}

// rise moves all up to the numbers that removed ones have left, in their order.
func (s *shelf) rise() error {
	n := s.top
	for i, k := range s.kept {
		for ; n > k.fd; n-- {
			got, err := duplicate(k.fd, n, n)
			if errors.Is(err, unix.EBUSY) {
				continue
			}
			if err != nil {
				return err
			}
			unix.Close(k.fd) // never the last: it has just been duplicated
			s.kept[i].fd = got
			break
		}
		n = s.kept[i].fd - 1
	}
	return nil
}

// duplicate makes a duplicate with a number from low to high; EBUSY if none is
// free. Dup3 would overwrite what another goroutine has just opened there.
func duplicate(fd, low, high int) (int, error) {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, low)
	if err != nil {
		return -1, err
	}
	if got > high {
		unix.Close(got)
		return -1, unix.EBUSY
	}
	return got, nil
}

// fDupfdQuery is F_DUPFD_QUERY, Linux 6.10.
const fDupfdQuery = 1024 + 3

// sameFile reports whether two descriptors are one open file. Where the kernel
// cannot tell they are not: both being kept does no harm.
func sameFile(a, b int) bool {
	if same, err := unix.FcntlInt(uintptr(a), fDupfdQuery, b); err == nil {
		return same == 1
	}
	pid := uintptr(os.Getpid())
	const kcmpFile = 0
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, kcmpFile, uintptr(a), uintptr(b), 0)
	return errno == 0 && order == 0
}

// remove takes all by a name off the shelf and closes them.
func (s *shelf) remove(name string) {
	var gone []inherited
	s.kept = slices.DeleteFunc(s.kept, func(k inherited) bool {
		if k.name == name {
			gone = append(gone, k)
			return true
		}
		return false
	})
	release(gone, releaseTime)
}

// clear closes all.
func (s *shelf) clear() {
	release(s.kept, releaseTime)
	s.kept = nil
}

// releaseTime is how long a keeper waits for files to be closed.
const releaseTime = 100 * time.Millisecond

// release closes descriptors in the order of their arrival and waits a while
// for it, for the child may count on it. If that takes long it goes on by
// itself: the last close of a device may wait for the very child that the
// keeper has to look after.
func release(fds []inherited, wait time.Duration) {
	if len(fds) == 0 {
		return
	}
	done := make(chan struct{})
	go func() {
		for _, k := range fds {
			unix.Close(k.fd)
		}
		close(done)
	}()
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// inOrder are the kept descriptors as the child gets them: by rising number,
// so that they have the same order there.
func (s *shelf) inOrder() []inherited {
	list := slices.Clone(s.kept)
	slices.Reverse(list)
	return list
}
