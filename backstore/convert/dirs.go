package convert

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// This file holds how an applier finds, empties and finishes directories.

const openDir = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC

// open opens the directory name under the root.
func (a *applier) open(name string) (int, error) {
	if name == "" {
		name = "."
	}
	how := unix.OpenHow{Flags: openDir, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(a.root, name, &how)
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// enter makes dir the current directory, creating it where it is missing, and
// notes the times that it is to keep.
func (a *applier) enter(dir string) error {
	if a.dir >= 0 && dir == a.dirPath {
		return nil
	}
	a.forget()
	fd, err := a.open(dir)
	if errors.Is(err, unix.ENOENT) {
		if err = a.mkdirAll(dir, 0); err == nil {
			fd, err = a.open(dir)
		}
	}
	if err != nil {
		return fmt.Errorf("directory /%s: %w", dir, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return err
	}
	a.dir, a.dirPath, a.dirIno = fd, dir, st.Ino
	a.keepTimes(dir, &st)
	return a.markAncestors(dir)
}

// forget closes the current directory: after something was removed, its path
// may mean another one.
func (a *applier) forget() {
	if a.dir >= 0 {
		unix.Close(a.dir)
		a.dir = -1
	}
}

func (a *applier) keepTimes(dir string, st *unix.Stat_t) {
	if _, ok := a.times[st.Ino]; !ok {
		a.times[st.Ino] = dirTimes{path: dir, ts: [2]unix.Timespec{st.Atim, st.Mtim}}
	}
}

// mkdirAll makes dir and what is missing above it, with time 0.
func (a *applier) mkdirAll(dir string, links int) error {
	if links > maxLinks {
		return unix.ELOOP
	}
	if dir == "" {
		return nil
	}
	up, base := path.Split(dir)
	up = strings.TrimSuffix(up, "/")
	parent, err := a.open(up)
	if errors.Is(err, unix.ENOENT) {
		if err = a.mkdirAll(up, links); err == nil {
			parent, err = a.open(up)
		}
	}
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	return a.mkdir(parent, up, base, links)
}

func (a *applier) mkdir(parent int, up, base string, links int) error {
	var st unix.Stat_t
	if err := unix.Fstat(parent, &st); err != nil {
		return err
	}
	a.keepTimes(up, &st)
	err := unix.Mkdirat(parent, base, 0o755)
	if errors.Is(err, unix.EEXIST) {
		return a.mkdirTarget(parent, up, base, links)
	}
	if err != nil {
		return err
	}
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	a.times[st.Ino] = dirTimes{path: path.Join(up, base)}
	return nil
}

// mkdirTarget makes the directory that a dangling symbolic link points to.
func (a *applier) mkdirTarget(parent int, up, base string, links int) error {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(parent, base, buf)
	if errors.Is(err, unix.EINVAL) {
		return nil // not a link: made meanwhile through another name
	}
	if err != nil {
		return err
	}
	target := string(buf[:n])
	if !path.IsAbs(target) {
		target = path.Join("/", up, target)
	}
	target = cleanName(target)
	if fd, err := a.open(target); err == nil {
		return unix.Close(fd)
	}
	return a.mkdirAll(target, links+1)
}

// markAncestors notes dir and all above it as brought by this layer, as an
// overlay's upper directory would have them.
func (a *applier) markAncestors(dir string) error {
	for dir != "" {
		if _, ok := a.marked[dir]; ok {
			return nil
		}
		a.marked[dir] = struct{}{}
		up, base := path.Split(dir)
		up = strings.TrimSuffix(up, "/")
		fd, err := a.open(up)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		if err != nil {
			return err
		}
		a.made[dirent{st.Ino, base}] = struct{}{}
		dir = up
	}
	return nil
}

// whiteout hides what lower layers have under name in the current directory.
func (a *applier) whiteout(name string) error {
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("invalid whiteout of %q", name)
	}
	if _, mine := a.made[dirent{a.dirIno, name}]; !mine {
		return a.remove(a.dir, name)
	}
	fd, err := unix.Openat(a.dir, name, openDir|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOENT) {
		return nil // the layer's own file
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	return a.opaque(fd, st.Ino)
}

// opaque removes from the directory fd all that this layer did not bring.
func (a *applier) opaque(fd int, ino uint64) error {
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, mine := a.made[dirent{ino, name}]; !mine {
			if err := a.remove(fd, name); err != nil {
				return err
			}
			continue
		}
		if err := a.opaqueChild(fd, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (a *applier) opaqueChild(fd int, name string) error {
	child, err := unix.Openat(fd, name, openDir|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(child)
	var st unix.Stat_t
	if err := unix.Fstat(child, &st); err != nil {
		return err
	}
	a.keepTimes(path.Join(a.dirPath, name), &st)
	return a.opaque(child, st.Ino)
}

// remove deletes name from the directory fd, with everything below it. That
// nothing is there is no error.
func (a *applier) remove(fd int, name string) error {
	err := a.unlink(fd, name, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	if err := a.removeDir(fd, name); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

func (a *applier) removeDir(fd int, name string) error {
	child, err := unix.Openat(fd, name, openDir|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(child)
	names, err := readNames(child)
	if err != nil {
		return err
	}
	for _, n := range names {
		err := a.unlink(child, n, 0)
		if errors.Is(err, unix.EISDIR) {
			err = a.removeDir(child, n)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
	}
	return a.unlink(fd, name, unix.AT_REMOVEDIR)
}

// unlink removes a name but holds what it meant.
func (a *applier) unlink(dir int, name string, flags int) error {
	fd, err := a.hold(dir, name)
	if err != nil {
		return err
	}
	err = unix.Unlinkat(dir, name, flags)
	if fd < 0 {
		return err
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	a.held = append(a.held, fd)
	return nil
}

// hold opens what is about to be removed, so that its inode and blocks are
// freed only when the whole layer has been applied. Without a journal ext4
// avoids inodes that were freed lately, but only if it happens to find that in
// its buffers, so that a new file would get now the one and now another.
// -1 is nothing: there are limits to how much can be held.
func (a *applier) hold(dir int, name string) (int, error) {
	if len(a.held) >= a.maxHeld {
		return -1, nil
	}
	return unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// maxHeld leaves descriptors for all else, and bounds what the inodes in the
// kernel's memory take to some 150 MB.
func maxHeld() int {
	const most, others = 100_000, 1000
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		return 0
	}
	return int(max(0, min(int64(min(lim.Cur, most+others)), most+others)-others))
}

// release frees what is held, in the order of its removal.
func (a *applier) release() {
	for _, fd := range a.held {
		unix.Close(fd)
	}
	a.held = nil
}

func readNames(fd int) ([]string, error) {
	dup, err := unix.Openat(fd, ".", openDir, 0)
	if err != nil {
		return nil, err
	}
	d := os.NewFile(uintptr(dup), "directory")
	defer d.Close()
	return d.Readdirnames(-1)
}

// restoreTimes gives every directory that was touched the times it is to have.
func (a *applier) restoreTimes() error {
	a.forget()
	for ino, t := range a.times {
		fd, err := a.open(t.path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // removed by a later entry
		}
		if err != nil {
			return fmt.Errorf("directory /%s: %w", t.path, err)
		}
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil && st.Ino == ino {
			err = unix.UtimesNanoAt(fd, ".", t.ts[:], unix.AT_SYMLINK_NOFOLLOW)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("directory /%s: set times: %w", t.path, err)
		}
	}
	return nil
}
