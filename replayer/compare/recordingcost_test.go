package compare

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A way is one of starting a container: recorded or not.
type way struct {
	name Mode
	verb func(dir string) []string // of reprise, and flags; dir is the start's own
	// noBTF hides what the kernel tells of its types, without which there is no
	// eBPF.
	noBTF bool
}

// ways are what overhead compares, the plain start first.
func ways() []way {
	record := func(dir string) []string { return []string{"record", "-o", filepath.Join(dir, "trace")} }
	return []way{
		{name: "run", verb: func(string) []string { return []string{"run", "--trace", "none"} }},
		{name: "record, no eBPF", verb: record, noBTF: true},
		{name: "record", verb: record},
	}
}

// withoutBTF is a command in a mount namespace where types are hidden.
func withoutBTF(program string, argv []string) (string, []string) {
	const hide = `mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"`
	return "unshare", append([]string{"--mount", "--propagation", "private", "sh", "-c", hide, program}, argv...)
}

// sawProcesses tells whether a recording knew who reads: it says so if not.
func (w *watched) sawProcesses() bool { return !strings.Contains(w.output, "processes are not named") }

// An overheadStart is one start until its container said that it was ready.
type overheadStart struct {
	ready time.Duration // since the command
	in    time.Duration // of that, since the container's first process was made
	cpu   time.Duration // of reprise's processes until then
	share float64       // of a processor, that the recorder says it took, in percent
}

// recorderShare is how record says what it has cost.
var recorderShare = regexp.MustCompile(`recording took at most ([0-9.]+) % of a processor`)

// Overhead is what recording costs on one image, for machines.
type Overhead struct {
	Image string           `json:"image"`
	Link  string           `json:"link"` // or warm
	Ready map[Mode]*Series `json:"ready_seconds"`
	CPU   map[Mode]*Series `json:"cpu_seconds"`
	Ratio map[Mode]*Ratio  `json:"ready_ratio"` // to run, pair by pair
	// In the container alone: without the command's own start and eBPF's, and
	// without opening the image.
	In      map[Mode]*Series `json:"container_seconds"`
	InRatio map[Mode]*Ratio  `json:"container_ratio"`
	More    map[Mode]*Series `json:"more_cpu_seconds"`
	Share   map[Mode]*Series `json:"recorder_percent"` // of a processor, as record itself counts
	order   []Mode
}

// overhead compares starts that are recorded with starts that are not: cold on
// the first link, and with all bytes on the node, where nothing hides the cost.
func (b *coldBench) overhead() {
	images := b.images
	if os.Getenv(envImages) == "" {
		images = []string{"java"}
	}
	for _, name := range images {
		for _, link := range []string{b.links[0], "warm"} {
			o := b.overheadOf(name, link, b.count(10))
			b.keep("overhead-"+name+"-"+link, o)
			require.NoError(b.t, o.write(os.Stdout))
		}
	}
}

func (b *coldBench) overheadOf(name, link string, pairs int) *Overhead {
	ref := b.site.ref(name)
	warm := ""
	if link == "warm" {
		warm = b.site.path(name + ".warm")
		require.NoError(b.t, FillRoot(b.ctx, warm, ref))
	} else {
		_, srv, err := b.site.behind(b.ctx, link)
		require.NoError(b.t, err)
		defer srv.Close()
		ref = srv.Addr + "/" + repository(name)
	}
	starts := map[Mode][]overheadStart{}
	ways := ways()
	for i := range pairs {
		for j := range ways {
			w := ways[(i+j)%len(ways)]
			starts[w.name] = append(starts[w.name], b.timed(w, warm, ref))
		}
	}
	return newOverhead(name, link, ways, starts)
}

// timed starts an image in one way, on a node that has nothing or in a warm
// state directory, until it says that it is ready.
func (b *coldBench) timed(w way, warm, ref string) (s overheadStart) {
	dir, err := os.MkdirTemp(b.site.dir, "overhead-")
	require.NoError(b.t, err)
	defer os.RemoveAll(dir)
	root := warm
	if root == "" {
		root = filepath.Join(dir, "root")
	}
	require.NoError(b.t, dropCaches(b.site.dir))
	program, argv := b.site.program, slices.Concat(w.verb(dir), []string{"--root", root}, readyFlags, []string{ref})
	if w.noBTF {
		program, argv = withoutBTF(program, argv)
	}
	got, err := watch(b.ctx, program, argv, func(cmd *exec.Cmd) {
		s.cpu, s.in = endContainer(b.site.program, cmd.Process.Pid)
	})
	if got == nil || got.said.IsZero() { // the container was killed: it may fail
		require.NoError(b.t, err)
		require.FailNow(b.t, "the container never said that it was ready", "%s", w.name)
	}
	require.NotEqual(b.t, w.noBTF, got.sawProcesses(), got.output)
	if m := recorderShare.FindStringSubmatch(got.output); m != nil {
		s.share, err = strconv.ParseFloat(m[1], 64)
		require.NoError(b.t, err)
	}
	s.ready = got.said.Sub(got.began)
	return s
}

// endContainer kills what a command has started, other than more of itself, and
// returns the CPU time that the command and more of itself have used, and the
// age of the container.
func endContainer(program string, pid int) (used, age time.Duration) {
	var others []int
	for _, p := range family(pid) {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p))
		if err == nil && exe == program {
			used += cpuOf(p)
			continue
		}
		others = append(others, p)
		if err == nil && !strings.Contains(exe, "runc") {
			age = max(age, ageOf(p))
		}
	}
	for _, p := range others {
		_ = unix.Kill(p, unix.SIGKILL)
	}
	return used, age
}

// ageOf is how long ago a process was made, to 10 ms: proc_pid_stat(5).
func ageOf(pid int) time.Duration {
	const ticks, startTime = 100, 22 - 3 // a second; the field, of those after the name
	p, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(p), ") ")
	fields := strings.Fields(after)
	var now unix.Timespec
	if len(fields) <= startTime || unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return 0
	}
	n, err := strconv.ParseInt(fields[startTime], 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(now.Nano()) - time.Duration(n)*(time.Second/ticks)
}

// family is a process and what it and those have started and that is there.
func family(pid int) []int {
	all := []int{pid}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		p, _ := os.ReadFile(list)
		for _, f := range strings.Fields(string(p)) {
			if n, err := strconv.Atoi(f); err == nil {
				all = append(all, family(n)...)
			}
		}
	}
	return all
}

// cpuOf is the CPU time of a process, by its clock (clock_getcpuclockid(3)).
func cpuOf(pid int) time.Duration {
	const sched = 2 // CPUCLOCK_SCHED, of the whole process
	var ts unix.Timespec
	if unix.ClockGettime(int32(^pid<<3|sched), &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func newOverhead(image, link string, ways []way, starts map[Mode][]overheadStart) *Overhead {
	o := &Overhead{
		Image: image, Link: link, Ready: map[Mode]*Series{}, In: map[Mode]*Series{}, CPU: map[Mode]*Series{}, More: map[Mode]*Series{},
		Share: map[Mode]*Series{}, Ratio: map[Mode]*Ratio{}, InRatio: map[Mode]*Ratio{},
	}
	base := ways[0].name
	for _, w := range ways {
		o.order = append(o.order, w.name)
		var ready, in, cpu, more, share []float64
		for i, s := range starts[w.name] {
			ready, in, cpu = append(ready, s.ready.Seconds()), append(in, s.in.Seconds()), append(cpu, s.cpu.Seconds())
			more, share = append(more, (s.cpu-starts[base][i].cpu).Seconds()), append(share, s.share)
		}
		o.Ready[w.name], o.CPU[w.name], o.More[w.name], o.Share[w.name] = newSeries(ready), newSeries(cpu), newSeries(more), newSeries(share)
		o.In[w.name] = newSeries(in)
		o.Ratio[w.name], o.InRatio[w.name] = newRatio(divide(ready, o.Ready[base].Runs)), newRatio(divide(in, o.In[base].Runs))
	}
	return o
}

func (o *Overhead) write(w io.Writer) error {
	base := o.order[0]
	fmt.Fprintf(w, "\n%s, %s, %d starts each, interleaved, medians; CPU time of reprise until ready\n\n", o.Image, o.Link, len(o.Ready[base].Runs))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "start\tready\tby run\t95 %\tin the container\tby run\t95 %\tCPU\tof the start\tmore than run\trecorder alone\t")
	for _, m := range o.order {
		ready, r, in := o.Ready[m].Median, o.Ratio[m], o.InRatio[m]
		fmt.Fprintf(t, "%s\t%.3f s\t%.3f\t%.3f–%.3f\t%.3f s\t%.3f\t%.3f–%.3f\t%.3f s\t%.1f %%\t%+.3f s\t%.2f %%\t\n", m, ready, r.Median, r.Low, r.High,
			o.In[m].Median, in.Median, in.Low, in.High, o.CPU[m].Median, 100*o.CPU[m].Median/ready, o.More[m].Median, o.Share[m].Median)
	}
	return t.Flush()
}
