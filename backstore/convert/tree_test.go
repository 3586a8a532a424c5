package convert

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// listTree lists what is below root, one line a file, as the vectors have it:
// path, type, mode, uid, gid, size, mtime, nlink, then the content's sha256,
// the link's target or the device number, and the extended attributes. The
// size of a directory is left out. ns adds the nanoseconds of the mtime.
func listTree(t testing.TB, root string, ns bool) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(root+"/.", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		line, err := treeLine(root, path, ns)
		lines = append(lines, line)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

func treeLine(root, path string, ns bool) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", err
	}
	typ, size, what, err := treeContent(path, &st)
	if err != nil {
		return "", err
	}
	xattrs, err := treeXattrs(path)
	if err != nil {
		return "", err
	}
	name := strings.TrimPrefix(path, root)
	if name == "/." {
		name = "/"
	}
	mtime := fmt.Sprint(st.Mtim.Sec)
	if ns {
		mtime += fmt.Sprintf(".%09d", st.Mtim.Nsec)
	}
	return fmt.Sprintf("%s\t%s\t%04o\t%d\t%d\t%s\t%s\t%d\t%s\t%s",
		name, typ, st.Mode&0o7777, st.Uid, st.Gid, size, mtime, st.Nlink, what, xattrs), nil
}

func treeContent(path string, st *unix.Stat_t) (typ, size, what string, err error) {
	size = fmt.Sprint(st.Size)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "d", "-", "-", nil
	case unix.S_IFLNK:
		what, err = os.Readlink(path)
		return "l", size, what, err
	case unix.S_IFREG:
		p, err := os.ReadFile(path)
		h := sha256.Sum256(p)
		return "f", size, hex.EncodeToString(h[:]), err
	case unix.S_IFIFO:
		return "p", "-", "-", nil
	}
	typ = "c"
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		typ = "b"
	}
	return typ, "-", fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

func treeXattrs(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return "-", err
	}
	var list []string
	for key := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, key, value)
		if err != nil {
			return "", err
		}
		list = append(list, key+"="+hex.EncodeToString(value[:n]))
	}
	slices.Sort(list)
	return strings.Join(list, ";"), nil
}

// readTree reads a list of the vectors.
func readTree(t *testing.T, path string) []string {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimRight(string(p), "\n"), "\n")
	lines = slices.DeleteFunc(lines, func(s string) bool { return strings.HasPrefix(s, "#") })
	slices.Sort(lines)
	return lines
}

// equalTrees compares two lists and shows the lines that differ.
func equalTrees(t *testing.T, got, want []string) {
	t.Helper()
	for _, l := range got {
		if _, ok := slices.BinarySearch(want, l); !ok {
			t.Errorf("not expected: %s", l)
		}
	}
	for _, l := range want {
		if _, ok := slices.BinarySearch(got, l); !ok {
			t.Errorf("missing:      %s", l)
		}
	}
}
