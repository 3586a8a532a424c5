package devicetest

import (
	"bytes"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// content makes n random bytes and a backend that holds them.
func content(t *testing.T, n int) ([]byte, *Faulty) {
	data := make([]byte, n)
	Fill(random(t), data)
	return data, &Faulty{Memory: NewMemory(data)}
}

func (s *suite) testRead(t *testing.T) {
	data, b := content(t, 5<<20+3*4096)
	d := s.open(t, readOnly{b}, int64(len(data)), &device.Options{ReadOnly: true})
	r := random(t)
	direct := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
	for range 200 {
		off := r.IntN(len(data)/4096) * 4096
		n := min(4096*(1+r.IntN(400)), len(data)-off)
		direct.expect(int64(off), data[off:off+n])
	}
	buffered := openDev(t, d.Path(), os.O_RDONLY)
	for range 200 {
		off := r.IntN(len(data))
		n := min(1+r.IntN(100_000), len(data)-off)
		buffered.expect(int64(off), data[off:off+n])
	}
	direct.expect(0, data)
}

// testSizes attaches sizes that are no multiple of anything large.
func (s *suite) testSizes(t *testing.T) {
	for _, size := range []int64{512, 4096, 1<<20 - 512, 1<<20 + 4096, 3<<20 + 7*512} {
		data, b := content(t, int(size))
		d := s.open(t, b, size, &device.Options{ReadOnly: true})
		f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
		if got := f.size(); got != size {
			t.Errorf("size %d, want %d", got, size)
		}
		tail := min(size, 8192)
		f.expect(size-tail, data[size-tail:])
		f.expect(0, data)
		f.Close()
	}
}

func (s *suite) testSectors(t *testing.T) {
	if s.caps.File {
		t.Skip("a file has no sectors")
	}
	for _, sector := range s.caps.Sectors {
		data, b := content(t, 1<<20)
		d := s.open(t, b, 1<<20, &device.Options{ReadOnly: true, SectorSize: sector})
		f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
		if got := f.sectorSize(); got != sector {
			t.Errorf("sector size %d, want %d", got, sector)
		}
		off := int64(sector) * 3
		f.expect(off, data[off:off+int64(sector)])
		f.expect(off, data[off:off+7*int64(sector)])
		f.Close()
	}
}

// testHuge reads and writes at the ends of the largest device.
func (s *suite) testHuge(t *testing.T) {
	size := s.caps.MaxSize
	b := new(Memory)
	mark := bytes.Repeat([]byte("reprise!"), 512)
	offs := []int64{0, 1<<31 - 4096, 1 << 32, size / 2, size - 4096}
	for _, off := range offs {
		b.WriteAt(mark, off)
	}
	d := s.open(t, b, size, &device.Options{ReadOnly: !s.caps.Write})
	f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
	if got := f.size(); got != size {
		t.Errorf("size %d, want %d", got, size)
	}
	for _, off := range offs {
		f.expect(off, mark)
	}
	if s.caps.Write {
		w := openDev(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
		w.write(size-8192, mark)
		f.expect(size-8192, mark)
	}
}

func (s *suite) testParallelRead(t *testing.T) {
	data, b := content(t, 8<<20)
	d := s.open(t, b, int64(len(data)), &device.Options{ReadOnly: true})
	var wg sync.WaitGroup
	for i := range 16 {
		f := openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
		wg.Go(func() {
			p := aligned(64 << 10)
			for j := range 100 {
				off := (i*7919 + j*104729) % (len(data)/4096 - 16) * 4096
				n := 4096 * (1 + (i+j)%16)
				if _, err := f.ReadAt(p[:n], int64(off)); err != nil || !bytes.Equal(p[:n], data[off:off+n]) {
					t.Errorf("read %d bytes at %d: %v, or wrong bytes", n, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (s *suite) testReadOnly(t *testing.T) {
	data, b := content(t, 1<<20)
	d := s.open(t, b, 1<<20, &device.Options{ReadOnly: true})
	f, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err == nil { // some kernels let it be opened, none written
		_, err = f.WriteAt(aligned(4096), 0)
		f.Close()
	}
	if err == nil {
		t.Error("a read-only device was written")
	}
	openDev(t, d.Path(), os.O_RDONLY|unix.O_DIRECT).expect(0, data)
}
