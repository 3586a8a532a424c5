package device_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

func TestMain(m *testing.M) {
	devicetest.KillMain(map[string]devicetest.Opener{
		erofsBackend: openErofsImage, backedBackend: openBacked, writtenBackend: openWritten,
	})
	if dir := os.Getenv(moveEnv); dir != "" {
		if err := moveMain(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if file := os.Getenv(childEnv); file != "" {
		if err := serveUntilKilled(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

func TestConformance(t *testing.T) {
	devicetest.Run(t, func(ctx context.Context, b device.Backend, size int64, o *device.Options) (devicetest.Device, error) {
		d, err := device.Attach(ctx, b, size, o)
		if err != nil {
			return nil, err
		}
		return d, nil
	}, devicetest.Caps{
		Write:   true,
		Discard: true,
		Sectors: []int{512, 4096},
		MaxSize: 64 << 40,
	})
}

// A child process serves the file that childEnv names. With cycleEnv it does
// so again and again, mounting it at that directory in between, with backedEnv
// only the kernel reads the file.
const (
	childEnv  = "REPRISE_TEST_SERVE"
	cycleEnv  = "REPRISE_TEST_CYCLE"
	backedEnv = "REPRISE_TEST_BACKED"
	childName = "devicetest-killed"
)

func serveUntilKilled(file string) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if dir := os.Getenv(cycleEnv); dir != "" {
		return cycle(f, st.Size(), dir)
	}
	var b device.Backend = f
	backed := os.Getenv(backedEnv) != ""
	if backed {
		b = backedFile{f}
	}
	d, err := device.Attach(context.Background(), b, st.Size(), &device.Options{Name: childName, ReadOnly: backed})
	if err != nil {
		return err
	}
	fmt.Println(d.Path())
	_, err = io.Copy(io.Discard, os.Stdin) // until the parent kills or dies
	return errors.Join(err, d.Close())
}

// cycle prints a line before each step.
func cycle(f *os.File, size int64, dir string) error {
	go func() {
		io.Copy(io.Discard, os.Stdin) // until the parent dies
		os.Exit(1)
	}()
	for {
		fmt.Println("attach")
		d, err := device.Attach(context.Background(), f, size, &device.Options{Name: childName})
		if err != nil {
			return err
		}
		fmt.Println("mount")
		if err := device.Mount(d.Path(), dir, "ext4", false, ""); err != nil {
			return err
		}
		fmt.Println("write")
		if err := device.Apart(func() error { return churn(dir) }); err != nil {
			return err
		}
		fmt.Println("unmount")
		if err := device.Unmount(dir); err != nil {
			return err
		}
		fmt.Println("close")
		if err := d.Close(); err != nil {
			return err
		}
	}
}

// churn writes, syncs, reads and removes files.
func churn(dir string) error {
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for i := range 8 {
		sub := filepath.Join(dir, fmt.Sprint(i%3))
		name := filepath.Join(sub, "file")
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(name, make([]byte, 100_000*i), 0o600); err != nil {
			return err
		}
		if err := unix.Syncfs(int(root.Fd())); err != nil {
			return err
		}
		if _, err := os.ReadFile(name); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(dir, fmt.Sprint((i+1)%3))); err != nil {
			return err
		}
	}
	return nil
}

// startChild serves file from a child process and returns what it prints.
func startChild(t *testing.T, file string, env ...string) (c *exec.Cmd, out *bufio.Reader) {
	t.Helper()
	c = exec.Command(os.Args[0])
	c.Env = append(append(os.Environ(), childEnv+"="+file), env...)
	c.Stderr = os.Stderr
	// Mounts of its own: a container that somebody starts meanwhile would take
	// copies of them along, and keep the device busy.
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
	t.Cleanup(func() {
		stdin.Close()
		c.Process.Kill()
		c.Wait()
	})
	return c, bufio.NewReader(stdout)
}

func readLine(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("the child ended: %v", err)
	}
	return strings.TrimSpace(line)
}

// startServer is startChild for one device.
func startServer(t *testing.T, file string) (c *exec.Cmd, dev string) {
	t.Helper()
	c, out := startChild(t, file)
	return c, readLine(t, out)
}

func diskFile(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestKilledWhileWritten kills a server that others read from and whose device
// has dirty pages in the kernel.
func TestKilledWhileWritten(t *testing.T) {
	devicetest.RequireRoot(t)
	c, dev := startServer(t, diskFile(t, 64<<20))
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for off := range int64(32) {
		if _, err := f.WriteAt(p, off<<20); err != nil {
			t.Fatal(err)
		}
	}
	reads := make(chan error, 1)
	started := make(chan struct{})
	page := alignedPage(t)
	go func() {
		r, err := os.OpenFile(dev, os.O_RDONLY|unix.O_DIRECT, 0)
		for i := int64(0); err == nil; i++ {
			_, err = r.ReadAt(page, i%16384*4096)
			if i == 100 {
				close(started)
			}
		}
		r.Close()
		reads <- err
	}()
	<-started
	kill(t, c)
	if err := <-reads; !errors.Is(err, unix.EIO) {
		t.Errorf("read of a killed server's device: %v, want EIO", err)
	}
	f.Close()
	devicetest.CheckGone(t, childName)
}

// TestKilledUnwritten kills a server that is the last to have its device open,
// with dirty pages in the kernel.
func TestKilledUnwritten(t *testing.T) {
	devicetest.RequireRoot(t)
	for range 10 {
		c, dev := startServer(t, diskFile(t, 64<<20))
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(make([]byte, 8<<20), 0); err != nil {
			t.Fatal(err)
		}
		closed := make(chan struct{})
		go func() { // the last close writes the pages back
			defer close(closed)
			f.Close()
		}()
		kill(t, c)
		<-closed
		devicetest.CheckGone(t, childName)
	}
}

// TestKilledWhileMounted kills a server under a mounted file system.
func TestKilledWhileMounted(t *testing.T) {
	devicetest.RequireRoot(t)
	file := ext4File(t)
	c, dev := startServer(t, file)
	dir := t.TempDir()
	if err := device.Mount(dev, dir, "ext4", true, ""); err != nil {
		t.Fatal(err)
	}
	defer device.UnmountLazy(dir)
	if _, err := os.ReadDir(dir); err != nil {
		t.Error(err)
	}
	kill(t, c)
	if err := device.Unmount(dir); err != nil {
		t.Fatal(err)
	}
	devicetest.CheckGone(t, childName)
}

// TestKilledAnywhere kills a server that uses its own devices, at each step.
func TestKilledAnywhere(t *testing.T) {
	devicetest.RequireRoot(t)
	file := ext4File(t)
	dir := t.TempDir()
	for steps := range 50 {
		c, out := startChild(t, file, cycleEnv+"="+dir)
		for range 1 + steps {
			readLine(t, out)
		}
		kill(t, c)
		devicetest.CheckGone(t, childName)
		exec.Command("e2fsck", "-fy", file).Run() // the next one mounts it
	}
}

func ext4File(t *testing.T) string {
	t.Helper()
	file := diskFile(t, 32<<20)
	devicetest.Tool(t, "mkfs.ext4", "-q", "-F", "-b", "4096", file)
	return file
}

func kill(t *testing.T, c *exec.Cmd) {
	t.Helper()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.Wait() // says that it was killed
}

func alignedPage(t *testing.T) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(p) })
	return p
}

// TestAborted has somebody else end the connection.
func TestAborted(t *testing.T) {
	devicetest.RequireRoot(t)
	ctl := t.TempDir()
	if err := unix.Mount("none", ctl, "fusectl", 0, ""); err != nil {
		t.Skipf("needs fusectl: %v", err)
	}
	defer unix.Unmount(ctl, unix.MNT_DETACH)
	d, err := device.Attach(t.Context(), new(devicetest.Memory), 1<<20, &device.Options{Name: "devicetest-aborted"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	abort := filepath.Join(ctl, connection(t, d.Path()), "abort")
	if err := os.WriteFile(abort, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	case <-time.After(30 * time.Second):
		t.Error("the device did not notice")
	}
	if d.Err() == nil {
		t.Error("no reason given")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Err(); err == nil || !strings.Contains(err.Error(), d.Path()) {
		t.Errorf("Err after Close: %v", err)
	}
	devicetest.CheckGone(t, "devicetest-aborted")
}

// connection finds the FUSE connection under a loop device.
func connection(t *testing.T, dev string) string {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(int(unix.Minor(info.Device)))
}

// TestUnprivileged attaches from a thread of another user.
func TestUnprivileged(t *testing.T) {
	err := asNobody(func() error {
		d, err := device.Attach(context.Background(), new(devicetest.Memory), 1<<20, nil)
		if err == nil {
			err = errors.Join(errors.New("attached"), d.Close())
		}
		return err
	})
	var missing *device.FeatureError
	if !errors.As(err, &missing) {
		t.Fatalf("got %v, want a *FeatureError", err)
	}
	if errors.Is(err, os.ErrPermission) && !strings.Contains(err.Error(), "needs root (CAP_SYS_ADMIN)") {
		t.Errorf("the error does not say what to do: %v", err)
	}
}

// asNobody calls f on a thread without privileges, which ends with it. The
// process's first thread cannot end, so that is kept waiting.
func asNobody(f func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			errc <- asNobody(f)
			runtime.UnlockOSThread()
			return
		}
		if os.Geteuid() == 0 {
			const nobody = 65534
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
				errc <- errno
				return
			}
		}
		errc <- f()
	}()
	return <-errc
}

func TestReadAhead(t *testing.T) {
	devicetest.RequireRoot(t)
	for set, want := range map[int]string{0: "128", 64: "64", 1024: "1024", -1: "0"} {
		d, err := device.Attach(t.Context(), new(devicetest.Memory), 1<<20, &device.Options{ReadAheadKB: set})
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile("/sys/block/" + filepath.Base(d.Path()) + "/queue/read_ahead_kb")
		if err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("ReadAheadKB %d: %s, %v", set, got, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestNoneLeaked attaches and closes many and counts descriptors.
func TestNoneLeaked(t *testing.T) {
	devicetest.RequireRoot(t)
	count := func() int {
		l, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(l)
	}
	before := count()
	for range 20 {
		d, err := device.Attach(t.Context(), new(devicetest.Memory), 1<<30, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func TestMountErrors(t *testing.T) {
	devicetest.RequireRoot(t)
	d, err := device.Attach(t.Context(), new(devicetest.Memory), 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir := t.TempDir()
	if err := device.Mount(d.Path(), dir, "ext4", true, ""); err == nil || !strings.Contains(err.Error(), d.Path()) {
		t.Errorf("mount of zeros: %v", err)
	}
	var missing *device.FeatureError
	if err := device.Mount(d.Path(), dir, "nosuchfs", true, ""); !errors.As(err, &missing) {
		t.Errorf("mount of an unknown file system: %v", err)
	}
	if err := device.Unmount(dir); !errors.Is(err, unix.EINVAL) {
		t.Errorf("unmount of what is not mounted: %v", err)
	}
}
