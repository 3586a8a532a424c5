package device_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// BenchmarkTransports reads 4 KiB at random, with direct I/O, from a device of
// each transport over memory, by 1 and by 32 readers.
func BenchmarkTransports(b *testing.B) {
	devicetest.RequireRoot(b)
	for _, transport := range []string{"fuse", "nbd", "ublk", "tcmu"} {
		for _, readers := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/readers=%d", transport, readers), func(b *testing.B) {
				benchmarkTransport(b, transport, readers)
			})
		}
	}
}

func benchmarkTransport(b *testing.B, transport string, readers int) {
	const size = 64 << 20
	content := make([]byte, size)
	devicetest.Fill(rand.New(rand.NewPCG(1, 2)), content)
	d, err := device.Attach(b.Context(), devicetest.NewMemory(content), size, &device.Options{Transport: transport, ReadOnly: true})
	var missing *device.FeatureError
	if errors.As(err, &missing) {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	f, err := os.OpenFile(d.Path(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	var done atomic.Int64
	for range readers {
		page := alignedPages(4096)
		wg.Go(func() {
			for done.Add(1) <= int64(b.N) {
				if _, err := unix.Pread(int(f.Fd()), page, rand.Int64N(size/4096)*4096); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "IOPS")
}
