package recorder

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Bounds of a walk: a file system is input from outside.
const (
	maxInodes  = 1 << 22
	maxExtents = 1 << 23
	maxPath    = 4096 // bytes of a path, as in a trace
)

// MapFiles walks the mounted file system whose root, or a directory below it, is
// root, without following links or leaving the mount, and maps its files with
// FIEMAP. A file system that lacks that is an error that matches
// errors.ErrUnsupported. See [Mapper] where the process serves the device itself.
func MapFiles(ctx context.Context, root *os.File, m DeviceMap) (*Files, error) {
	w := NewMapper()
	if err := w.Work(ctx, root); err != nil {
		return nil, err
	}
	return w.Files(m)
}

// A Mapper walks a mounted file system with several threads: over a slow link a
// walk mostly waits, for one directory or inode after the other.
type Mapper struct {
	mu      sync.Mutex // guards all below
	news    *sync.Cond // of queue and working
	begun   bool
	dev     [2]uint32
	queue   []string // directories, relative to the root, not looked at yet
	working int      // directories that are being looked at
	err     error    // ends the walk

	inodes  map[uint64]*inode
	links   map[string]string
	names   int // of regular files
	extents int
	skipped int
	cause   error
}

// NewMapper makes a Mapper that has seen nothing.
func NewMapper() *Mapper {
	w := &Mapper{inodes: map[uint64]*inode{}, links: map[string]string{}}
	w.news = sync.NewCond(&w.mu)
	return w
}

// Work takes part in the walk, and returns at its end. Any number of goroutines
// may call it, each with a descriptor of the same directory, which is the root.
// It does all its work on the calling goroutine, so that it may have a thread, and a
// descriptor table, of its own.
func (w *Mapper) Work(ctx context.Context, root *os.File) error {
	fd := int(root.Fd())
	if err := w.begin(fd); err != nil {
		return err
	}
	for {
		dir, ok, err := w.take()
		if !ok {
			return err
		}
		w.done(w.look(ctx, fd, dir))
	}
}

// Files is the result, once every Work has returned.
func (w *Mapper) Files(m DeviceMap) (*Files, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, w.err
	}
	all := make([]*inode, 0, len(w.inodes))
	for _, in := range w.inodes {
		all = append(all, in)
	}
	f := build(all, w.links, m)
	f.skipped, f.cause = w.skipped, w.cause
	return f, nil
}

// begin looks at the root, the first time.
func (w *Mapper) begin(fd int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.begun {
		return w.err
	}
	w.begun = true
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		w.err = fmt.Errorf("map files: root: %w", err)
		return w.err
	}
	w.dev = [2]uint32{st.Dev_major, st.Dev_minor}
	w.inodes[st.Ino] = &inode{paths: []string{"/"}}
	w.queue = append(w.queue, ".")
	return nil
}

// take returns a directory to look at; false at the end of the walk.
func (w *Mapper) take() (dir string, ok bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) == 0 && w.working > 0 && w.err == nil {
		w.news.Wait()
	}
	if len(w.queue) == 0 || w.err != nil {
		return "", false, w.err
	}
	dir = w.queue[len(w.queue)-1]
	w.queue = w.queue[:len(w.queue)-1]
	w.working++
	return dir, true, nil
}

func (w *Mapper) done(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.working--
	if err != nil && w.err == nil {
		w.err = fmt.Errorf("map files: %w", err)
	}
	w.news.Broadcast()
}

// skip notes what could not be looked at, unless that ends the walk.
func (w *Mapper) skip(path string, err error) error {
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, errTooMany) {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.skipped++; w.cause == nil {
		w.cause = fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

var errTooMany = errors.New("more files, or parts of files, than an image has")

// look walks one directory.
func (w *Mapper) look(ctx context.Context, root int, dir string) error {
	fd, err := unix.Openat2(root, dir, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if errors.Is(err, unix.EXDEV) {
		return nil // another mount
	}
	if err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("openat2(2): needs Linux 5.6: %w", errors.ErrUnsupported)
		}
		return w.skip(dir, err)
	}
	defer unix.Close(fd)
	extents, err := fiemap(fd, false)
	if err == nil { // not every file system tells the blocks of directories
		err = w.addExtents(fd, extents)
	}
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return w.skip(dir, err)
	}
	entries, err := readDir(fd)
	if err != nil {
		return w.skip(dir, err)
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := w.entry(fd, dir, e); err != nil {
			if err := w.skip(dir+"/"+e.name, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// addExtents notes the blocks of a directory that is known.
func (w *Mapper) addExtents(fd int, extents []diskExtent) error {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO, &st); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	in := w.inodes[st.Ino]
	if in == nil || in.extents != nil {
		return nil
	}
	in.extents = extents
	return w.count(len(extents))
}

// count is called with w.mu held.
func (w *Mapper) count(extents int) error {
	w.extents += extents
	if w.extents > maxExtents || len(w.inodes) > maxInodes || len(w.links) > maxInodes || w.names > maxInodes {
		return errTooMany
	}
	return nil
}

// entry looks at one entry of the directory dir, which is open as fd.
func (w *Mapper) entry(fd int, dir string, e dirent) error {
	var st unix.Statx_t
	err := unix.Statx(fd, e.name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &st)
	if err != nil {
		return err
	}
	if [2]uint32{st.Dev_major, st.Dev_minor} != w.dev {
		return nil
	}
	at := e.name
	if dir != "." {
		at = dir + "/" + e.name
	}
	if len(at)+len("//") > maxPath {
		return unix.ENAMETOOLONG
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return w.foundDir(st.Ino, at)
	case unix.S_IFLNK:
		return w.foundLink(fd, e.name, at)
	case unix.S_IFREG:
		if w.foundFile(st.Ino, at) && st.Size > 0 {
			return w.mapFile(fd, e.name, &st)
		}
		return w.few()
	}
	return nil
}

func (w *Mapper) foundDir(ino uint64, at string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.inodes[ino] != nil {
		return fmt.Errorf("a second path of a directory: %w", unix.ELOOP)
	}
	w.inodes[ino] = &inode{paths: []string{"/" + at + "/"}}
	w.queue = append(w.queue, at)
	w.news.Signal()
	return w.count(0)
}

func (w *Mapper) foundLink(fd int, name, at string) error {
	var to [unix.PathMax]byte
	n, err := unix.Readlinkat(fd, name, to[:])
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.links["/"+at] = string(to[:n])
	return w.count(0)
}

// foundFile notes a path of a regular file, and tells whether it is its first.
func (w *Mapper) foundFile(ino uint64, at string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.names++
	in := w.inodes[ino]
	if in == nil {
		w.inodes[ino] = &inode{paths: []string{"/" + at}}
		return true
	}
	in.paths = append(in.paths, "/"+at)
	return false
}

func (w *Mapper) few() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count(0)
}

func (w *Mapper) mapFile(dir int, name string, st *unix.Statx_t) error {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	extents, err := fiemap(fd, st.Attributes&unix.STATX_ATTR_COMPRESSED != 0)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inodes[st.Ino].extents = extents
	return w.count(len(extents))
}

// A dirent is an entry of a directory.
type dirent struct {
	ino  uint64
	name string
}

// readDir lists what may be directories, files and links, in the order of their
// inodes, which is that of the disk.
func readDir(fd int) ([]dirent, error) {
	var list []dirent
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			slices.SortFunc(list, func(a, b dirent) int {
				if a.ino < b.ino {
					return -1
				}
				return 1
			})
			return list, err
		}
		list = appendEntries(list, buf[:n])
		if len(list) > maxInodes {
			return nil, errTooMany
		}
	}
}

// appendEntries parses struct linux_dirent64, see getdents64(2).
func appendEntries(list []dirent, b []byte) []dirent {
	const head = 19 // d_ino, d_off, d_reclen, d_type
	for len(b) > head {
		n := int(binary.NativeEndian.Uint16(b[16:]))
		if n <= head || n > len(b) {
			return list
		}
		name, _, _ := strings.Cut(string(b[head:n]), "\x00")
		switch b[18] {
		case unix.DT_REG, unix.DT_DIR, unix.DT_LNK, unix.DT_UNKNOWN:
			if name != "." && name != ".." && name != "" {
				list = append(list, dirent{binary.NativeEndian.Uint64(b), name})
			}
		}
		b = b[n:]
	}
	return list
}
