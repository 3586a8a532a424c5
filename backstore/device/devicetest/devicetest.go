// Package devicetest is the suite that every transport of package device
// passes, with the backend and the helpers that it uses.
//
// [Run] attaches devices through a [Factory], over [Memory] backends wrapped
// in [Faulty], and looks at them as the kernel's other users do: with direct
// and buffered I/O, ioctls, mkfs and mount. Tests that need what the process or
// the machine lacks skip by name. Each test closes its device and checks that
// the kernel has forgotten it.
package devicetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/reprise-project/reprise/backstore/device"
)

// Device is what a transport gives; *device.Device is one.
type Device interface {
	Path() string
	Close() error
	Done() <-chan struct{}
	Err() error
}

// Factory attaches a device, as [device.Attach] does.
type Factory func(ctx context.Context, b device.Backend, size int64, o *device.Options) (Device, error)

// Caps is what a transport can do.
type Caps struct {
	Write   bool
	Discard bool
	Sectors []int // logical block sizes, bytes
	MaxSize int64 // bytes
	File    bool  // the path is a file's, not a block device's, and whoever has it open keeps it
}

// Run runs the suite.
func Run(t *testing.T, f Factory, c Caps) {
	RequireRoot(t)
	s := &suite{attach: f, caps: c}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Read", s.testRead},
		{"Sizes", s.testSizes},
		{"Sectors", s.testSectors},
		{"Huge", s.testHuge},
		{"ParallelRead", s.testParallelRead},
		{"ReadOnly", s.testReadOnly},
		{"Write", s.testWrite},
		{"Model", s.testModel},
		{"Discard", s.testDiscard},
		{"NoDiscard", s.testNoDiscard},
		{"BlockedRead", s.testBlockedRead},
		{"Errors", s.testErrors},
		{"CloseInFlight", s.testCloseInFlight},
		{"CloseStuck", s.testCloseStuck},
		{"CloseOpen", s.testCloseOpen},
		{"FileSystem", s.testFileSystem},
	} {
		t.Run(test.name, test.run)
	}
}

type suite struct {
	attach Factory
	caps   Caps
}

var names atomic.Int64

// open attaches a device, of which the test's end takes care.
func (s *suite) open(t *testing.T, b device.Backend, size int64, o *device.Options) Device {
	t.Helper()
	var opts device.Options
	if o != nil {
		opts = *o
	}
	opts.Name = fmt.Sprintf("devicetest-%d-%d", os.Getpid(), names.Add(1))
	d, err := s.attach(t.Context(), b, size, &opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		closeUnmounted(t, d)
		wait(t, d.Done(), "the server to end")
		CheckGone(t, opts.Name)
	})
	return d
}

// closeUnmounted closes a device that is mounted nowhere in sight. A container
// that some other process started while it was mounted may hold a copy of the
// mount in its own namespace, until it ends.
func closeUnmounted(t *testing.T, d Device) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		err := d.Close()
		var busy *device.BusyError
		if errors.As(err, &busy) && len(busy.Mounts) == 0 && time.Now().Before(deadline) {
			continue // Close has waited
		}
		if err != nil {
			t.Error(err)
		}
		return
	}
}

// patience is how long a test waits for what must happen; a machine that is
// busy may take most of it.
const patience = 30 * time.Second

func wait[T any](t *testing.T, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("waited %v for %s", patience, what)
	}
	return v
}

// RequireRoot skips the test unless it may make devices.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN)")
	}
	for _, p := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(p); err != nil {
			t.Skip("needs " + p)
		}
	}
}

// CheckGone fails the test if a loop device over a file called name is left,
// or a mount of it.
func CheckGone(t testing.TB, name string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		dev := loopOver(name)
		if dev == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("%s is still there, over %s", dev, name)
			return
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), name) {
		t.Errorf("a mount of %s is left:\n%s", name, mounts)
	}
}

// loopOver finds a loop device over a file called name.
func loopOver(name string) (dev string) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return ""
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == "/"+name {
			return "/dev/" + strings.Split(f, "/")[3]
		}
	}
	return ""
}

// random is a reproducible source for a test.
func random(t *testing.T) *rand.Rand {
	var seed [32]byte
	copy(seed[:], t.Name())
	return rand.New(rand.NewChaCha8(seed))
}

// Fill puts random bytes from r into p.
func Fill(r *rand.Rand, p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		v := r.Uint64()
		for j := range 8 {
			p[i+j] = byte(v >> (8 * j))
		}
	}
}

var (
	_ io.WriterAt      = (*Memory)(nil)
	_ device.Discarder = (*Memory)(nil)
	_ device.Syncer    = (*Memory)(nil)
)
