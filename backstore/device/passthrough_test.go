package device_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// backedFile is a backend that only the kernel can read: it fails every request.
type backedFile struct{ f *os.File }

var errRequest = errors.New("a request was made")

func (b backedFile) ReadAt([]byte, int64) (int, error) { return 0, errRequest }
func (b backedFile) BackingFile() *os.File             { return b.f }
func (b backedFile) Close() error                      { return b.f.Close() }

// backedBackend is the name of openBacked.
const backedBackend = "backed file"

func openBacked(path string) (device.Backend, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	return backedFile{f}, st.Size(), nil
}

// randomFile is a file of size bytes.
func randomFile(t *testing.T, size int) (name string, content []byte) {
	t.Helper()
	content = make([]byte, size)
	devicetest.Fill(rand.New(rand.NewPCG(7, 8)), content)
	name = filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return name, content
}

func attachBacked(t *testing.T, b device.Backend, size int64, o *device.Options) *device.Device {
	t.Helper()
	o.Transport = "fuse"
	d, err := device.Attach(t.Context(), b, size, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// needPassthrough skips a test where requests are made for a file.
func needPassthrough(t *testing.T, name string) {
	t.Helper()
	devicetest.RequireRoot(t)
	b, size, err := openBacked(name)
	if err != nil {
		t.Fatal(err)
	}
	defer b.(io.Closer).Close()
	d, err := device.Attach(t.Context(), b, size, &device.Options{Transport: "fuse", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	_, readErr := readDevice(d.Path(), 4096)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if readErr != nil {
		t.Skip("needs FUSE_PASSTHROUGH (Linux 6.9) and direct I/O on the file system of the temporary folder")
	}
}

func readDevice(dev string, n int) ([]byte, error) {
	f, err := os.Open(dev)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := make([]byte, n)
	_, err = io.ReadFull(f, p)
	return p, err
}

func TestFileBacked(t *testing.T) {
	const size = 4<<20 + 512
	name, content := randomFile(t, size)
	needPassthrough(t, name)
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			b, _, err := openBacked(name)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { b.(io.Closer).Close() })
			n := size &^ (sector - 1)
			d := attachBacked(t, b, int64(n), &device.Options{ReadOnly: true, SectorSize: sector})
			got, err := readDevice(d.Path(), n)
			if err != nil || !bytes.Equal(got, content[:n]) {
				t.Errorf("read of the device: %v, right bytes: %v", err, bytes.Equal(got, content[:n]))
			}
			f, err := os.Open(d.Path())
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if end, err := f.Seek(0, io.SeekEnd); err != nil || end != int64(n) {
				t.Errorf("the device has %d bytes, want %d: %v", end, n, err)
			}
		})
	}
}

// servedFile is a FileBacked that can also be read by requests.
type servedFile struct {
	*os.File
	backing *os.File
}

func (f servedFile) BackingFile() *os.File { return f.backing }

// TestFileBackedByRequests has devices whose backing file the kernel must not,
// or cannot, read by itself: they are served as others are.
func TestFileBackedByRequests(t *testing.T) {
	devicetest.RequireRoot(t)
	const size = 1 << 20
	name, content := randomFile(t, size)
	other, _ := randomFile(t, size-4096)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	short, err := os.Open(other)
	if err != nil {
		t.Fatal(err)
	}
	defer short.Close()
	for what, c := range map[string]struct {
		backing  *os.File
		writable bool
	}{
		"no file":    {},
		"pipe":       {backing: r},
		"short file": {backing: short},
		"writable":   {backing: short, writable: true},
	} {
		t.Run(what, func(t *testing.T) {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			d := attachBacked(t, servedFile{f, c.backing}, size, &device.Options{ReadOnly: !c.writable})
			got, err := readDevice(d.Path(), size)
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("read of the device: %v, right bytes: %v", err, bytes.Equal(got, content))
			}
		})
	}
}

// TestFileBackedKill kills servers of a device that the kernel reads by itself.
func TestFileBackedKill(t *testing.T) {
	kills, err := strconv.Atoi(os.Getenv("REPRISE_KILLS"))
	if err != nil {
		kills = 20
	}
	name, content := randomFile(t, 64<<20)
	needPassthrough(t, name)
	devicetest.Kill(t, devicetest.KillOptions{
		Transport: "fuse", Kills: kills, Backend: backedBackend, Path: name,
		Load: func(t *testing.T, dev string, stop <-chan struct{}) { loadBacked(t, dev, content, stop) },
	})
}

// loadBacked reads from the disk, not from the device's page cache, until stop is
// closed.
func loadBacked(t *testing.T, dev string, content []byte, stop <-chan struct{}) {
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	const block = 16 << 10
	buf := alignedPages(block)
	defer unix.Munmap(buf)
	r := rand.New(rand.NewPCG(9, 10))
	for {
		select {
		case <-stop:
			return
		default:
		}
		off := r.IntN(len(content)/block) * block
		if _, err := f.ReadAt(buf, int64(off)); err != nil || !bytes.Equal(buf, content[off:off+block]) {
			t.Errorf("read at %d: %v, or wrong bytes", off, err)
			return
		}
	}
}

func alignedPages(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	return b
}

// TestFileBackedOutlivesServer has no keeper: the device is read on while it is
// open, and gone after that.
func TestFileBackedOutlivesServer(t *testing.T) {
	name, content := randomFile(t, 8<<20)
	needPassthrough(t, name)
	c, out := startChild(t, name, backedEnv+"=1")
	dev := readLine(t, out)
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	buf := alignedPages(len(content))
	defer unix.Munmap(buf)
	if _, err := f.ReadAt(buf, 0); err != nil || !bytes.Equal(buf, content) {
		t.Errorf("read without a server: %v, right bytes: %v", err, bytes.Equal(buf, content))
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	devicetest.CheckGone(t, childName)
}
