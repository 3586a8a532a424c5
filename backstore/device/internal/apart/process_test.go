package apart

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestCall makes directories, from many goroutines, while others allocate.
func TestCall(t *testing.T) {
	dir := t.TempDir()
	stop := make(chan struct{})
	var noise, calls sync.WaitGroup
	for range 2 {
		noise.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = make([]byte, 1<<16)
				}
			}
		})
	}
	for i := range 4 {
		calls.Go(func() {
			for j := range 5 {
				name := filepath.Join(dir, string(rune('a'+i))+string(rune('a'+j)))
				if err := mkdir(name); err != nil {
					t.Error(err)
				}
				if err := mkdir(name); !errors.Is(err, unix.EEXIST) {
					t.Errorf("a second time: %v", err)
				}
			}
		})
	}
	calls.Wait()
	close(stop)
	noise.Wait()
	if made, err := os.ReadDir(dir); err != nil || len(made) != 4*5 {
		t.Errorf("%d directories, %v", len(made), err)
	}
}

func mkdir(name string) error {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	dir := unix.AT_FDCWD
	err = Call(-1, unix.SYS_MKDIRAT, uintptr(dir), uintptr(unsafe.Pointer(p)), 0o700)
	runtime.KeepAlive(p)
	return err
}

// TestCallDescriptors looks at what the other process has.
func TestCallDescriptors(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	b := new(byte)
	write := func(kept int) error {
		return Call(kept, unix.SYS_WRITE, w.Fd(), uintptr(unsafe.Pointer(b)), 1)
	}
	if err := write(int(w.Fd())); err != nil {
		t.Errorf("with the descriptor: %v", err)
	}
	for _, other := range []int{-1, 0, int(r.Fd())} {
		if err := write(other); !errors.Is(err, unix.EBADF) {
			t.Errorf("with descriptor %d: %v, want EBADF", other, err)
		}
	}
	runtime.KeepAlive(b)
}
