package compare

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/zfile"
)

// What `make coldstart` sets; see the Makefile.
const (
	envColdStart = "REPRISE_COLDSTART"         // matrix, adversarial, fleet, gaps, recording, stability, overhead, kills, containerd: several with spaces between
	envDir       = "REPRISE_COLDSTART_DIR"     // where images and traces stay
	envImages    = "REPRISE_COLDSTART_IMAGES"  // java python node
	envLinks     = "REPRISE_COLDSTART_LINKS"   // 10ms,200mbit 30ms,1gbit …
	envRuns      = "REPRISE_COLDSTART_RUNS"    // of each cell
	envCodec     = "REPRISE_COLDSTART_CODEC"   // "zstd 16": algorithm and KiB of a block
	envStarts    = "REPRISE_COLDSTART_STARTS"  // of adversarial, several with commas between; by default all
	envProgram   = "REPRISE_COLDSTART_PROGRAM" // built from this tree by default
)

// TestColdStart measures cold starts of real images. It takes a quarter of an
// hour, and more the first time; CI runs TestAdversaries of cmd/reprise instead,
// with a small image and without a look at the clock.
func TestColdStart(t *testing.T) {
	what := strings.Fields(os.Getenv(envColdStart))
	if len(what) == 0 {
		t.Skipf("%s is not set: see make coldstart", envColdStart)
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it mounts images and drops the page cache")
	}
	b := newColdBench(t)
	experiments := map[string]func(){
		"matrix": b.matrix, "adversarial": b.adversarial, "fleet": b.fleet, "gaps": b.gaps,
		"recording": b.recording, "stability": b.stability, "overhead": b.overhead, "kills": b.kills,
		"containerd": b.containerd,
	}
	for _, w := range what {
		require.Contains(t, experiments, w, envColdStart)
	}
	if slices.ContainsFunc(what, replays) {
		b.traces()
	}
	for _, w := range what {
		begin := time.Now()
		experiments[w]()
		b.say("%s took %v", w, time.Since(begin).Round(time.Second))
	}
}

// replays tells whether an experiment needs all recordings of the images.
func replays(what string) bool {
	return !slices.Contains([]string{"recording", "stability", "overhead", "kills", "containerd"}, what)
}

// A coldBench is a site with the images that are asked for.
type coldBench struct {
	t      *testing.T
	ctx    context.Context // ends with an interrupt, so that nothing stays behind
	site   *coldSite
	images []string
	links  []string
	runs   int // 0: what each experiment has by default
}

func words(env, def string) []string {
	if s := os.Getenv(env); s != "" {
		def = s
	}
	return strings.Fields(def)
}

func codec(t *testing.T) (o convert.Options) {
	var algo string
	if s := os.Getenv(envCodec); s != "" {
		_, err := fmt.Sscan(s, &algo, &o.BlockSize)
		require.NoError(t, err, "%s=%q", envCodec, s)
		o.Algo, err = zfile.ParseAlgo(algo)
		require.NoError(t, err)
		o.BlockSize <<= 10
	}
	return o
}

func newColdBench(t *testing.T) *coldBench {
	ctx, stop := signal.NotifyContext(t.Context(), unix.SIGINT, unix.SIGTERM)
	t.Cleanup(stop)
	b := &coldBench{t: t, ctx: ctx, images: words(envImages, "java python node"), links: words(envLinks, "10ms,200mbit 30ms,1gbit 2ms,2gbit")}
	b.runs, _ = strconv.Atoi(os.Getenv(envRuns))
	dir := os.Getenv(envDir)
	if dir == "" {
		cache, err := os.UserCacheDir()
		require.NoError(t, err)
		dir = filepath.Join(cache, "reprise-coldstart")
	}
	var err error
	dir, err = filepath.Abs(dir)
	require.NoError(t, err)
	b.site, err = openColdSite(ctx, dir, codec(t), program(t), b.say)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.site.Close()) })
	for _, name := range b.images {
		r := recipeNamed(name)
		require.NotNil(t, r, "image %q: python, java, node", name)
		require.NoError(t, b.site.image(ctx, *r))
	}
	return b
}

// traces records the images.
func (b *coldBench) traces() {
	for _, name := range b.images {
		require.NoError(b.t, b.site.traces(b.ctx, name))
	}
}

// say prints at once, unlike a test's log.
func (b *coldBench) say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// program is the reprise to measure.
func program(t *testing.T) string {
	if p := os.Getenv(envProgram); p != "" {
		return p
	}
	p := filepath.Join(t.TempDir(), "reprise")
	cmd := exec.Command("go", "build", "-o", p, "github.com/reprise-project/reprise/cmd/reprise")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return p
}

func (b *coldBench) count(def int) int {
	if b.runs > 0 {
		return b.runs
	}
	return def
}

// compare runs one experiment on one image and link.
func (b *coldBench) compare(name, spec string, variants []Variant, runs int) *Result {
	link, srv, err := b.site.behind(b.ctx, spec)
	require.NoError(b.t, err)
	defer srv.Close()
	r, err := Run(b.ctx, Options{
		Program: b.site.program, Ref: srv.Addr + "/" + repository(name), Flags: readyFlags, Variants: variants, Runs: runs,
		Dir: b.site.dir, WarmRoot: b.site.path(name + ".warm"), Link: link,
	})
	require.NoError(b.t, err, "%s %s", name, spec)
	return r
}

// keep writes what was found for machines.
func (b *coldBench) keep(name string, v any) {
	p, err := json.MarshalIndent(v, "", "  ")
	require.NoError(b.t, err)
	dir := b.site.path("results")
	require.NoError(b.t, os.MkdirAll(dir, 0o755))
	require.NoError(b.t, os.WriteFile(filepath.Join(dir, strings.NewReplacer(",", "-", " ", "-").Replace(name)+".json"), append(p, '\n'), 0o644))
}

// A cell is one image on one link.
type cell struct {
	image, link, codec string
	*Result
	bound time.Duration // 0 if it is not known
}

// matrix compares lazy, replay and warm starts of all images on all links.
func (b *coldBench) matrix() {
	var cells []cell
	for _, name := range b.images {
		for _, spec := range b.links {
			c := cell{image: name, link: spec, codec: b.site.codecName(), Result: b.compare(name, spec, Standard(), b.count(5))}
			link, err := regtest.ParseLink(spec)
			require.NoError(b.t, err)
			if c.bound, err = b.site.bound(name, link); err != nil {
				b.say("no lower bound of %s: %v", name, err)
			}
			b.keep("matrix-"+name+"-"+spec, c.Result)
			b.say("%s, %s: lazy %.2f s, replay %.2f s, warm %.2f s", name, spec,
				c.Modes[Lazy].Ready.Median, c.Modes[Replay].Ready.Median, c.Modes[Warm].Ready.Median)
			cells = append(cells, c)
		}
	}
	require.NoError(b.t, writeMatrix(os.Stdout, cells))
	for _, c := range cells {
		if c.bound > 0 && c.ofBound() > maxOfBound {
			c.writeTime(os.Stdout)
		} else {
			b.say("\n%s, %s: median replay: %s", c.image, c.link, strings.Join(c.Typical[Replay], "; "))
		}
	}
}

// maxOfBound is what a replay may take, in lower bounds, without being looked into.
const maxOfBound = 1.25

// ofBound is the median ready time of replays by the lower bound.
func (c *cell) ofBound() float64 { return c.Modes[Replay].Ready.Median / c.bound.Seconds() }

func writeMatrix(w io.Writer, cells []cell) error {
	fmt.Fprintf(w, "\n%d cold starts a mode, medians; requests and bytes at ready; %s\n\n", cells[0].Runs, cells[0].codec)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "image\tlink\tstart\tready\tby lazy\t95 %\tbound\tby bound\tstall\trequests\tMB\talone\tcoverage\taccuracy\tCPU\t")
	for _, c := range cells {
		for _, v := range c.variants {
			f := c.Modes[v.Name]
			ratio, ci, bound, by, coverage, accuracy := "", "", "", "", "", ""
			if p := c.Paired[pair(v)]; p != nil {
				ratio, ci = fmt.Sprintf("%.3f", p.Median), fmt.Sprintf("%.2f–%.2f", p.Low, p.High)
			}
			if v.Name == Replay {
				coverage, accuracy = fmt.Sprintf("%.1f %%", 100*f.Coverage.Median), fmt.Sprintf("%.1f %%", 100*f.Accuracy.Median)
				if c.bound > 0 {
					bound, by = fmt.Sprintf("%.2f s", c.bound.Seconds()), fmt.Sprintf("%.2f", c.ofBound())
				}
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%.2f s\t%s\t%s\t%s\t%s\t%.2f s\t%.0f\t%.1f\t%.2f s\t%s\t%s\t%.2f s\t\n", c.image, c.link, v.Name,
				f.Ready.Median, ratio, ci, bound, by, f.Stall.Median, f.Requests.Median, f.Bytes.Median/1e6, f.Serial.Median,
				coverage, accuracy, f.CPU.Median)
		}
	}
	return t.Flush()
}

// writeTime says where the time of the median replay goes.
func (c *cell) writeTime(w io.Writer) {
	s := c.typical[Replay]
	fmt.Fprintf(w, "\n%s, %s: a replay of %.2f s, %.2f times the bound of %.2f s; a warm start takes %.2f s\n", c.image, c.link,
		s.Ready.Seconds(), s.Ready.Seconds()/c.bound.Seconds(), c.bound.Seconds(), c.Modes[Warm].Ready.Median)
	fmt.Fprintf(w, "replay: %s\nwarm:   %s\n", strings.Join(c.Typical[Replay], "; "), strings.Join(c.Typical[Warm], "; "))
	fmt.Fprintf(w, "demand waited %v of it, in %d requests of its own; reprise took %v of CPU time\n",
		s.Stall.Round(time.Millisecond), s.Report.Start.Stats.DemandRequests, s.CPU.Round(time.Millisecond))
	writeTimeline(w, s)
}

// gapCosts are what `reprise run --gap` is given: none, so many bytes, and what
// the link makes gaps worth.
var gapCosts = []string{"-1", "4096", "16384", "65536", "262144", "1048576", "0"}

// gaps replays with several costs of a gap.
func (b *coldBench) gaps() {
	var variants []Variant
	for _, g := range gapCosts {
		variants = append(variants, Variant{Name: Mode("gap " + g), Trace: "auto", Flags: []string{"--gap=" + g}, Against: "gap 0", Check: replayed})
	}
	for _, name := range b.images {
		for _, spec := range b.links {
			r := b.compare(name, spec, variants, b.count(5))
			b.keep("gaps-"+name+"-"+spec, r)
			require.NoError(b.t, writeGaps(os.Stdout, name, r))
		}
	}
}

func writeGaps(w io.Writer, name string, r *Result) error {
	fmt.Fprintf(w, "\n%s, link %s, %d replays a gap cost, medians; at ready; gap 0 is what the link makes it\n\n", name, r.Link, r.Runs)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "start\tready\tprefetch requests\tall requests\tMB\taccuracy\tcoverage\tstall\t")
	for _, v := range r.variants {
		f, s := r.Modes[v.Name], r.typical[v.Name].Report.Start.Stats
		fmt.Fprintf(t, "%s\t%.2f s\t%d\t%.0f\t%.1f\t%.1f %%\t%.1f %%\t%.2f s\t\n", v.Name, f.Ready.Median, s.BackgroundRequests,
			f.Requests.Median, f.Bytes.Median/1e6, 100*f.Accuracy.Median, 100*f.Coverage.Median, f.Stall.Median)
	}
	return t.Flush()
}

// otherThan is an image that is here and another one.
func (b *coldBench) otherThan(name string) string {
	for _, r := range recipes {
		if _, err := os.Stat(b.site.path(r.name + ".trace")); err == nil && r.name != name {
			return r.name
		}
	}
	b.t.Fatalf("a trace of another image than %s is needed: run it with two images first", name)
	return ""
}

// adversarialRoom is less than a start of any of the images needs, and not so
// little that most reads find nothing in the cache.
const adversarialRoom = 20 << 20

// adversarial replays what does not fit, where it does not fit; on the first
// image alone unless images are named.
func (b *coldBench) adversarial() {
	images := b.images
	if os.Getenv(envImages) == "" {
		images = images[:1]
	}
	for _, name := range images {
		other := b.otherThan(name)
		starts := Adversaries(Traces{
			Workload: b.site.path(name + ".other.trace"), Image: b.site.path(other + ".trace"), Truncated: b.site.path(name + ".truncated.trace"),
		}, adversarialRoom)
		r := b.compare(name, b.links[0], chosen(starts, os.Getenv(envStarts)), b.count(10))
		b.keep("adversarial-"+name+"-"+b.links[0], r)
		require.NoError(b.t, writeAdversarial(os.Stdout, name, r))
	}
}

// chosen are the variants that names has, and what these are compared with.
func chosen(vs []Variant, names string) []Variant {
	if names == "" {
		return vs
	}
	wanted := map[Mode]bool{Lazy: true}
	for name := range strings.SplitSeq(names, ",") {
		wanted[Mode(name)] = true
	}
	for _, v := range vs {
		if wanted[v.Name] && v.Against != "" {
			wanted[v.Against] = true
		}
	}
	return slices.DeleteFunc(vs, func(v Variant) bool { return !wanted[v.Name] })
}

// maxSaid bounds what a line of a table has of a reason, in bytes.
const maxSaid = 100

func writeAdversarial(w io.Writer, name string, r *Result) error {
	fmt.Fprintf(w, "\n%s, link %s, %d pairs\n\n", name, r.Link, r.Runs)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "start\tready\tby its lazy start\t95 %\trequests\tMB\tstall\tcoverage\t ")
	for _, v := range r.variants {
		f := r.Modes[v.Name]
		ratio, ci := "", ""
		if p := r.Paired[pair(v)]; p != nil && v.Trace != "none" {
			ratio, ci = fmt.Sprintf("%.3f", p.Median), fmt.Sprintf("%.2f–%.2f", p.Low, p.High)
		}
		said := ""
		if v.Trace != "none" {
			said = strings.TrimPrefix(last(r.Said[v.Name]), "replay: ")
			if len(said) > maxSaid {
				said = said[:maxSaid] + "…"
			}
		}
		fmt.Fprintf(t, "%s\t%.2f s\t%s\t%s\t%.0f\t%.1f\t%.2f s\t%.1f %%\t %s\n", v.Name, f.Ready.Median, ratio, ci, f.Requests.Median,
			f.Bytes.Median/1e6, f.Stall.Median, 100*f.Coverage.Median, said)
	}
	return t.Flush()
}

func last(lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	return lines[len(lines)-1]
}

// fleetSize is how many containers start at once.
const fleetSize = 8

// fleet starts containers of all images at once.
func (b *coldBench) fleet() {
	spec := b.links[0]
	link, srv, err := b.site.behind(b.ctx, spec)
	require.NoError(b.t, err)
	defer srv.Close()
	o := FleetOptions{
		Program: b.site.program, Flags: readyFlags, Rounds: b.count(5), Dir: b.site.dir, Link: link,
	}
	for i := range fleetSize {
		o.Refs = append(o.Refs, srv.Addr+"/"+repository(b.images[i%len(b.images)]))
	}
	r, err := Fleet(b.ctx, o)
	require.NoError(b.t, err)
	b.keep("fleet-"+spec, r)
	require.NoError(b.t, r.WriteTable(os.Stdout))
}
