package devicetest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// Tool skips the test unless the program is installed, and runs it.
func Tool(t testing.TB, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skip("needs " + name)
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// mountAt mounts dev at a new directory until the returned function or the
// test's end unmounts it.
func mountAt(t *testing.T, dev string, readOnly bool, data string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	if err := device.Mount(dev, dir, "ext4", readOnly, data); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount = func() {
		if !mounted {
			return
		}
		mounted = false
		if err := device.Unmount(dir); err != nil {
			t.Error(err)
			device.UnmountLazy(dir)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// testFileSystem makes ext4, fills it, checks it, and reads it again from
// another device over the same bytes.
func (s *suite) testFileSystem(t *testing.T) {
	s.needWrite(t)
	const size = 64 << 20
	for _, sector := range s.caps.Sectors {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			b := new(Memory)
			d := s.open(t, b, size, &device.Options{SectorSize: sector})
			Tool(t, "mkfs.ext4", "-q", "-F", d.Path())
			dir, unmount := mountAt(t, d.Path(), false, "discard")
			files := writeFiles(t, dir)
			expectBusy(t, d, dir)
			unmount()
			Tool(t, "e2fsck", "-fn", d.Path())
			closeUnmounted(t, d)
			again := s.open(t, b, size, &device.Options{SectorSize: sector, ReadOnly: true})
			dir, _ = mountAt(t, again.Path(), true, "")
			for name, want := range files {
				got, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %v, or wrong bytes", name, err)
				}
			}
		})
	}
}

// writeFiles writes files of many sizes and removes every fourth.
func writeFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	r := random(t)
	files := map[string][]byte{}
	for i := range 60 {
		name := fmt.Sprintf("f%02d", i)
		data := make([]byte, r.IntN(1<<(6+i%16)))
		Fill(r, data)
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		files[name] = data
		if i%4 == 3 {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
			delete(files, name)
		}
	}
	return files
}

// expectBusy closes a device that is mounted, which must leave it working.
func expectBusy(t *testing.T, d Device, dir string) {
	t.Helper()
	var busy *device.BusyError
	err := d.Close()
	if !errors.As(err, &busy) || !errors.Is(err, unix.EBUSY) || !slices.Contains(busy.Mounts, dir) {
		t.Errorf("Close of a mounted device: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "after"), []byte("still here"), 0o600); err != nil {
		t.Errorf("write after Close was refused: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "after")); err != nil {
		t.Error(err)
	}
}
