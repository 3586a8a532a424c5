package fuse

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpens(t *testing.T) {
	o, err := NewOpens()
	if err != nil {
		t.Fatal(err)
	}
	want := func(what string, got, errno unix.Errno) {
		t.Helper()
		if got != errno {
			t.Errorf("%s: %v, want %v", what, got, errno)
		}
	}
	want("first", o.add(2), 0)
	want("second", o.add(4), 0)
	want("sent again", o.add(4), 0)
	o.remove(0)
	if err := o.Refuse(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Refuse of what is open: %v", err)
	}
	want("after Refuse that failed", o.add(6), 0)

	// Another process takes over, and gets what the first had done once more.
	fd, err := unix.Dup(o.FD())
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	want("after Close", o.add(8), unix.EBUSY)
	o.remove(4)
	if err := o.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	o, err = AdoptOpens(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	want("sent again to another", o.add(4), 0)
	for _, h := range []uint64{2, 4, 4} {
		if err := o.Refuse(); err == nil {
			t.Error("refused while it is open")
		}
		o.remove(h)
	}
	o.remove(6)
	if err := o.Refuse(); err != nil {
		t.Errorf("Refuse: %v", err)
	}
	want("refused", o.add(10), unix.EBUSY)
}

func TestOpensFull(t *testing.T) {
	o, err := NewOpens()
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	for h := range uint64(opensSize / 8) {
		if errno := o.add(2 * (h + 1)); errno != 0 {
			t.Fatal(errno)
		}
	}
	if errno := o.add(1 << 40); errno != unix.ENFILE {
		t.Errorf("one too many: %v", errno)
	}
	o.remove(2)
	if errno := o.add(1 << 40); errno != 0 {
		t.Errorf("after one has gone: %v", errno)
	}
}

func TestAdoptOpensBad(t *testing.T) {
	fd, err := unix.MemfdCreate("short", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := AdoptOpens(fd); err == nil {
		t.Error("a table of no bytes was adopted")
	}
	if _, err := AdoptOpens(-1); err == nil {
		t.Error("no descriptor was adopted")
	}
}
