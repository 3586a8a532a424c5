package probe

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// BenchmarkStart is what a recording waits for a probe, unless it starts it early.
func BenchmarkStart(b *testing.B) {
	needProbe(b)
	for b.Loop() {
		p, err := Start(&Options{Listen: true})
		require.NoError(b, err)
		require.NoError(b, p.Close())
	}
}

// BenchmarkReads reads 4 KiB of a loop device at a time, past the page cache, in
// turns without a probe, with one that watches another device, and with one that
// watches this, in changing order. It reports the median turn without, and the
// medians of what the two others of the same round took more. It reports, too, how
// long the programs themselves run for a read, as the kernel measures it.
func BenchmarkReads(b *testing.B) {
	needProbe(b)
	const turn = 1000
	path, rdev := loop(b, shm(b, 8<<20), 0)
	_, other := loop(b, shm(b, 1<<20), 0)
	dev, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	require.NoError(b, err)
	defer dev.Close()
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	require.NoError(b, err)
	defer func() { _ = unix.Munmap(page) }()
	read := func(devices ...uint64) float64 {
		p, err := Start(&Options{Devices: devices})
		require.NoError(b, err)
		defer p.Close()
		begin := time.Now()
		for i := range turn {
			if _, err := unix.Pread(int(dev.Fd()), page, int64(i)*4096); err != nil {
				b.Fatal(err)
			}
		}
		took := time.Since(begin)
		require.Zero(b, p.Stats().Lost)
		return float64(took.Nanoseconds()) / turn
	}

	var without, elsewhere, watched []float64
	for i := 0; b.Loop(); i++ {
		var took [3]float64
		for j := range took {
			switch k := (i + j) % len(took); k {
			case 0:
				took[k] = read()
			case 1:
				took[k] = read(other)
			case 2:
				took[k] = read(rdev)
			}
		}
		without = append(without, took[0])
		elsewhere = append(elsewhere, took[1]-took[0])
		watched = append(watched, took[2]-took[0])
	}
	b.ReportMetric(0, "ns/op") // is of a round, with the loading
	b.ReportMetric(median(without), "ns/read-without")
	b.ReportMetric(median(elsewhere), "ns/read-more-elsewhere")
	b.ReportMetric(median(watched), "ns/read-more-watched")
	b.ReportMetric(runtimes(b, rdev, func() {
		for i := range turn {
			if _, err := unix.Pread(int(dev.Fd()), page, int64(i)*4096); err != nil {
				b.Fatal(err)
			}
		}
	})/turn, "ns/read-programs")
}

// runtimes is how long the programs run, ns, while f does.
func runtimes(b *testing.B, rdev uint64, f func()) (ns float64) {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	require.NoError(b, err)
	defer stats.Close()
	p, err := Start(&Options{Devices: []uint64{rdev}})
	require.NoError(b, err)
	defer p.Close()
	f()
	for _, prog := range []*ebpf.Program{p.programs.BioQueue, p.programs.RqComplete, p.programs.BioComplete} {
		s, err := prog.Stats()
		require.NoError(b, err)
		ns += float64(s.Runtime.Nanoseconds())
	}
	return ns
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// shm is a file that costs least to read.
func shm(t testing.TB, size int64) string {
	f, err := os.CreateTemp("/dev/shm", "reprise-probe-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.Remove(f.Name()) })
	require.NoError(t, f.Truncate(size))
	require.NoError(t, f.Close())
	return f.Name()
}
