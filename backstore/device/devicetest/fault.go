package devicetest

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// testBlockedRead has reads wait in the backend while others go on.
func (s *suite) testBlockedRead(t *testing.T) {
	const blocked = 20
	data, b := content(t, 1<<20)
	d := s.open(t, b, int64(len(data)), &device.Options{ReadOnly: true})
	entered, gate := make(chan struct{}, blocked), make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open) // before the device's: it would wait
	b.SetHook(func(_ string, off, _ int64) error {
		if off < blocked*4096 {
			entered <- struct{}{}
			<-gate
		}
		return nil
	})
	f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
	var wg sync.WaitGroup
	for i := range blocked {
		off := i * 4096
		wg.Go(func() {
			p := aligned(4096)
			if _, err := f.ReadAt(p, int64(off)); err != nil || firstDiff(p, data[off:]) < 4096 {
				t.Errorf("read that had to wait: %v, or wrong bytes", err)
			}
		})
		wait(t, entered, "a read to reach the backend")
		f.expect(512<<10, data[512<<10:640<<10])
	}
	open()
	wg.Wait()
}

// testErrors wants an I/O error of what the backend fails, of nothing else,
// and only as long as it does.
func (s *suite) testErrors(t *testing.T) {
	data, b := content(t, 1<<20)
	boom := errors.New("boom")
	var seen atomic.Pointer[error]
	d := s.open(t, b, int64(len(data)), &device.Options{
		ReadOnly: !s.caps.Write,
		OnError:  func(err error) { seen.Store(&err) },
	})
	const bad, n = 64 << 10, 4096
	failing := func(op string, err error) Hook {
		return func(o string, off, m int64) error {
			if o == op && (op == "sync" || off < bad+n && bad < off+m) {
				return err
			}
			return nil
		}
	}
	flags := os.O_RDWR | unix.O_DIRECT
	if !s.caps.Write {
		flags = os.O_RDONLY | unix.O_DIRECT
	}
	f := openDev(t, d.Path(), flags)
	ops := map[string]func() error{
		"read":  func() error { _, err := f.ReadAt(aligned(n), bad); return err },
		"write": func() error { _, err := f.WriteAt(aligned(n), bad); return err },
		"sync":  f.Sync,
	}
	if !s.caps.Write {
		delete(ops, "write")
		delete(ops, "sync")
	}
	for name, op := range ops {
		for _, fault := range []error{boom, io.ErrUnexpectedEOF, io.EOF} {
			b.SetHook(failing(name, fault))
			if err := op(); !errors.Is(err, unix.EIO) {
				t.Errorf("%s that the backend fails with %v: %v", name, fault, err)
			}
			var e *device.IOError
			if p := seen.Swap(nil); p == nil || !errors.As(*p, &e) || e.Op != name {
				t.Errorf("%s: OnError did not get an *IOError", name)
			} else if errors.Is(fault, boom) && !errors.Is(e, boom) {
				t.Errorf("%s: OnError got %v", name, e)
			}
			f.expect(0, data[:bad])
			f.expect(bad+n, data[bad+n:bad+3*n])
			b.SetHook(nil)
		}
	}
	f.expect(0, data)
	if err := d.Err(); err != nil {
		t.Errorf("a backend error ended the device: %v", err)
	}
}

// testCloseInFlight closes a device under readers that keep it busy.
func (s *suite) testCloseInFlight(t *testing.T) {
	s.needUnkept(t)
	data, b := content(t, 1<<20)
	d := s.open(t, b, int64(len(data)), &device.Options{ReadOnly: true})
	var wg sync.WaitGroup
	started := make(chan struct{}, 100)
	for i := range 8 {
		f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
		wg.Go(func() {
			defer f.Close()
			p := aligned(64 << 10)
			for j := 0; ; j++ {
				off := (i + j) % 16 * (64 << 10)
				if _, err := f.ReadAt(p, int64(off)); err != nil {
					return // what Close is for
				}
				if firstDiff(p, data[off:off+len(p)]) < len(p) {
					t.Error("wrong bytes")
				}
				if j == 10 {
					started <- struct{}{}
				}
			}
		})
	}
	for range 8 {
		wait(t, started, "the readers")
	}
	closed := make(chan error, 1)
	go func() { closed <- d.Close() }()
	if err := wait(t, closed, "Close"); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if err := d.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
}

// testCloseStuck closes a device whose backend does not return: Close does.
func (s *suite) testCloseStuck(t *testing.T) {
	s.needUnkept(t)
	_, b := content(t, 1<<20)
	d, err := s.attach(t.Context(), b, 1<<20, &device.Options{
		ReadOnly: true, Name: "devicetest-stuck", CloseTimeout: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	entered, gate := make(chan struct{}, 1), make(chan struct{})
	b.SetHook(func(string, int64, int64) error {
		entered <- struct{}{}
		<-gate
		return nil
	})
	f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
	read := make(chan error, 1)
	go func() {
		_, err := f.ReadAt(aligned(4096), 0)
		read <- err
	}()
	wait(t, entered, "a read to reach the backend")
	closed := make(chan error, 1)
	go func() { closed <- d.Close() }()
	if err := wait(t, closed, "Close"); err == nil {
		t.Error("Close did not say that the backend is stuck")
	}
	if err := wait(t, read, "the read to fail"); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	f.Close()
	close(gate)
	wait(t, d.Done(), "the server to end")
	CheckGone(t, "devicetest-stuck")
}

// testCloseOpen closes a device that somebody has open, who gets errors, and
// whose close then frees it.
func (s *suite) testCloseOpen(t *testing.T) {
	data, b := content(t, 1<<20)
	d := s.open(t, b, 1<<20, &device.Options{ReadOnly: true})
	f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
	f.expect(0, data)
	if s.caps.File {
		var busy *device.BusyError
		if err := d.Close(); !errors.As(err, &busy) {
			t.Errorf("Close of a file that is open: %v", err)
		}
		f.expect(0, data)
		f.Close()
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := f.ReadAt(aligned(4096), 0); err == nil {
		t.Error("a closed device was read")
	}
	f.Close()
}

func (s *suite) needUnkept(t *testing.T) {
	t.Helper()
	if s.caps.File {
		t.Skip("a file that is open cannot be closed under its readers")
	}
}
