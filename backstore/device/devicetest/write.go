package devicetest

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

func (s *suite) needWrite(t *testing.T) {
	t.Helper()
	if !s.caps.Write {
		t.Skip("the transport does not write")
	}
}

// expectBackend compares what the backend holds.
func expectBackend(t *testing.T, b device.Backend, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	b.ReadAt(got, 0)
	if !bytes.Equal(got, want) {
		t.Errorf("the backend differs, first at %d", firstDiff(got, want))
	}
}

func (s *suite) testWrite(t *testing.T) {
	s.needWrite(t)
	for _, sector := range s.caps.Sectors {
		data, b := content(t, 4<<20)
		d := s.open(t, b, int64(len(data)), &device.Options{SectorSize: sector})
		r := random(t)
		direct := openDev(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
		for _, n := range []int{sector, 3 * sector, 1 << 20, 1<<20 + sector} {
			off := r.IntN((len(data)-n)/sector) * sector
			Fill(r, data[off:off+n])
			direct.write(int64(off), data[off:off+n])
			direct.expect(int64(off), data[off:off+n])
		}
		expectBackend(t, b, data)
		buffered := openDev(t, d.Path(), os.O_RDWR)
		for range 20 {
			off, n := r.IntN(len(data)-70_000), 1+r.IntN(70_000)
			Fill(r, data[off:off+n])
			if _, err := buffered.WriteAt(data[off:off+n], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		before := b.Syncs.Load()
		if err := buffered.Sync(); err != nil {
			t.Fatal(err)
		}
		if b.Syncs.Load() == before {
			t.Error("fsync did not reach the backend")
		}
		expectBackend(t, b, data)
		direct.expect(0, data)
		direct.Close()
		buffered.Close()
	}
}

// testModel does random things to a device and to a byte slice.
func (s *suite) testModel(t *testing.T) {
	s.needWrite(t)
	data, b := content(t, 6<<20)
	d := s.open(t, b, int64(len(data)), nil)
	f := openDev(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
	r := random(t)
	for range 600 {
		off := r.IntN(len(data)/4096) * 4096
		n := min(4096*(1+r.IntN(80)), len(data)-off)
		switch r.IntN(6) {
		case 0, 1:
			Fill(r, data[off:off+n])
			f.write(int64(off), data[off:off+n])
		case 2:
			if s.caps.Discard && offersDiscard(d.Path()) {
				clear(data[off : off+n])
				if err := f.punch(unix.FALLOC_FL_PUNCH_HOLE, int64(off), int64(n)); err != nil {
					t.Fatalf("punch hole: %v", err)
				}
			}
		case 3:
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		default:
			f.expect(int64(off), data[off:off+n])
		}
	}
	f.expect(0, data)
	expectBackend(t, b, data)
}

func (s *suite) testDiscard(t *testing.T) {
	s.needWrite(t)
	if !s.caps.Discard {
		t.Skip("the transport does not discard")
	}
	for name, discard := range map[string]func(f *file, off, n int64) error{
		"discard":    func(f *file, off, n int64) error { return f.ioctlRange(unix.BLKDISCARD, off, n) },
		"zero":       func(f *file, off, n int64) error { return f.ioctlRange(unix.BLKZEROOUT, off, n) },
		"punch hole": func(f *file, off, n int64) error { return f.punch(unix.FALLOC_FL_PUNCH_HOLE, off, n) },
		"zero range": func(f *file, off, n int64) error { return f.punch(unix.FALLOC_FL_ZERO_RANGE, off, n) },
	} {
		t.Run(name, func(t *testing.T) {
			data, b := content(t, 4<<20)
			d := s.open(t, b, int64(len(data)), nil)
			offered := offersDiscard(d.Path())
			if !offered && name != "zero" { // which the kernel writes itself then
				t.Skip("needs a kernel whose driver takes discards: queue/discard_max_bytes is 0")
			}
			f := openDev(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
			if err := discard(f, 1<<20, 2<<20); err != nil {
				t.Fatal(err)
			}
			clear(data[1<<20 : 3<<20])
			f.expect(0, data)
			expectBackend(t, b, data)
			if offered && b.Discards.Load() == 0 {
				t.Error("it did not reach the backend as a discard")
			}
		})
	}
}

// testNoDiscard wants a device that refuses discards, and otherwise works,
// over a backend without Discard and Sync.
func (s *suite) testNoDiscard(t *testing.T) {
	s.needWrite(t)
	data, b := content(t, 1<<20)
	d := s.open(t, writeOnly{b, b}, int64(len(data)), nil)
	f := openDev(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
	err := f.ioctlRange(unix.BLKDISCARD, 0, 1<<20)
	// No error: the driver only finds out when it tries, and then Linux 6.12, to
	// which a discard is advice, calls it done.
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("discard: %v, want EOPNOTSUPP", err)
	}
	clear(data[4096:8192])
	if err := f.ioctlRange(unix.BLKZEROOUT, 4096, 4096); err != nil { // the kernel writes zeros itself
		t.Errorf("zero: %v", err)
	}
	Fill(random(t), data[:4096])
	f.write(0, data[:4096])
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	f.expect(0, data)
}
