package device_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

// The settings of BenchmarkFio, from the environment.
var (
	benchRounds  = envInt("REPRISE_BENCH_ROUNDS", 3)
	benchSeconds = envInt("REPRISE_BENCH_SECONDS", 1)
	benchDir     = os.Getenv("REPRISE_BENCH_DIR") // of the raw file; default /dev/shm
)

const benchSize = 256 << 20

func envInt(name string, def int) int {
	if v, err := strconv.Atoi(os.Getenv(name)); err == nil && v > 0 {
		return v
	}
	return def
}

// contender is a device to be measured.
type contender struct {
	name string
	open func(b *testing.B, file string) (dev string)
}

var contenders = []contender{
	{"native loop, direct I/O on", func(b *testing.B, file string) string { return losetup(b, file, "on") }},
	{"native loop, direct I/O off", func(b *testing.B, file string) string { return losetup(b, file, "off") }},
	{"fuse+loop, file read by the kernel", func(b *testing.B, file string) string { return attachBacking(b, file) }},
	{"fuse+loop, raw file", func(b *testing.B, file string) string { return attachFile(b, file, 0) }},
	{"fuse+loop, raw file O_DIRECT", func(b *testing.B, file string) string { return attachFile(b, file, unix.O_DIRECT) }},
	{"fuse+loop, memory", func(b *testing.B, _ string) string { return attachBench(b, filledMemory()) }},
	{"fuse+loop, lz4 layers", func(b *testing.B, file string) string { return attachBench(b, lz4Image(b, filepath.Dir(file))) }},
}

// reported are the contenders whose ratios are the benchmark's metrics, with
// the metrics' names.
var reported = map[string]string{
	"fuse+loop, file read by the kernel": "kernel",
	"fuse+loop, raw file":                "raw",
	"fuse+loop, lz4 layers":              "lz4",
}

// job is a fio job.
type job struct {
	name, rw, block, engine string
	depth                   int
}

var jobs = []job{
	{"4 KiB random, QD 1", "randread", "4k", "psync", 1},
	{"4 KiB random, QD 32", "randread", "4k", "libaio", 32},
	{"128 KiB sequential, QD 1", "read", "128k", "psync", 1},
	{"1 MiB sequential, QD 4", "read", "1m", "libaio", 4},
}

// memory is the cheapest backend there can be.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return copy(p, m[off:]), nil }

// filledMemory has pages of its own: pages that nobody wrote are all the same
// one, which the processor's cache holds.
func filledMemory() memory {
	m := make(memory, benchSize)
	devicetest.Fill(rand.New(rand.NewPCG(3, 4)), m)
	return m
}

// lz4Image is an image of two local layers of lz4 blocks of 4 KiB that hold a
// program, this one, again and again.
func lz4Image(b *testing.B, dir string) *backstore.Image {
	b.Helper()
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		b.Fatal(err)
	}
	content := bytes.Repeat(program, benchSize/len(program)+1)[:benchSize]
	var sources []backstore.LayerSource
	for _, part := range [][2]int64{{0, benchSize}, {benchSize / 4, benchSize / 2}} {
		sources = append(sources, backstore.LayerSource{Path: lz4Layer(b, dir, content, part[0], part[1])})
	}
	im, err := backstore.OpenImage(context.Background(), sources)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { im.Close() })
	return im
}

// lz4Layer writes the range [from, to) of a device as a layer.
func lz4Layer(b *testing.B, dir string, content []byte, from, to int64) string {
	b.Helper()
	var files [2]*os.File
	for i := range files {
		f, err := os.CreateTemp(dir, "reprise-bench-")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.Remove(f.Name()) })
		files[i] = f
	}
	w, err := lsmt.CreateSparse(files[0], &lsmt.WritableOptions{VirtualSize: benchSize})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteAt(content[from:to], from); err != nil {
		b.Fatal(err)
	}
	z, err := zfile.NewWriter(files[1], nil)
	if err != nil {
		b.Fatal(err)
	}
	err = w.Commit(context.Background(), z, lsmt.CommitOptions{})
	if err := errors.Join(err, z.Close(), files[1].Close(), os.Truncate(files[0].Name(), 0)); err != nil {
		b.Fatal(err)
	}
	return files[1].Name()
}

// sample is what one run of fio gave.
type sample struct {
	iops    float64
	latency time.Duration // median
	cpu     time.Duration // of this process, a request
	perGB   cpuUse        // seconds a GB read
}

// cpuUse is processor time: of this process, which serves the devices, and of
// the whole machine, fio and kernel threads included, and what else runs.
type cpuUse struct{ server, system float64 }

// BenchmarkFio compares devices with the kernel's own loop device, each
// contender in turn in every round, so that what else the machine does hits
// all of them alike. The ratios are medians of the rounds' own ratios to the
// first contender. With the raw file in memory (/dev/shm) the native loop
// device is as fast as it can be. The machine's processor time means something
// only if it has nothing else to do.
func BenchmarkFio(b *testing.B) {
	devicetest.RequireRoot(b)
	for _, tool := range []string{"fio", "losetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			b.Skip("needs " + tool)
		}
	}
	file := rawFile(b)
	var devs []string
	for _, c := range contenders {
		devs = append(devs, c.open(b, file))
	}
	for b.Loop() {
		results := map[job][][]sample{}
		for range benchRounds {
			for _, j := range jobs {
				var round []sample
				for _, dev := range devs {
					round = append(round, fio(b, j, dev))
				}
				results[j] = append(results[j], round)
			}
		}
		report(b, results)
	}
}

// BenchmarkLayers is what reading the lz4 layers of BenchmarkFio takes without a
// device: the share of their reader, and decoder, in what a server needs.
func BenchmarkLayers(b *testing.B) {
	im := lz4Image(b, benchFolder())
	seen := map[string]bool{}
	for _, j := range jobs {
		n := int64(j.bytes())
		name, _, _ := strings.Cut(j.name, ",") // the depth makes no difference
		if seen[name] {
			continue
		}
		seen[name] = true
		b.Run(name, func(b *testing.B) {
			b.SetBytes(n)
			p, off, used := make([]byte, n), int64(0), cpuTime()
			for b.Loop() {
				if j.rw == "randread" {
					off = rand.Int64N(benchSize / n)
				} else {
					off = (off + 1) % (benchSize / n)
				}
				if _, err := im.ReadAt(p, off*n); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric((cpuTime()-used).Seconds()/(float64(n)*float64(b.N)/1e9), "CPU-s/GB")
		})
	}
}

func benchFolder() string {
	if benchDir != "" {
		return benchDir
	}
	return "/dev/shm"
}

func rawFile(b *testing.B) string {
	b.Helper()
	f, err := os.CreateTemp(benchFolder(), "reprise-bench-")
	if err != nil {
		b.Skipf("needs %s: %v", benchFolder(), err)
	}
	b.Cleanup(func() { os.Remove(f.Name()) })
	defer f.Close()
	chunk := make([]byte, 1<<20)
	devicetest.Fill(rand.New(rand.NewPCG(1, 2)), chunk)
	for range benchSize / len(chunk) {
		if _, err := f.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
	return f.Name()
}

func losetup(b *testing.B, file, direct string) string {
	b.Helper()
	out, err := exec.Command("losetup", "--find", "--show", "--read-only",
		"--sector-size=4096", "--direct-io="+direct, file).CombinedOutput()
	if err != nil {
		b.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	b.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			b.Errorf("losetup: %v: %s", err, out)
		}
	})
	return dev
}

func attachFile(b *testing.B, file string, flags int) string {
	b.Helper()
	f, err := os.OpenFile(file, os.O_RDONLY|flags, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return attachBench(b, f)
}

// attachBacking fails the benchmark if requests are made.
func attachBacking(b *testing.B, file string) string {
	b.Helper()
	f, err := os.Open(file)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return attachBench(b, backedFile{f})
}

func attachBench(b *testing.B, r io.ReaderAt) string {
	b.Helper()
	d, err := device.Attach(context.Background(), r, benchSize, &device.Options{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := d.Close(); err != nil {
			b.Error(err)
		}
	})
	return d.Path()
}

func fio(b *testing.B, j job, dev string) sample {
	b.Helper()
	server, system := cpuTime(), machineTime(b)
	out, err := exec.Command("fio", "--name="+filepath.Base(dev), "--filename="+dev, "--readonly", "--direct=1",
		"--rw="+j.rw, "--bs="+j.block, "--ioengine="+j.engine, "--iodepth="+strconv.Itoa(j.depth),
		"--time_based", fmt.Sprintf("--runtime=%d", benchSeconds), "--randrepeat=0", "--output-format=json").Output()
	if err != nil {
		b.Fatalf("fio: %v: %s", err, out)
	}
	used := cpuTime() - server
	system = machineTime(b) - system
	var result struct {
		Jobs []struct {
			Read struct {
				IOPS  float64
				Total int `json:"total_ios"`
				CLat  struct {
					Percentile map[string]int64
				} `json:"clat_ns"`
			}
		}
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 || result.Jobs[0].Read.Total == 0 {
		b.Fatalf("fio: %v: %s", err, out)
	}
	r := result.Jobs[0].Read
	gb := float64(r.Total) * j.bytes() / 1e9
	return sample{
		iops: r.IOPS, latency: time.Duration(r.CLat.Percentile["50.000000"]), cpu: used / time.Duration(r.Total),
		perGB: cpuUse{used.Seconds() / gb, system.Seconds() / gb},
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// machineTime is what all processors have been busy for.
func machineTime(b *testing.B) time.Duration {
	b.Helper()
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		b.Fatal(err)
	}
	var user, nice, system, idle, wait, irq, softirq int64
	if _, err := fmt.Sscanf(string(stat), "cpu %d %d %d %d %d %d %d",
		&user, &nice, &system, &idle, &wait, &irq, &softirq); err != nil {
		b.Fatal(err)
	}
	const tick = 10 * time.Millisecond // USER_HZ
	return time.Duration(user+nice+system+irq+softirq) * tick
}

func report(b *testing.B, results map[job][][]sample) {
	var s strings.Builder
	w := tabwriter.NewWriter(&s, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "job\tdevice\tIOPS\tMB/s\tp50\tratio\tserver CPU/request\tserver s/GB\tmachine s/GB\t")
	for _, j := range jobs {
		rounds := results[j]
		for i, c := range contenders {
			iops := medianOf(rounds, func(r []sample) float64 { return r[i].iops })
			p50 := medianOf(rounds, func(r []sample) float64 { return float64(r[i].latency) })
			cpu := medianOf(rounds, func(r []sample) float64 { return float64(r[i].cpu) })
			ratio := medianOf(rounds, func(r []sample) float64 { return r[i].iops / r[0].iops })
			server := medianOf(rounds, func(r []sample) float64 { return r[i].perGB.server })
			machine := medianOf(rounds, func(r []sample) float64 { return r[i].perGB.system })
			fmt.Fprintf(w, "%s\t%s\t%.0f\t%.0f\t%.1f µs\t%.2f\t%.1f µs\t%.3f\t%.3f\t\n",
				j.name, c.name, iops, iops*j.bytes()/1e6, p50/1e3, ratio, cpu/1e3, server, machine)
			if name := reported[c.name]; name != "" {
				b.ReportMetric(ratio, strings.NewReplacer(" ", "", ",", "-").Replace(j.name)+"-"+name+"-ratio")
			}
		}
	}
	w.Flush()
	// b.Log cuts long text off.
	fmt.Printf("%d rounds of %d s, medians; ratios to the first device of each job\n%s", benchRounds, benchSeconds, &s)
}

func (j job) bytes() float64 {
	n, unit := 0.0, ""
	fmt.Sscanf(j.block, "%f%s", &n, &unit)
	return n * map[string]float64{"k": 1 << 10, "m": 1 << 20}[unit]
}

func medianOf(rounds [][]sample, f func([]sample) float64) float64 {
	var v []float64
	for _, r := range rounds {
		v = append(v, f(r))
	}
	slices.Sort(v)
	return v[len(v)/2]
}
