package apart

import (
	"errors"
	"io"
	"os"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	kept, other := tempFile(t), tempFile(t)
	boom := errors.New("boom")
	var inside int
	err := Run(func() error {
		if _, err := unix.Write(int(kept.Fd()), []byte("apart")); err != nil {
			t.Errorf("write to a kept descriptor: %v", err)
		}
		if _, err := unix.Write(int(other.Fd()), []byte("apart")); err != unix.EBADF {
			t.Errorf("write to another descriptor: %v, want EBADF", err)
		}
		var err error
		inside, err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
		}
		unix.Close(inside)
		return boom
	}, int(kept.Fd()))
	if err != boom {
		t.Errorf("got %v", err)
	}
	for _, f := range []*os.File{kept, other} {
		if _, err := f.WriteString("here"); err != nil {
			t.Errorf("a descriptor of the process is gone: %v", err)
		}
	}
}

// TestRuntime has the runtime work on the thread: collect garbage, which polls
// the network, and set timers, which wake the poller.
func TestRuntime(t *testing.T) {
	other := tempFile(t)
	err := Run(func() error {
		for range 50 {
			runtime.GC()
			<-time.After(time.Microsecond)
		}
		if _, err := unix.Write(int(other.Fd()), []byte("x")); err != unix.EBADF {
			t.Errorf("write to another descriptor: %v, want EBADF", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTake(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fd, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	err = Take(func() error {
		_, err := unix.Write(fd, []byte("x"))
		return err
	}, fd)
	if err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "x" { // ends: no copy is left
		t.Errorf("read %q, %v", b, err)
	}
}

func tempFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
