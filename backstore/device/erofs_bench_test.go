package device_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// erofsWay is a way to mount an EROFS image that is a file, at dir.
type erofsWay struct {
	name  string
	mount func(b *testing.B, file, dir string) (unmount func())
}

var erofsWays = []erofsWay{
	{"fuse+loop", func(b *testing.B, file, dir string) func() { return mountWay(b, file, dir, "fuse", "") }},
	{"fuse+erofs", func(b *testing.B, file, dir string) func() { return mountWay(b, file, dir, "erofs", "directio") }},
	{"fuse+erofs, not directio", func(b *testing.B, file, dir string) func() { return mountWay(b, file, dir, "erofs", "") }},
	{"the file itself", func(b *testing.B, file, dir string) func() { return mountRaw(b, file, dir, "") }},
}

// mountWay serves the file anew, so that nothing of it is in any cache but the
// file's own.
func mountWay(b *testing.B, file, dir, transport, data string) (unmount func()) {
	b.Helper()
	f, err := os.Open(file)
	if err != nil {
		b.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		b.Fatal(err)
	}
	d, err := device.Attach(b.Context(), readOnlyFile{f}, st.Size(), &device.Options{Transport: transport, ReadOnly: true})
	if err != nil {
		b.Skip(err)
	}
	var unmountDevice func()
	device.Apart(func() error { unmountDevice = mountRaw(b, d.Path(), dir, data); return nil })
	return func() {
		unmountDevice()
		closeBusy(b, d)
		f.Close()
	}
}

func mountRaw(b *testing.B, dev, dir, data string) (unmount func()) {
	b.Helper()
	if err := unix.Mount(dev, dir, "erofs", unix.MS_RDONLY, data); err != nil {
		b.Fatalf("mount %s: %v", dev, err)
	}
	return func() {
		if err := device.Unmount(dir); err != nil {
			b.Error(err)
		}
	}
}

// erofsJob runs a program in dir and tells how many bytes, or reads, a second.
type erofsJob struct {
	name string
	run  func(b *testing.B, dir string) (rate float64)
}

var erofsJobs = []erofsJob{
	{"one file, in order, MB/s", func(b *testing.B, dir string) float64 {
		return fioFile(b, dir, "--rw=read", "--bs=128k") * (128 << 10) / 1e6
	}},
	{"4 KiB at random, reads/s", func(b *testing.B, dir string) float64 {
		return fioFile(b, dir, "--rw=randread", "--bs=4k", "--io_size=40m", "--fadvise_hint=random")
	}},
	{"4 KiB at random, 8 readers, reads/s", func(b *testing.B, dir string) float64 {
		return fioFile(b, dir, "--rw=randread", "--bs=4k", "--io_size=20m", "--fadvise_hint=random", "--numjobs=8", "--group_reporting")
	}},
	{"3000 small files, files/s", func(b *testing.B, dir string) float64 {
		begin := time.Now()
		c := exec.Command("sh", "-c", "find small -type f -print0 | xargs -0 cat | wc -c")
		c.Dir = dir
		if out, err := c.Output(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		return 3000 / time.Since(begin).Seconds()
	}},
}

func fioFile(b *testing.B, dir string, args ...string) (iops float64) {
	b.Helper()
	args = append([]string{"--name=x", "--filename=" + filepath.Join(dir, "large"), "--readonly", "--ioengine=psync",
		"--output-format=json", "--randrepeat=0"}, args...)
	out, err := exec.Command("fio", args...).Output()
	if err != nil {
		b.Fatalf("fio: %v: %s", err, out)
	}
	var result struct {
		Jobs []struct{ Read struct{ IOPS float64 } }
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 {
		b.Fatalf("fio: %v: %s", err, out)
	}
	return result.Jobs[0].Read.IOPS
}

// BenchmarkErofs compares cold reads of an EROFS image, each way in turn in
// every round. The ratios are medians of the rounds' own ratios to the first.
func BenchmarkErofs(b *testing.B) {
	devicetest.RequireRoot(b)
	for _, tool := range []string{"fio", "mkfs.erofs"} {
		if _, err := exec.LookPath(tool); err != nil {
			b.Skip("needs " + tool)
		}
	}
	image := benchImage(b)
	dir := b.TempDir()
	for b.Loop() {
		type sample struct {
			rate float64
			cpu  time.Duration
		}
		results := make([][][]sample, len(erofsJobs)) // by job, round, way
		for range benchRounds {
			for i, j := range erofsJobs {
				var round []sample
				for _, w := range erofsWays {
					unmount := w.mount(b, image, dir)
					before := cpuTime()
					rate := j.run(b, dir)
					round = append(round, sample{rate, cpuTime() - before})
					unmount()
				}
				results[i] = append(results[i], round)
			}
		}
		var s strings.Builder
		w := tabwriter.NewWriter(&s, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(w, "job\tway\trate\tratio\tserver CPU\t")
		for i, j := range erofsJobs {
			median := func(f func([]sample) float64) float64 {
				var v []float64
				for _, round := range results[i] {
					v = append(v, f(round))
				}
				slices.Sort(v)
				return v[len(v)/2]
			}
			for k, way := range erofsWays {
				fmt.Fprintf(w, "%s\t%s\t%.0f\t%.2f\t%.0f ms\t\n", j.name, way.name,
					median(func(r []sample) float64 { return r[k].rate }),
					median(func(r []sample) float64 { return r[k].rate / r[0].rate }),
					median(func(r []sample) float64 { return float64(r[k].cpu) / 1e6 }))
			}
		}
		w.Flush()
		fmt.Printf("%d rounds, medians; ratios to the first way of each job\n%s", benchRounds, &s)
	}
}

// benchImage is an image of a large file and many small ones, in the page cache
// after it was made.
func benchImage(b *testing.B) (image string) {
	b.Helper()
	root := b.TempDir() // /dev/shm would not do: EROFS cannot mount files of a tmpfs
	r := rand.New(rand.NewPCG(8, 8))
	write := func(name string, n int) {
		p := make([]byte, n)
		devicetest.Fill(r, p)
		if err := os.WriteFile(filepath.Join(root, "tree", name), p, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(root, "tree", "small"), 0o700); err != nil {
		b.Fatal(err)
	}
	write("large", 192<<20)
	for i := range 3000 {
		write(fmt.Sprint("small/", i), r.IntN(32<<10))
	}
	image = filepath.Join(root, "image")
	devicetest.Tool(b, "mkfs.erofs", "--quiet", image, filepath.Join(root, "tree"))
	return image
}
