package compare

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// A demoEntry is one member of a layer's tar.
type demoEntry struct {
	path     string      // below the root, with slashes
	mode     fs.FileMode // type and permission bits
	uid, gid int
	size     int64  // of a regular file's content
	mtime    int64  // Unix time, whole seconds
	link     string // target of a symbolic link
	inode    inode  // equal for all names of one file; zero: it has one name
	hard     string // the file's first name in this layer, if this is another
	data     []byte // content, if generated
}

type inode struct{ dev, ino uint64 }

type demoLayer struct {
	name    string
	entries []demoEntry // sorted; folders before what they hold
}

// demoSkip are the folders that an image would not have either: what no package put there, what is there for people
// to read or to compile against, and the kernel's.
var demoSkip = []string{
	"usr/local", "usr/src", "usr/include", "usr/lib/debug", "usr/lib/modules", "usr/lib/firmware",
	"usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian",
}

// demoEssential are the programs whose files, with the libraries that they need, make the base layer.
var demoEssential = []string{
	"usr/bin/python3", "usr/bin/sh", "usr/bin/bash", "usr/bin/env", "usr/bin/cat", "usr/bin/ls", "usr/bin/cp",
	"usr/bin/mv", "usr/bin/rm", "usr/bin/mkdir", "usr/bin/ln", "usr/bin/sleep", "usr/bin/id", "usr/bin/uname",
}

// A demoTree is what the image may take of /usr.
type demoTree struct {
	root    string
	entries []demoEntry    // all but folders, sorted by path
	byPath  map[string]int // index in entries
	dirs    map[string]demoEntry
	python  string          // the standard library: usr/lib/python3.N
	base    map[string]bool // the files that findBase found
}

// planDemoImage reads the tree and says what goes into which layer, bottom first.
func planDemoImage(ctx context.Context, o *DemoImageOptions) ([]demoLayer, error) {
	t, err := readDemoTree(ctx, o.Root)
	if err != nil {
		return nil, err
	}
	if err := t.findPython(); err != nil {
		return nil, err
	}
	t.findBase()
	chosen, size := t.choose(o.MaxBytes)
	if size < o.MinBytes {
		return nil, fmt.Errorf("%s: %d MB of files to make an image of, %d MB are needed: run `make deps`, or install packages such as clang and python3-scipy",
			filepath.Join(o.Root, "usr"), size/1e6, o.MinBytes/1e6)
	}
	layers := t.layers(chosen)
	if len(layers) < minDemoLayers {
		return nil, fmt.Errorf("%s: its files give %d layers, %d are needed: run `make deps`",
			filepath.Join(o.Root, "usr"), len(layers), minDemoLayers)
	}
	return layers, nil
}

// readDemoTree walks usr. It stays on the file system and takes only what everybody may read.
func readDemoTree(ctx context.Context, root string) (*demoTree, error) {
	t := &demoTree{root: root, byPath: make(map[string]int), dirs: make(map[string]demoEntry)}
	var dev uint64
	err := filepath.WalkDir(filepath.Join(root, "usr"), func(name string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone since it was listed
		} else if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if d.IsDir() {
			if rel == "usr" {
				dev = st.Dev
			}
			if slices.Contains(demoSkip, rel) || fi.Mode().Perm()&0o005 != 0o005 || st.Dev != dev {
				return fs.SkipDir
			}
			t.dirs[rel] = newDemoEntry(rel, fi, st)
			return nil
		}
		return t.add(name, rel, fi, st)
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(t.entries, func(a, b demoEntry) int { return strings.Compare(a.path, b.path) })
	for i, e := range t.entries {
		t.byPath[e.path] = i
	}
	return t, nil
}

func newDemoEntry(rel string, fi fs.FileInfo, st *syscall.Stat_t) demoEntry {
	return demoEntry{
		path: rel, mode: fi.Mode(), uid: int(st.Uid), gid: int(st.Gid), mtime: fi.ModTime().Unix(),
	}
}

// add takes a file or a symbolic link, and leaves out all else.
func (t *demoTree) add(name, rel string, fi fs.FileInfo, st *syscall.Stat_t) error {
	e := newDemoEntry(rel, fi, st)
	switch {
	case fi.Mode().IsRegular() && fi.Mode().Perm()&0o004 != 0:
		e.size = fi.Size()
		if st.Nlink > 1 {
			e.inode = inode{st.Dev, st.Ino}
		}
	case fi.Mode().Type() == fs.ModeSymlink:
		target, err := os.Readlink(name)
		if err != nil {
			return err
		}
		e.link = target
	default:
		return nil
	}
	t.entries = append(t.entries, e)
	return nil
}

// findPython finds the standard library of /usr/bin/python3.
func (t *demoTree) findPython() error {
	chain := t.follow("usr/bin/python3")
	if len(chain) == 0 {
		return fmt.Errorf("%s: not found: run `make deps`, or install the package python3", filepath.Join(t.root, "usr/bin/python3"))
	}
	t.python = "usr/lib/" + path.Base(chain[len(chain)-1])
	if _, ok := t.byPath[t.python+"/http/server.py"]; !ok {
		return fmt.Errorf("%s: the standard library is not there: run `make deps`, or install the package python3", filepath.Join(t.root, t.python))
	}
	return nil
}

// follow returns the entries behind a name: the symbolic links on the way and then the file; nil if there is none.
func (t *demoTree) follow(name string) []string {
	var chain []string
	for range 40 {
		name = mergedUsr(name)
		i, ok := t.byPath[name]
		if !ok {
			return nil
		}
		chain = append(chain, name)
		e := t.entries[i]
		if e.mode.IsRegular() {
			return chain
		}
		if path.IsAbs(e.link) {
			name = strings.TrimPrefix(path.Clean(e.link), "/")
		} else {
			name = path.Join(path.Dir(name), e.link)
		}
	}
	return nil
}

// mergedUsr resolves the root folder's symbolic links into usr.
func mergedUsr(name string) string {
	for _, l := range demoRootLinks {
		if strings.HasPrefix(name, l+"/") {
			return "usr/" + name
		}
	}
	return name
}

// findBase marks what the base layer must hold: programs that every start may need, and their libraries.
func (t *demoTree) findBase() {
	t.base = make(map[string]bool)
	libs := t.libraryDirs()
	queue := slices.Clone(demoEssential)
	for _, e := range t.under(t.python + "/lib-dynload/") {
		queue = append(queue, e.path)
	}
	for _, dir := range libs { // loaded by name, not by a DT_NEEDED of ours
		queue = append(queue, dir+"libgcc_s.so.1")
	}
	seen := make(map[string]bool)
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if seen[name] {
			continue
		}
		seen[name] = true
		chain := t.follow(name)
		for _, c := range chain {
			if !t.isPython(c) {
				t.base[c] = true
			}
		}
		if len(chain) == 0 {
			continue
		}
		for _, lib := range neededBy(filepath.Join(t.root, chain[len(chain)-1])) {
			if path.IsAbs(lib) {
				queue = append(queue, strings.TrimPrefix(lib, "/"))
				continue
			}
			for _, dir := range libs {
				queue = append(queue, dir+lib)
			}
		}
	}
}

func (t *demoTree) isPython(name string) bool {
	return strings.HasPrefix(name, t.python+"/") || strings.HasPrefix(name, "usr/bin/python3")
}

// libraryDirs are the loader's default folders.
func (t *demoTree) libraryDirs() []string {
	dirs := []string{"usr/lib/", "usr/lib64/"}
	for dir := range t.dirs {
		if path.Dir(dir) == "usr/lib" && strings.HasSuffix(dir, "-linux-gnu") {
			dirs = append(dirs, dir+"/")
		}
	}
	slices.Sort(dirs)
	return dirs
}

// neededBy lists an ELF file's libraries by name, and its interpreter by path; nothing if it is not one.
func neededBy(name string) []string {
	f, err := elf.Open(name)
	if err != nil {
		return nil
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil
	}
	if s := f.Section(".interp"); s != nil && s.Size < 4096 {
		if b, err := s.Data(); err == nil {
			needed = append(needed, strings.TrimRight(string(b), "\x00"))
		}
	}
	return needed
}

// under returns the entries whose path begins with prefix.
func (t *demoTree) under(prefix string) []demoEntry {
	lo, _ := slices.BinarySearchFunc(t.entries, prefix, func(e demoEntry, p string) int { return strings.Compare(e.path, p) })
	hi := lo
	for hi < len(t.entries) && strings.HasPrefix(t.entries[hi].path, prefix) {
		hi++
	}
	return t.entries[lo:hi]
}
