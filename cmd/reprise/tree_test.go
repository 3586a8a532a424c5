package main

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

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// listTree lists what is below root, one line a file, as the vectors have it:
// path, type, mode, uid, gid, size, mtime, nlink, content, xattrs. The size of
// a directory is left out.
func listTree(t testing.TB, root string) []string {
	t.Helper()
	var lines []string
	require.NoError(t, filepath.WalkDir(root+"/.", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		typ, size, what := content(t, path, &st)
		name := strings.TrimPrefix(path, root)
		if name == "/." {
			name = "/"
		}
		lines = append(lines, fmt.Sprintf("%s\t%s\t%04o\t%d\t%d\t%s\t%d\t%d\t%s\t%s",
			name, typ, st.Mode&0o7777, st.Uid, st.Gid, size, st.Mtim.Sec, st.Nlink, what, xattrs(t, path)))
		return nil
	}))
	slices.Sort(lines)
	return lines
}

func content(t testing.TB, path string, st *unix.Stat_t) (typ, size, what string) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "d", "-", "-"
	case unix.S_IFLNK:
		to, err := os.Readlink(path)
		require.NoError(t, err)
		return "l", fmt.Sprint(st.Size), to
	case unix.S_IFREG:
		return "f", fmt.Sprint(st.Size), sha(t, path)
	case unix.S_IFIFO:
		return "p", "-", "-"
	case unix.S_IFBLK:
		typ = "b"
	default:
		typ = "c"
	}
	return typ, "-", fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

func xattrs(t testing.TB, path string) string {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	require.NoError(t, err)
	var list []string
	for key := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if key == "" {
			return "-"
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, key, value)
		require.NoError(t, err)
		list = append(list, key+"="+hex.EncodeToString(value[:n]))
	}
	slices.Sort(list)
	return strings.Join(list, ";")
}

// compareTree compares what is below dir with a list of the vectors.
func compareTree(t testing.TB, list, dir string) {
	t.Helper()
	p, err := os.ReadFile(list)
	require.NoError(t, err)
	want := strings.Split(strings.TrimRight(string(p), "\n"), "\n")
	want = slices.DeleteFunc(want, func(s string) bool { return strings.HasPrefix(s, "#") })
	slices.Sort(want)
	require.Equal(t, want, listTree(t, dir))
}

// expected lists the tree that layers make, without the root itself.
func expected(layers []testLayer) []string {
	tree := map[string]testFile{}
	for _, l := range layers {
		for _, f := range l { // what a layer hides is below it, wherever in the layer that stands
			dir, name := filepath.Split(f.name)
			if hidden, ok := strings.CutPrefix(name, ".wh."); ok {
				for at := range tree {
					opaque := hidden == ".wh..opq" && strings.HasPrefix(at, dir)
					if at == dir+hidden || strings.HasPrefix(at, dir+hidden+"/") || opaque {
						delete(tree, at)
					}
				}
			}
		}
		for _, f := range l {
			if !strings.HasPrefix(filepath.Base(f.name), ".wh.") {
				tree[f.name] = f
			}
		}
	}
	var lines []string
	for name, f := range tree {
		lines = append(lines, f.line(name, tree))
	}
	slices.Sort(lines)
	return lines
}

func (f testFile) line(name string, tree map[string]testFile) string {
	typ, size, what, links, attrs := "f", fmt.Sprint(len(f.body)), "", 1, "-"
	if f.hard != "" {
		own := f.hard
		f = tree[own]
		size = fmt.Sprint(len(f.body))
	}
	for _, other := range tree {
		if other.hard != "" && (other.hard == name || tree[name].hard == other.hard) {
			links = 2
		}
	}
	switch {
	case f.dir:
		typ, size, what, links = "d", "-", "-", 2
		for at, other := range tree {
			if other.dir && filepath.Dir(at) == name {
				links++
			}
		}
	case f.link != "":
		typ, size, what = "l", fmt.Sprint(len(f.link)), f.link
	default:
		sum := sha256.Sum256(f.body)
		what = hex.EncodeToString(sum[:])
	}
	for k, v := range f.xattrs {
		attrs = k + "=" + hex.EncodeToString([]byte(v))
	}
	return fmt.Sprintf("/%s\t%s\t%04o\t%d\t%d\t%s\t%d\t%d\t%s\t%s",
		name, typ, f.perm(), f.uid, f.uid, size, f.time(), links, what, attrs)
}
