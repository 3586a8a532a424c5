package device_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/device/internal/ublk"
)

// BenchmarkUblk reads from ublk and from fuse+loop, over the same bytes in
// memory, with direct I/O. Processor time is that of the process, server and
// readers.
func BenchmarkUblk(b *testing.B) {
	devicetest.RequireRoot(b)
	if err := ublk.Missing(); err != nil {
		b.Skip(err)
	}
	for _, c := range []struct{ jobs, n int }{{1, 4 << 10}, {4, 4 << 10}, {32, 4 << 10}, {1, 256 << 10}, {4, 256 << 10}} {
		for _, transport := range []string{"fuse", "ublk"} {
			b.Run(fmt.Sprintf("%dK-qd%d/%s", c.n>>10, c.jobs, transport), func(b *testing.B) {
				benchReads(b, transport, c.jobs, c.n)
			})
		}
	}
}

func benchReads(b *testing.B, transport string, jobs, n int) {
	const size = 64 << 20
	d, err := device.Attach(b.Context(), devicetest.NewMemory(make([]byte, size)), size, &device.Options{Transport: transport, ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	f, err := os.OpenFile(d.Path(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.SetBytes(int64(n))
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	before := processorTime()
	b.ResetTimer()
	for range jobs {
		wg.Go(func() {
			p := make([]byte, n+4096)
			p = p[-int(uintptr(unsafe.Pointer(&p[0])))&4095:][:n]
			for left.Add(-1) >= 0 {
				if _, err := f.ReadAt(p, int64(rand.IntN(size/n)*n)); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(processorTime()-before)/float64(time.Microsecond)/float64(b.N), "cpu-µs/op")
}

func processorTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
