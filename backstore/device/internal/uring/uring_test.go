package uring

import (
	"errors"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newRing(t *testing.T, n int, o Options) *Ring {
	t.Helper()
	runtime.LockOSThread()
	r, err := New(n, o)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EPERM) {
		runtime.UnlockOSThread()
		t.Skipf("needs io_uring: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
	return r
}

func eventFD(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestLayout compares the sizes with those of the kernel's header.
func TestLayout(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"io_uring_params", unsafe.Sizeof(params{}), 120},
		{"io_sqring_offsets", unsafe.Sizeof(sqOffsets{}), 40},
		{"io_cqring_offsets", unsafe.Sizeof(cqOffsets{}), 40},
		{"io_uring_cqe", unsafe.Sizeof(completion{}), completionSize},
		{"io_uring_getevents_arg", unsafe.Sizeof(waitArg{}), 24},
	} {
		if c.got != c.want {
			t.Errorf("%s has %d bytes, want %d", c.name, c.got, c.want)
		}
	}
}

// TestRead reads eventfds, many times around the ring, in each kind of ring.
func TestRead(t *testing.T) {
	for name, o := range map[string]Options{"narrow": {}, "wide": {Wide: true}} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 4, o)
			fd := eventFD(t)
			p := new([8]byte)
			for i := range uint64(50) {
				if !r.Read(fd, unsafe.Pointer(p), 8, i) {
					t.Fatal("no room")
				}
				if err := r.Enter(0, 0); err != nil {
					t.Fatal(err)
				}
				if r.Queued() != 0 || r.Waiting() {
					t.Fatalf("after Enter %d are queued; completions waiting: %v", r.Queued(), r.Waiting())
				}
				go unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
				c := next(t, r)
				if c.Data != i || c.Result != 8 {
					t.Fatalf("completion %d: %+v", i, c)
				}
			}
			runtime.KeepAlive(p)
		})
	}
}

func next(t *testing.T, r *Ring) Completion {
	t.Helper()
	for {
		if c, ok := r.Next(); ok {
			return c
		}
		if err := r.Enter(1, Forever); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFull queues more than there is room for.
func TestFull(t *testing.T) {
	r := newRing(t, 4, Options{})
	fd, p := eventFD(t), new([8]byte)
	for i := range uint64(4) {
		if !r.Read(fd, unsafe.Pointer(p), 8, i) {
			t.Fatal("no room")
		}
	}
	if r.Read(fd, unsafe.Pointer(p), 8, 9) || r.Command(fd, 1, 9) != nil {
		t.Error("a full queue took another entry")
	}
	runtime.KeepAlive(p)
}

func TestTimeout(t *testing.T) {
	r := newRing(t, 1, Options{})
	if err := r.Enter(1, time.Millisecond); err != nil {
		t.Error(err)
	}
	if c, ok := r.Next(); ok {
		t.Errorf("a completion of nothing: %+v", c)
	}
}

// TestCommand sends a command to a file whose driver takes none.
func TestCommand(t *testing.T) {
	r := newRing(t, 1, Options{Wide: true})
	payload := r.Command(eventFD(t), 0xabcd, 7)
	if len(payload) != 80 {
		t.Fatalf("payload of %d bytes, want 80", len(payload))
	}
	if c := next(t, r); c.Data != 7 || unix.Errno(-c.Result) != unix.EOPNOTSUPP {
		t.Errorf("completion %+v, want EOPNOTSUPP", c)
	}
}

// TestNoAllocations runs the whole way of an entry.
func TestNoAllocations(t *testing.T) {
	r := newRing(t, 4, Options{})
	fd, p := eventFD(t), new([8]byte)
	one := []byte{1, 0, 0, 0, 0, 0, 0, 0}
	if n := testing.AllocsPerRun(100, func() {
		unix.Write(fd, one)
		r.Read(fd, unsafe.Pointer(p), 8, 1)
		r.Enter(1, time.Second)
		r.Next()
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
