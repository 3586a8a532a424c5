package device

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kernel is what can be known of a kernel by looking at files.
type kernel struct {
	release      string // uname -r
	major, minor int
	root         fs.FS // "/"
}

// runningKernel is the one that this process runs on.
func runningKernel() kernel {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return kernel{root: os.DirFS("/")}
	}
	return newKernel(unix.ByteSliceToString(u.Release[:]), os.DirFS("/"))
}

func newKernel(release string, root fs.FS) kernel {
	k := kernel{release: release, root: root}
	major, rest, _ := strings.Cut(release, ".")
	k.major, _ = strconv.Atoi(major)
	k.minor, _ = strconv.Atoi(rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))])
	return k
}

func (k kernel) atLeast(major, minor int) bool {
	return k.major > major || k.major == major && k.minor >= minor
}

// A moduleState says how a driver comes with the kernel.
type moduleState int

const (
	absent moduleState = iota
	loadable
	present // loaded, or built in
)

// module looks for a driver by its module's name. A driver that is built in
// without parameters does not show: its callers look for what it makes, too.
func (k kernel) module(name string) moduleState {
	if _, err := fs.Stat(k.root, "sys/module/"+name); err == nil {
		return present
	}
	dir := "lib/modules/" + k.release
	if k.lists(dir+"/modules.builtin", name) {
		return present
	}
	if k.lists(dir+"/modules.dep", name) {
		return loadable
	}
	return absent
}

// knowsModules tells whether absent means that there is no such module: the
// kernel has a list of them, or takes none.
func (k kernel) knowsModules() bool {
	if _, err := fs.Stat(k.root, "lib/modules/"+k.release+"/modules.dep"); err == nil {
		return true
	}
	return !k.takesModules()
}

func (k kernel) takesModules() bool {
	_, err := fs.Stat(k.root, "proc/modules")
	return err == nil
}

// lists reports whether a module is the subject of a line of modules.builtin or
// modules.dep: kernel/fs/erofs/erofs.ko.xz, or kernel/a/b.ko: kernel/c/d.ko.
func (k kernel) lists(file, module string) bool {
	f, err := k.root.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		subject, _, _ := strings.Cut(s.Text(), ":")
		base, _, ok := strings.Cut(path.Base(subject), ".ko")
		if ok && strings.ReplaceAll(base, "-", "_") == module {
			return true
		}
	}
	return false
}

// fileSystem says whether a file system can be mounted.
func (k kernel) fileSystem(name string) moduleState {
	b, err := fs.ReadFile(k.root, "proc/filesystems")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == name {
				return present
			}
		}
	}
	return min(k.module(name), loadable) // the kernel loads it when it is asked for
}

// needFileSystem is a *FeatureError where a file system is not to be had.
func (k kernel) needFileSystem(name string) error {
	if k.fileSystem(name) != absent {
		return nil
	}
	return &FeatureError{Feature: "file system " + name, Err: unix.ENODEV,
		Hint: fmt.Sprintf("the kernel has no such module: install one that has (CONFIG_%s_FS)", strings.ToUpper(name))}
}
