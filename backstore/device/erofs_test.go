package device_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// attachErofs attaches with the erofs transport, or skips the test.
func attachErofs(ctx context.Context, t testing.TB, b device.Backend, size int64, o *device.Options) (*device.Device, error) {
	t.Helper()
	var opts device.Options
	if o != nil {
		opts = *o
	}
	opts.Transport = "erofs"
	d, err := device.Attach(ctx, b, size, &opts)
	skipMissing(t, err)
	return d, err
}

// skipMissing skips the test for a missing feature of the kernel, which the
// emulated machine has.
func skipMissing(t testing.TB, err error) {
	t.Helper()
	if missing := (*device.FeatureError)(nil); errors.As(err, &missing) && os.Getenv("REPRISE_VM") == "" {
		t.Skip(err)
	}
}

func TestErofsConformance(t *testing.T) {
	devicetest.Run(t, func(ctx context.Context, b device.Backend, size int64, o *device.Options) (devicetest.Device, error) {
		d, err := attachErofs(ctx, t, b, size, o)
		if err != nil {
			return nil, err
		}
		return d, nil
	}, devicetest.Caps{File: true, MaxSize: 64 << 40})
}

// erofsImage makes a tree, and an image of it for each kind that mkfs.erofs
// makes.
func erofsImage(t *testing.T, mkfs ...string) (tree, image string) {
	t.Helper()
	tree, image = filepath.Join(t.TempDir(), "tree"), filepath.Join(t.TempDir(), "image")
	randomTree(t, tree)
	devicetest.Tool(t, "mkfs.erofs", append(slices.Concat([]string{"--quiet"}, mkfs), image, tree)...)
	return tree, image
}

// randomTree makes directories, files of many sizes, links and attributes.
func randomTree(t *testing.T, root string) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 3))
	dirs := []string{root}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(root, 0o755))
	for i := range 40 {
		dir := filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprint("d", i))
		check(os.Mkdir(dir, fs.FileMode(0o700+r.IntN(64))))
		dirs = append(dirs, dir)
	}
	files := 300
	if os.Getenv("REPRISE_VM") != "" { // slow
		files = 90
	}
	for i := range files {
		name := filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprint("f", i))
		p := make([]byte, r.IntN(1<<(4+i%18)))
		devicetest.Fill(r, p)
		clear(p[len(p)/3 : len(p)/2]) // something to compress
		check(os.WriteFile(name, p, fs.FileMode(0o600+r.IntN(64))))
		switch i % 10 {
		case 3:
			check(os.Link(name, name+"-hard"))
		case 5:
			check(os.Symlink(filepath.Base(name), name+"-sym"))
		case 7:
			check(unix.Setxattr(name, "user.reprise", []byte(name), 0))
		}
	}
}

// sameTree compares what two trees hold.
func sameTree(t *testing.T, want, got string) {
	t.Helper()
	entries := 0
	err := filepath.WalkDir(want, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entries++
		rel, _ := filepath.Rel(want, path)
		return sameEntry(path, filepath.Join(got, rel))
	})
	if err != nil {
		t.Error(err)
	}
	filepath.WalkDir(got, func(string, fs.DirEntry, error) error { entries--; return nil })
	if entries != 0 {
		t.Errorf("%s has %d entries more than %s", want, entries, got)
	}
}

func sameEntry(want, got string) error {
	a, err := os.Lstat(want)
	if err != nil {
		return err
	}
	b, err := os.Lstat(got)
	if err != nil {
		return err
	}
	if a.Mode() != b.Mode() || !a.IsDir() && a.Size() != b.Size() {
		return fmt.Errorf("%s: %v %d bytes, want %v %d", got, b.Mode(), b.Size(), a.Mode(), a.Size())
	}
	attr := func(path string) string {
		p := make([]byte, 4096)
		n, _ := unix.Lgetxattr(path, "user.reprise", p)
		return string(p[:max(n, 0)])
	}
	if attr(want) != attr(got) {
		return fmt.Errorf("%s: attribute %q, want %q", got, attr(got), attr(want))
	}
	switch {
	case a.Mode().IsRegular():
		return sameFile(want, got)
	case a.Mode()&fs.ModeSymlink != 0:
		x, _ := os.Readlink(want)
		if y, err := os.Readlink(got); x != y {
			return fmt.Errorf("%s: link to %q, want %q (%v)", got, y, x, err)
		}
	}
	return nil
}

func sameFile(want, got string) error {
	p, err := os.ReadFile(want)
	if err != nil {
		return err
	}
	q, err := os.ReadFile(got)
	if err != nil {
		return err
	}
	if !bytes.Equal(p, q) {
		return fmt.Errorf("%s: wrong bytes", got)
	}
	return nil
}

// readOnlyFile hides that a file can be written.
type readOnlyFile struct{ io.ReaderAt }

// attachImage serves an image until the test's end.
func attachImage(t *testing.T, image string, o *device.Options) *device.Device {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	opts := device.Options{ReadOnly: true, Name: "devicetest erofs#1", FSType: "erofs"}
	if o != nil {
		opts = *o
	}
	d, err := attachErofs(t.Context(), t, readOnlyFile{f}, st.Size(), &opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeBusy(t, d) })
	return d
}

// closeBusy closes a device whose last user may be about to end.
func closeBusy(t testing.TB, d *device.Device) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		err := d.Close()
		if errors.Is(err, unix.EBUSY) && time.Now().Before(deadline) {
			continue // Close has waited
		}
		if err != nil {
			t.Error(err)
		}
		return
	}
}

// mountErofs mounts a device until the returned function or the test's end
// unmounts it.
func mountErofs(t *testing.T, d *device.Device) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	if err := device.Mount(d.Path(), dir, "erofs", true, ""); err != nil {
		skipMissing(t, err)
		t.Fatal(err)
	}
	return dir, unmountLater(t, dir)
}

func unmountLater(t *testing.T, dir string) (unmount func()) {
	done := false
	unmount = func() {
		if done {
			return
		}
		done = true
		if err := device.Unmount(dir); err != nil {
			t.Error(err)
			device.UnmountLazy(dir)
		}
	}
	t.Cleanup(unmount)
	return unmount
}

func TestErofs(t *testing.T) {
	devicetest.RequireRoot(t)
	for name, mkfs := range map[string][]string{
		"plain": nil, "lz4": {"-zlz4"}, "clusters": {"-zlz4", "-C65536"}, "chunks": {"--chunksize=8192"},
	} {
		t.Run(name, func(t *testing.T) {
			tree, image := erofsImage(t, mkfs...)
			d := attachImage(t, image, nil)
			dir, unmount := mountErofs(t, d)
			sameTree(t, tree, dir)
			if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("write: %v, want EROFS", err)
			}
			overlay(t, tree, dir)
			unmount()
		})
	}
}

// overlay puts an overlayfs on dir, as containers have it, and writes to that.
func overlay(t *testing.T, tree, dir string) {
	t.Helper()
	top := t.TempDir()
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(top, "merged")
	data := "lowerdir=" + dir + ",upperdir=" + filepath.Join(top, "upper") + ",workdir=" + filepath.Join(top, "work")
	if err := device.Mount("overlay", merged, "overlay", false, data); err != nil {
		t.Fatal(err)
	}
	unmount := unmountLater(t, merged)
	sameTree(t, tree, merged)
	for _, name := range []string{"new", "d0/new"} {
		if err := os.WriteFile(filepath.Join(merged, name), []byte("x"), 0o600); err != nil {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(merged, "d0")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "d0")); err != nil {
		t.Errorf("the lower layer has changed: %v", err)
	}
	unmount()
}

// expectErofsBusy closes a device in use, which must leave it as it is.
func expectErofsBusy(t *testing.T, d *device.Device, mounts ...string) {
	t.Helper()
	var busy *device.BusyError
	err := d.Close()
	if !errors.As(err, &busy) || !errors.Is(err, unix.EBUSY) || !slices.Equal(busy.Mounts, mounts) {
		t.Errorf("Close of a device that is mounted at %q: %v", mounts, err)
	}
}

// TestErofsBusy closes devices that are mounted: here, twice, nowhere but held
// by a descriptor, and where only another namespace sees it.
func TestErofsBusy(t *testing.T) {
	devicetest.RequireRoot(t)
	tree, image := erofsImage(t)
	d := attachImage(t, image, nil)
	dir, unmount := mountErofs(t, d)
	again, unmountAgain := mountErofs(t, d)
	sameTree(t, tree, again)
	expectErofsBusy(t, d, dir, again)
	sameTree(t, tree, dir)
	unmount()
	expectErofsBusy(t, d, again)
	unmountAgain()

	fd, err := d.MountDetached("erofs", true, "")
	if err != nil {
		t.Fatal(err)
	}
	expectErofsBusy(t, d)
	elsewhere := mover(t, fd, dir)
	unix.Close(fd)
	expectErofsBusy(t, d)
	elsewhere()
}

// A child process moves the mount that it inherits to the directory that
// moveEnv names, in a mount namespace of its own.
const moveEnv = "REPRISE_TEST_MOVE"

// moveMain is the child's part.
func moveMain(dir string) error {
	if err := device.MoveMount(3, dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	fmt.Println(len(entries))
	_, err = io.Copy(io.Discard, os.Stdin) // until the parent has seen enough
	return err
}

// mover has a child move the mount fd to dir, where it must see something, and
// returns a function that ends the child.
func mover(t *testing.T, fd int, dir string) (end func()) {
	t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), moveEnv+"="+dir)
	c.Stderr = os.Stderr
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(dup), "mount")
	defer f.Close()
	c.ExtraFiles = []*os.File{f}
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if n := readLine(t, bufio.NewReader(stdout)); n == "0" {
		t.Error("the mount is empty where it was moved to")
	}
	return func() {
		stdin.Close()
		if err := c.Wait(); err != nil {
			t.Errorf("the process that moved the mount: %v", err)
		}
	}
}

// oneFile is the content of a file, and an image that has it as "file".
func oneFile(t *testing.T) (data, image []byte) {
	t.Helper()
	tree, name := t.TempDir(), filepath.Join(t.TempDir(), "image")
	data = make([]byte, 4<<20)
	devicetest.Fill(rand.New(rand.NewPCG(1, 1)), data)
	if err := os.WriteFile(filepath.Join(tree, "file"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	devicetest.Tool(t, "mkfs.erofs", "--quiet", name, tree)
	image, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data, image
}

// TestErofsReadAhead reads a file from its beginning to its end, in small
// pieces, and looks at the largest that reach the backend.
func TestErofsReadAhead(t *testing.T) {
	devicetest.RequireRoot(t)
	data, p := oneFile(t)
	for _, tt := range []struct{ kb, want int }{{-1, 4 << 10}, {64, 64 << 10}, {0, 128 << 10}, {256, 256 << 10}} {
		b := &devicetest.Faulty{Memory: devicetest.NewMemory(p)}
		d, err := attachErofs(t.Context(), t, b, int64(len(p)), &device.Options{ReadOnly: true, ReadAheadKB: tt.kb})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeBusy(t, d) })
		fd, err := d.MountDetached("erofs", true, "")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := device.MoveMount(fd, dir); err != nil {
			t.Fatal(err)
		}
		unmount := unmountLater(t, dir)
		f, err := os.Open(filepath.Join(dir, "file"))
		if err != nil {
			t.Fatal(err)
		}
		var longest atomic.Int64
		b.SetHook(func(_ string, _, n int64) error {
			for old := longest.Load(); n > old && !longest.CompareAndSwap(old, n); old = longest.Load() {
			}
			return nil
		})
		got := make([]byte, len(data))
		for off := 0; off < len(got); off += 4096 {
			if _, err := f.ReadAt(got[off:off+4096], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		f.Close()
		if !bytes.Equal(got, data) {
			t.Error("wrong bytes")
		}
		if n := int(longest.Load()); n != tt.want {
			t.Errorf("ReadAheadKB %d: reads of at most %d bytes, want %d", tt.kb, n, tt.want)
		}
		unmount()
	}
}

// TestMountDetached moves mounts to a place here, of either kind of device.
func TestMountDetached(t *testing.T) {
	devicetest.RequireRoot(t)
	t.Run("erofs", func(t *testing.T) {
		tree, image := erofsImage(t)
		d := attachImage(t, image, nil)
		fd, err := d.MountDetached("erofs", true, "")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := device.MoveMount(fd, dir); err != nil {
			t.Fatal(err)
		}
		unmount := unmountLater(t, dir)
		sameTree(t, tree, dir)
		if got := device.Mounts(d.Path()); !slices.Equal(got, []string{dir}) {
			t.Errorf("Mounts: %q", got)
		}
		unmount()
	})
	t.Run("loop", func(t *testing.T) {
		f, err := os.OpenFile(ext4File(t), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		d, err := device.Attach(t.Context(), f, 32<<20, &device.Options{Name: "devicetest-detached", Transport: "fuse"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeBusy(t, d) })
		dir := t.TempDir()
		fd, err := d.MountDetached("ext4", false, "errors=remount-ro,nodelalloc")
		if err != nil {
			t.Fatal(err)
		}
		if err := device.MoveMount(fd, dir); err != nil {
			t.Fatal(err)
		}
		unmount := unmountLater(t, dir)
		if err := device.Apart(func() error { return unix.Mkdir(filepath.Join(dir, "x"), 0o700) }); err != nil {
			t.Error(err)
		}
		unmount()
		for what, mount := range map[string]func() (int, error){
			"no such file system": func() (int, error) { return d.MountDetached("erofs", true, "") },
			"unknown option":      func() (int, error) { return d.MountDetached("ext4", true, "bogus=1") },
		} {
			if fd, err := mount(); err == nil {
				unix.Close(fd)
				t.Errorf("%s: mounted", what)
			} else {
				t.Log(err)
			}
		}
	})
}
