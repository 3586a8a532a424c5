package device_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// TestErofsRefuses attaches what EROFS cannot mount.
func TestErofsRefuses(t *testing.T) {
	devicetest.RequireRoot(t)
	for _, o := range []*device.Options{{}, {ReadOnly: true, FSType: "ext4"}} {
		if d, err := attachErofs(t.Context(), t, new(devicetest.Memory), 1<<20, o); err == nil {
			t.Errorf("%+v was attached", o)
			closeBusy(t, d)
		} else {
			t.Log(err)
		}
	}
}

// faultyImage mounts an image with one file, whose backend has a hook.
func faultyImage(t *testing.T) (data []byte, b *devicetest.Faulty, d *device.Device, file string, unmount func()) {
	t.Helper()
	devicetest.RequireRoot(t)
	data, image := oneFile(t)
	b = &devicetest.Faulty{Memory: devicetest.NewMemory(image)}
	d, err := attachErofs(t.Context(), t, b, int64(len(image)), &device.Options{ReadOnly: true, Name: "devicetest-faulty"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeBusy(t, d) })
	dir, unmount := mountErofs(t, d)
	t.Cleanup(func() { b.SetHook(nil) })
	return data, b, d, filepath.Join(dir, "file"), unmount
}

// TestErofsErrors wants an I/O error of what the backend fails, and the right
// bytes as soon as it does not any more: not zeros, which kernels before 2026
// make of a short read.
func TestErofsErrors(t *testing.T) {
	data, b, _, file, _ := faultyImage(t)
	for i, fault := range []error{errors.New("boom"), io.EOF, io.ErrUnexpectedEOF} {
		const every = 3
		var calls atomic.Int64
		b.SetHook(func(string, int64, int64) error {
			if calls.Add(1)%every == int64(i) {
				return fault
			}
			return nil
		})
		failed := 0
		for off := 0; off < len(data); off += 64 << 10 {
			if !readPiece(t, file, data, off) {
				failed++
			}
		}
		if failed == 0 {
			t.Errorf("no read has failed with %v", fault)
		}
		b.SetHook(nil)
		for off := 0; off < len(data); off += 64 << 10 {
			if !readPiece(t, file, data, off) {
				t.Errorf("a read at %d fails though the backend does not", off)
			}
		}
		forget(t, file)
	}
}

// readPiece reads 64 KiB, which must be right or fail with EIO.
func readPiece(t *testing.T, file string, data []byte, off int) bool {
	t.Helper()
	got := make([]byte, 64<<10)
	err := device.Apart(func() error { // package os would log there, for go test, to a file that is not open there
		fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for at := 0; at < len(got); {
			n, err := unix.Pread(fd, got[at:], int64(off+at))
			if n <= 0 && !errors.Is(err, unix.EINTR) {
				return errors.Join(err, io.ErrUnexpectedEOF)
			}
			at += max(n, 0)
		}
		return nil
	})
	if err == nil && !bytes.Equal(got, data[off:off+len(got)]) {
		t.Errorf("wrong bytes at %d", off)
	}
	if err != nil && !errors.Is(err, unix.EIO) {
		t.Errorf("read at %d: %v", off, err)
	}
	return err == nil
}

// forget drops a file from the page cache.
func forget(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// TestErofsReaderKilled kills readers that wait, and wants no wrong byte where
// they were.
func TestErofsReaderKilled(t *testing.T) {
	data, b, _, file, _ := faultyImage(t)
	for range 10 {
		entered, gate := make(chan struct{}, 64), make(chan struct{})
		open := sync.OnceFunc(func() { close(gate) })
		t.Cleanup(open)
		var calls atomic.Int64
		b.SetHook(func(string, int64, int64) error {
			if calls.Add(1) > 3 {
				entered <- struct{}{}
				<-gate
			}
			return nil
		})
		c := exec.Command("cat", file)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		<-entered
		if err := c.Process.Kill(); err != nil {
			t.Error(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- c.Wait() }()
		open()
		if err := <-ended; err == nil {
			t.Error("the reader was not killed")
		}
		b.SetHook(nil)
		for off := 0; off < len(data); off += 64 << 10 {
			readPiece(t, file, data, off)
		}
		forget(t, file)
	}
}

// TestErofsAborted has somebody else end the connection under a mount.
func TestErofsAborted(t *testing.T) {
	_, _, d, file, unmount := faultyImage(t)
	ctl := t.TempDir()
	if err := unix.Mount("none", ctl, "fusectl", 0, ""); err != nil {
		t.Skipf("needs fusectl: %v", err)
	}
	defer unix.Unmount(ctl, unix.MNT_DETACH)
	var st unix.Stat_t
	if err := unix.Stat(d.Path(), &st); err != nil {
		t.Fatal(err)
	}
	abort := filepath.Join(ctl, strconv.Itoa(int(unix.Minor(st.Dev))), "abort")
	if err := os.WriteFile(abort, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if _, err := os.ReadFile(file); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("read after the end: %v", err)
	}
	if d.Err() == nil {
		t.Error("no reason given")
	}
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	unmount()
}

// erofsBackend is what the servers of TestErofsKill serve.
const erofsBackend = "erofs"

func openErofsImage(path string) (device.Backend, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	return readOnlyFile{f}, st.Size(), nil
}

// TestErofsKill kills servers of an image that is mounted and read, and mounted
// and unmounted elsewhere again and again.
func TestErofsKill(t *testing.T) {
	devicetest.RequireRoot(t)
	kills, err := strconv.Atoi(os.Getenv("REPRISE_KILLS"))
	if err != nil {
		kills = 20
	}
	for name, mkfs := range map[string][]string{"plain": nil, "lz4": {"-zlz4"}} {
		t.Run(name, func(t *testing.T) {
			tree, image := erofsImage(t, mkfs...)
			attachImage(t, image, nil) // or skip
			devicetest.Kill(t, devicetest.KillOptions{
				Transport: "erofs", Kills: kills, Backend: erofsBackend, Path: image,
				Load: func(t *testing.T, dev string, stop <-chan struct{}) { loadErofs(t, dev, tree, stop) },
			})
		})
	}
}

// loadErofs mounts dev and reads from it until stop is closed.
func loadErofs(t *testing.T, dev, tree string, stop <-chan struct{}) {
	// The path is the first server's: what it leads to is held on to.
	held, err := unix.Open(filepath.Dir(dev), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(held)
	dev = fmt.Sprintf("/proc/self/fd/%d/%s", held, filepath.Base(dev))
	dir, other := t.TempDir(), t.TempDir()
	if err := device.Mount(dev, dir, "erofs", true, ""); err != nil {
		t.Error(err)
		return
	}
	over := func() bool {
		select {
		case <-stop:
			return true
		default:
			return t.Failed()
		}
	}
	var wg sync.WaitGroup
	var reads, mounts atomic.Int64
	var longest atomic.Int64
	for i := range 6 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 5))
			for !over() {
				took, err := readErofs(r, tree, dir)
				if err != nil {
					t.Error(err)
				}
				reads.Add(1)
				longest.Store(max(longest.Load(), int64(took)))
			}
		})
	}
	wg.Go(func() {
		for !over() {
			err := device.Mount(dev, other, "erofs", true, "")
			if err == nil {
				_, err = os.ReadDir(other)
				err = errors.Join(err, device.Unmount(other))
			}
			if err != nil {
				t.Error(err)
			}
			mounts.Add(1)
		}
	})
	wg.Wait()
	if err := device.Unmount(dir); err != nil {
		t.Error(err)
	}
	t.Logf("%d reads, the longest %v, %d mounts", reads.Load(), time.Duration(longest.Load()), mounts.Load())
}

// readErofs reads a piece of some file, from the device as far as the kernel
// forgets what it has cached.
func readErofs(r *rand.Rand, tree, dir string) (took time.Duration, err error) {
	rel := func() string {
		for {
			m, _ := filepath.Glob(tree + strings.Repeat("/*", 1+r.IntN(3)) + fmt.Sprint("/f*", r.IntN(10)))
			if len(m) > 0 {
				rel, _ := filepath.Rel(tree, m[r.IntN(len(m))])
				return rel
			}
		}
	}()
	want, err := os.ReadFile(filepath.Join(tree, rel))
	if err != nil {
		return 0, err
	}
	f, err := os.Open(filepath.Join(dir, rel))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	off := r.IntN(len(want) + 1)
	got := make([]byte, min(len(want)-off, 1+r.IntN(1<<20)))
	begin := time.Now()
	_, err = f.ReadAt(got, int64(off))
	if took = time.Since(begin); err != nil && !errors.Is(err, io.EOF) {
		return took, fmt.Errorf("after %v: %w", took, err)
	}
	if !bytes.Equal(got, want[off:off+len(got)]) {
		return took, fmt.Errorf("%s: wrong bytes at %d", rel, off)
	}
	return took, nil
}
