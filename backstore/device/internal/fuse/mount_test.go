package fuse

import (
	"bytes"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMounted uses the file of a session through the kernel, without a loop
// device in between.
func TestMounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN)")
	}
	if _, err := os.Stat(devFuse); err != nil {
		t.Skip("needs " + devFuse)
	}
	const size = 2 << 20
	m := &memory{data: pattern(size)}
	want := bytes.Clone(m.data)
	s, err := Start(server(t, m), testConfig)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := s.OpenFile()
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "disk")
	check := func(what string) {
		t.Helper()
		got := make([]byte, size)
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("after %s: %v, or wrong bytes", what, err)
		}
	}
	check("open")
	copy(want[4096:], bytes.Repeat([]byte("x"), 10_000))
	if _, err := f.WriteAt(want[4096:14_096], 4096); err != nil {
		t.Error(err)
	}
	check("write")
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE} {
		if err := unix.Fallocate(fd, mode|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 4096*int64(1+mode)); err != nil {
			t.Errorf("fallocate %x: %v", mode, err)
		}
		clear(want[1<<20 : 1<<20+4096*int(1+mode)])
		check("fallocate")
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if err := f.Truncate(1); err == nil {
		t.Error("truncated")
	}
	f.Close()
	if err := s.Close(time.Minute); err != nil {
		t.Error(err)
	}
	if err := s.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
}
