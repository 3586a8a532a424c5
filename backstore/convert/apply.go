package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names that mark deletions, from the OCI image specification (layer.md) and
// from aufs, where they come from.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"

	paxXattr     = "SCHILY.xattr."
	paxGNUSparse = "GNU.sparse."
)

// maxLinks bounds the symbolic links that are followed to make a parent
// directory, as the kernel bounds those of a path.
const maxLinks = 40

// An applier lays an OCI layer tar over a mounted file system.
//
// Every path is resolved by the kernel with RESOLVE_IN_ROOT under root, so
// that neither "..", an absolute name nor a symbolic link leads out of it.
// The result is what an overlay mount of the layer over the lower layers
// shows:
//
//   - a whiteout or an opaque marker hides what lower layers have, whatever
//     its place in the tar, and never what its own layer brings;
//   - an entry replaces what is there, except that a directory over a
//     directory keeps its children and takes all attributes of the entry;
//   - a hard link may point into lower layers; its header's attributes go to
//     the shared inode;
//   - a directory has the times of its own entry, or, without one, the times
//     that it had, whatever is created or removed in it. A parent directory
//     that no entry describes is made with mode 0755, owner 0:0 and time 0.
//
// trusted.* attributes are left out, because overlayfs acts on them.
type applier struct {
	root int // descriptor of the root directory
	buf  []byte

	// The parent directory in use; consecutive entries mostly share it.
	dir     int
	dirPath string
	dirIno  uint64

	held    []int // what was removed; see hold
	maxHeld int

	times  map[uint64]dirTimes // by inode: what each touched directory gets in the end
	made   map[dirent]struct{} // what this layer brings
	marked map[string]struct{} // directories whose ancestors are in made
	result applied
}

// A dirent is one name in one directory.
type dirent struct {
	dir  uint64
	name string
}

type dirTimes struct {
	path string
	ts   [2]unix.Timespec // access, modification
}

// applied is what a layer held.
type applied struct {
	Entries  int      `json:"entries"`
	Bytes    int64    `json:"bytes"` // of file content
	Warnings []string `json:"warnings,omitempty"`
}

// maxWarnings bounds what is kept of attributes that could not be set.
const maxWarnings = 20

// applyTar reads the tar r and lays it over the directory root. It reads up to
// the tar's end mark, not to the end of r.
func applyTar(ctx context.Context, root int, r io.Reader) (applied, error) {
	a := &applier{
		root:    root,
		buf:     make([]byte, 1<<20),
		dir:     -1,
		maxHeld: maxHeld(),
		times:   map[uint64]dirTimes{},
		made:    map[dirent]struct{}{},
		marked:  map[string]struct{}{},
	}
	defer a.forget()
	defer a.release()
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return a.result, err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return a.result, fmt.Errorf("read tar: %w", err)
		}
		if err := a.entry(hdr, tr); err != nil {
			return a.result, fmt.Errorf("apply %q: %w", hdr.Name, err)
		}
		a.result.Entries++
	}
	a.release()
	return a.result, a.restoreTimes()
}

func (a *applier) entry(hdr *tar.Header, data io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name := cleanName(hdr.Name)
	if name == "" {
		return a.rootEntry(hdr)
	}
	dir, base := path.Split(name)
	if isMeta(name) && base != whiteoutOpaque {
		return nil // bookkeeping of aufs
	}
	if err := a.enter(strings.TrimSuffix(dir, "/")); err != nil {
		return err
	}
	switch {
	case base == whiteoutOpaque:
		return a.opaque(a.dir, a.dirIno)
	case strings.HasPrefix(base, whiteoutPrefix):
		return a.whiteout(base[len(whiteoutPrefix):])
	}
	if err := a.create(base, name, hdr, data); err != nil {
		return err
	}
	a.made[dirent{a.dirIno, base}] = struct{}{}
	return nil
}

// cleanName makes a name relative to the root; the root itself is "".
func cleanName(name string) string {
	return path.Clean("/" + name)[1:]
}

func isMeta(name string) bool {
	return strings.HasPrefix(name, whiteoutMeta) || strings.Contains(name, "/"+whiteoutMeta)
}

// rootEntry takes over the attributes of the root directory's own entry.
func (a *applier) rootEntry(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return errors.New("the root is not a directory")
	}
	if err := a.enter(""); err != nil {
		return err
	}
	return a.dirAttributes(".", "", hdr)
}

// create makes the entry base in the current directory; name is its whole path.
func (a *applier) create(base, name string, hdr *tar.Header, data io.Reader) error {
	switch hdr.Typeflag {
	case tar.TypeDir:
		return a.directory(base, name, hdr)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return a.file(base, hdr, data)
	case tar.TypeLink:
		return a.hardlink(base, hdr)
	case tar.TypeSymlink:
		if err := a.replacing(base, func() error { return unix.Symlinkat(hdr.Linkname, a.dir, base) }); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		mode, dev, err := nodeOf(hdr)
		if err != nil {
			return err
		}
		if err := a.replacing(base, func() error { return unix.Mknodat(a.dir, base, mode, dev) }); err != nil {
			return err
		}
	default:
		return fmt.Errorf("tar entry of type %q: %w", hdr.Typeflag, errors.ErrUnsupported)
	}
	return a.attributes(base, hdr)
}

// replacing runs make, which creates base exclusively; where base exists it is
// removed and make run again.
func (a *applier) replacing(base string, make func() error) error {
	err := make()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := a.remove(a.dir, base); err != nil {
		return err
	}
	return make()
}

func nodeOf(hdr *tar.Header) (mode uint32, dev int, err error) {
	// The kernel's own split: 12 bits of major, 20 of minor.
	if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
		return 0, 0, fmt.Errorf("device number %d:%d out of range", hdr.Devmajor, hdr.Devminor)
	}
	switch hdr.Typeflag {
	case tar.TypeChar:
		mode = unix.S_IFCHR
	case tar.TypeBlock:
		mode = unix.S_IFBLK
	default:
		return unix.S_IFIFO | 0o600, 0, nil
	}
	return mode | 0o600, int(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))), nil
}

func (a *applier) directory(base, name string, hdr *tar.Header) error {
	err := unix.Mkdirat(a.dir, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err = unix.Fstatat(a.dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if err = a.remove(a.dir, base); err != nil {
				return err
			}
			err = unix.Mkdirat(a.dir, base, 0o700)
		} else {
			err = a.stripXattrs(base)
		}
	}
	if err != nil {
		return err
	}
	return a.dirAttributes(base, name, hdr)
}

// dirAttributes sets all but the times, which are noted for the end.
func (a *applier) dirAttributes(base, name string, hdr *tar.Header) error {
	if err := a.attributes(base, hdr); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(a.dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	a.times[st.Ino] = dirTimes{path: name, ts: timesOf(hdr)}
	return nil
}

func (a *applier) file(base string, hdr *tar.Header, data io.Reader) error {
	var fd int
	err := a.replacing(base, func() (err error) {
		fd, err = unix.Openat(a.dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	if err := a.content(f, hdr, data); err != nil {
		return err
	}
	a.result.Bytes += hdr.Size
	return a.attributes(base, hdr)
}

// content fills a new file. Its blocks are allocated here, in the order of the
// tar and from one thread, so that neither the kernel's write-back nor its
// timing decides where a file lies.
func (a *applier) content(f *os.File, hdr *tar.Header, data io.Reader) error {
	if isSparse(hdr) {
		return a.sparseContent(f, hdr, data)
	}
	if hdr.Size > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, hdr.Size); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("allocate %d bytes: %w", hdr.Size, err)
		}
	}
	for left := hdr.Size; left > 0; {
		p := a.buf[:min(left, int64(len(a.buf)))]
		if _, err := io.ReadFull(data, p); err != nil {
			return fmt.Errorf("read tar: %w", noEOF(err))
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
		left -= int64(len(p))
	}
	return nil
}

func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, paxGNUSparse) {
			return true
		}
	}
	return false
}

// sparseContent leaves the zero blocks of a sparse file unallocated.
func (a *applier) sparseContent(f *os.File, hdr *tar.Header, data io.Reader) error {
	const block = 4096
	if err := f.Truncate(hdr.Size); err != nil {
		return err
	}
	for off := int64(0); off < hdr.Size; {
		p := a.buf[:min(hdr.Size-off, block)]
		if _, err := io.ReadFull(data, p); err != nil {
			return fmt.Errorf("read tar: %w", noEOF(err))
		}
		if !allZero(p) {
			if _, err := f.WriteAt(p, off); err != nil {
				return err
			}
		}
		off += int64(len(p))
	}
	return nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (a *applier) hardlink(base string, hdr *tar.Header) error {
	tdir, tbase := path.Split(cleanName(hdr.Linkname))
	if tbase == "" {
		return fmt.Errorf("hard link to %q", hdr.Linkname)
	}
	target, err := a.open(tdir)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", hdr.Linkname, err)
	}
	defer unix.Close(target)
	link := func() error { return unix.Linkat(target, tbase, a.dir, base, 0) }
	err = link()
	if errors.Is(err, unix.EEXIST) {
		if sameFile(target, tbase, a.dir, base) {
			return a.attributes(base, hdr)
		}
		if err = a.remove(a.dir, base); err == nil {
			err = link()
		}
	}
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", hdr.Linkname, err)
	}
	return a.attributes(base, hdr)
}

func sameFile(dir1 int, name1 string, dir2 int, name2 string) bool {
	var s1, s2 unix.Stat_t
	return unix.Fstatat(dir1, name1, &s1, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		unix.Fstatat(dir2, name2, &s2, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		s1.Dev == s2.Dev && s1.Ino == s2.Ino
}

// attributes sets owner, extended attributes, mode and times, in this order:
// a change of owner clears set-id bits and capabilities, an access control
// list changes the mode.
func (a *applier) attributes(base string, hdr *tar.Header) error {
	if err := unix.Fchownat(a.dir, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set owner %d:%d: %w", hdr.Uid, hdr.Gid, err)
	}
	if err := a.setXattrs(base, hdr); err != nil {
		return err
	}
	symlink := hdr.Typeflag == tar.TypeSymlink
	if hdr.Typeflag == tar.TypeLink {
		// The target may be a symbolic link, which has no mode of its own.
		var st unix.Stat_t
		if err := unix.Fstatat(a.dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		symlink = st.Mode&unix.S_IFMT == unix.S_IFLNK
	}
	if !symlink {
		if err := unix.Fchmodat(a.dir, base, uint32(hdr.Mode)&0o7777, 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if hdr.Typeflag == tar.TypeDir {
		return nil
	}
	ts := timesOf(hdr)
	if err := unix.UtimesNanoAt(a.dir, base, ts[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

func timesOf(hdr *tar.Header) [2]unix.Timespec {
	m := unix.Timespec{Sec: hdr.ModTime.Unix(), Nsec: int64(hdr.ModTime.Nanosecond())}
	if hdr.AccessTime.IsZero() {
		return [2]unix.Timespec{m, m}
	}
	return [2]unix.Timespec{{Sec: hdr.AccessTime.Unix(), Nsec: int64(hdr.AccessTime.Nanosecond())}, m}
}

// procPath names an entry of the current directory for the calls that take no
// directory descriptor. It must not follow the last component.
func (a *applier) procPath(base string) string {
	return "/proc/self/fd/" + strconv.Itoa(a.dir) + "/" + base
}

func (a *applier) setXattrs(base string, hdr *tar.Header) error {
	// Sorted, because their order decides where the inode keeps them.
	for _, record := range slices.Sorted(maps.Keys(hdr.PAXRecords)) {
		key, ok := strings.CutPrefix(record, paxXattr)
		if !ok {
			continue
		}
		value := hdr.PAXRecords[record]
		if strings.HasPrefix(key, "trusted.") {
			a.warn(hdr.Name, key, errors.New("trusted attributes are not taken from an archive"))
			continue
		}
		err := unix.Lsetxattr(a.procPath(base), key, []byte(value), 0)
		switch {
		case errors.Is(err, unix.EOPNOTSUPP),
			// user.* exists only on files and directories.
			errors.Is(err, unix.EPERM) && strings.HasPrefix(key, "user."):
			a.warn(hdr.Name, key, err)
		case err != nil:
			return fmt.Errorf("set attribute %s (%d bytes): %w", key, len(value), err)
		}
	}
	return nil
}

func (a *applier) warn(name, key string, err error) {
	if len(a.result.Warnings) < maxWarnings {
		a.result.Warnings = append(a.result.Warnings, fmt.Sprintf("%s: attribute %s left out: %v", name, key, err))
	}
}

// stripXattrs removes what a directory of a lower layer had.
func (a *applier) stripXattrs(base string) error {
	p := a.procPath(base)
	n, err := unix.Llistxattr(p, nil)
	if n == 0 || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return err
	}
	list := make([]byte, n)
	if n, err = unix.Llistxattr(p, list); err != nil {
		return err
	}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if err := unix.Lremovexattr(p, key); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("remove attribute %s: %w", key, err)
		}
	}
	return nil
}
