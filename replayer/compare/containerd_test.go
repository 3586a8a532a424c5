package compare

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/replayer/node"
)

// envContainerd is a directory with another containerd than that of PATH, and its shim.
const envContainerd = "REPRISE_CONTAINERD"

// The ways to start an image that the snapshotter is compared with. All but Run
// go through a containerd that has just been started, and has nothing.
const (
	OverlayFS  Mode = "overlayfs" // the original image is pulled and unpacked by containerd
	Containerd Mode = "reprise"   // the converted image is pulled by `reprise pull`, the trace is found by the daemon
	Direct     Mode = "run"       // `reprise run` of the converted image, without containerd
	Local      Mode = "local"     // the original image is there and unpacked: what containerd takes by itself
)

// What the snapshotter has to reach.
const (
	maxOfDirect   = 1.25 // ready times by those of Direct
	minOfOverlays = 3.0  // those of OverlayFS by the snapshotter's
)

// A ctrdResult is a comparison of the ways to start an image.
type ctrdResult struct {
	Containerd string `json:"containerd"` // its version
	*Result
	image, codec string
}

// ctrdTimeout bounds a start: there are large images to unpack.
const ctrdTimeout = 5 * time.Minute

// ownStart is the key in Paired of ready times through the snapshotter by the sum
// of those of Direct and of what containerd takes to start the process of a local
// image.
const ownStart = "reprise/run + containerd"

// containerd compares pull-to-ready times.
func (b *coldBench) containerd() {
	bin := os.Getenv(envContainerd)
	links := b.links
	if os.Getenv(envLinks) == "" {
		links = []string{"10ms,200mbit", "30ms,1gbit"}
	}
	var all []*ctrdResult
	for _, name := range b.images {
		require.NoError(b.t, b.site.original(b.ctx, name))
		require.NoError(b.t, b.site.trace(b.ctx, name))
		all = append(all, b.throughContainerd(name, bin, links)...)
	}
	require.NoError(b.t, writeContainerd(os.Stdout, all))
	for _, r := range all {
		b.say("\n%s, %s", r.image, r.Link)
		for _, v := range r.variants {
			b.say("  median %s: %s", v.Name, strings.Join(r.Typical[v.Name], "; "))
		}
		if r.Paired["reprise/run"].Median > maxOfDirect {
			b.say("  reprise: %s", last(r.Said[Containerd]))
			writeTimeline(os.Stdout, r.typical[Containerd])
		}
	}
}

// throughContainerd compares the starts of one image on the links.
func (b *coldBench) throughContainerd(name, bin string, links []string) (all []*ctrdResult) {
	s, err := newCtrdSite(b.ctx, b.site, name, bin)
	require.NoError(b.t, err)
	defer func() { require.NoError(b.t, s.close()) }()
	for _, spec := range links {
		r, err := s.compare(b.ctx, spec, b.count(5))
		require.NoError(b.t, err, "%s %s", name, spec)
		b.keep("containerd-"+s.version+"-"+name+"-"+spec, r)
		b.say("%s, %s, containerd %s: overlayfs %.2f s, reprise %.2f s, run %.2f s; containerd's own %.2f s", name, spec, s.version,
			r.Modes[OverlayFS].Ready.Median, r.Modes[Containerd].Ready.Median, r.Modes[Direct].Ready.Median, r.Modes[Local].Process.Median)
		all = append(all, r)
	}
	return all
}

// original puts the image as it was before conversion at the registry.
func (s *coldSite) original(ctx context.Context, name string) error {
	im := s.originals[name]
	src, err := convert.At(im.Ref(), s.client)
	if err != nil {
		return err
	}
	dst, err := convert.At(s.near.Addr+"/"+originalRepository(name), s.client)
	if err != nil {
		return err
	}
	return push(ctx, src, dst)
}

func originalRepository(name string) string { return "coldstart/" + name + ":original" }

// push copies an image.
func push(ctx context.Context, src convert.Source, dst convert.Dest) error {
	d, raw, err := src.Manifest(ctx, platforms.DefaultSpec())
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	for _, blob := range append(slices.Clone(m.Layers), m.Config) {
		if err := dst.Push(ctx, blob, func() (io.ReadCloser, error) { return src.Open(ctx, blob) }); err != nil {
			return err
		}
	}
	return dst.PushManifest(ctx, d, raw)
}

// trace records a cold start of the image and attaches it.
func (s *coldSite) trace(ctx context.Context, name string) error {
	file := s.path(name + ".trace")
	if err := s.record(ctx, s.ref(name), "", file, readyFlags); err != nil {
		return err
	}
	return s.attach(ctx, s.ref(name), file)
}

// A ctrdSite is one image with a directory of containerd's that has it.
type ctrdSite struct {
	site         *coldSite
	name         string
	bin, version string
	programs     []string
	local        string // containerd's directory
}

// newCtrdSite makes one. Close it.
func newCtrdSite(ctx context.Context, site *coldSite, name, bin string) (s *ctrdSite, err error) {
	s = &ctrdSite{site: site, name: name, bin: bin}
	if s.programs, err = programs(bin); err != nil {
		return nil, err
	}
	s.programs = append(s.programs, site.program)
	if s.local, err = os.MkdirTemp(site.dir, "containerd-"); err != nil {
		return nil, err
	}
	c, err := startContainerd(ctx, bin, s.local, "")
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	v, err := c.Version(ctx)
	s.version = v.Version
	if err == nil {
		err = c.pull(ctx, s.localRef())
	}
	if err = errors.Join(err, c.close()); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *ctrdSite) close() error { return os.RemoveAll(s.local) }

func (s *ctrdSite) localRef() string { return s.site.near.Addr + "/" + originalRepository(s.name) }

// compare starts the image on one link in all ways.
func (s *ctrdSite) compare(ctx context.Context, spec string, runs int) (*ctrdResult, error) {
	link, srv, err := s.site.behind(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer srv.Close()
	converted, original := srv.Addr+"/"+repository(s.name), srv.Addr+"/"+originalRepository(s.name)
	r, err := Run(ctx, Options{
		Program: s.site.program, Ref: converted, Flags: readyFlags, Runs: runs, Dir: s.site.dir, Link: link, Resident: s.programs, Timeout: ctrdTimeout,
		Variants: []Variant{
			{Name: OverlayFS, Against: Containerd, start: func(ctx context.Context, dir string, atReady func()) (process, error) {
				return s.startOverlayFS(ctx, dir, original, atReady)
			}},
			{Name: Containerd, Trace: "auto", Against: Direct, Check: replayed, start: func(ctx context.Context, dir string, atReady func()) (process, error) {
				return s.startReprise(ctx, dir, converted, atReady)
			}},
			{Name: Local, local: true, start: func(ctx context.Context, _ string, atReady func()) (process, error) {
				return s.startLocal(ctx, atReady)
			}},
			{Name: Direct, Trace: "auto", Check: replayed},
		},
	})
	if err != nil {
		return nil, err
	}
	c := &ctrdResult{Containerd: s.version, Result: r, image: s.name, codec: s.site.codecName()}
	c.pairOwnStart()
	return c, c.check(s.site.originals[s.name].Compressed)
}

// startOverlayFS pulls and unpacks the original image, and starts it.
func (s *ctrdSite) startOverlayFS(ctx context.Context, dir, ref string, atReady func()) (p process, err error) {
	c, err := startContainerd(ctx, s.bin, filepath.Join(dir, "containerd"), "")
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	start := &ctrdStart{ctrd: c, ref: ref, snapshotter: "overlayfs", ready: atReady}
	start.pull = func(ctx context.Context) error { return c.pull(ctx, ref) }
	return start.run(ctx)
}

// startLocal starts the original image where it is already.
func (s *ctrdSite) startLocal(ctx context.Context, atReady func()) (p process, err error) {
	c, err := startContainerd(ctx, s.bin, s.local, "")
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	return (&ctrdStart{ctrd: c, ref: s.localRef(), snapshotter: "overlayfs", ready: atReady}).run(ctx)
}

// startReprise has `reprise pull` pull the converted image, and starts it through
// the snapshotter of a daemon that has nothing.
func (s *ctrdSite) startReprise(ctx context.Context, dir, ref string, atReady func()) (p process, err error) {
	root := filepath.Join(dir, "reprise")
	stop, err := startDaemon(ctx, s.site.program, nil, root, "--config", os.DevNull) // not the machine's
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	c, err := startContainerd(ctx, s.bin, filepath.Join(dir, "containerd"), node.SocketPath(root))
	if err != nil {
		return p, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ctrdPatience)
		defer cancel()
		if err == nil { // or else it may not be there
			err = c.forget(ctx, ref)
		}
		err = errors.Join(err, c.close())
	}()
	start := &ctrdStart{ctrd: c, ref: ref, snapshotter: "reprise", ready: atReady}
	start.pull = func(ctx context.Context) error { return start.pullLazily(ctx, s.site.program) }
	start.seen = func(ctx context.Context, start *ctrdStart) error {
		st, err := deviceOf(ctx, root)
		if err == nil {
			start.note(st)
		}
		return err
	}
	if p, err = start.run(ctx); err == nil {
		slices.SortStableFunc(p.report.Phases, func(a, b node.Phase) int { return cmp.Compare(a.At, b.At) })
		p.said = "trace: " + p.report.Explain
	}
	return p, err
}

// pairOwnStart adds the ratio of ownStart.
func (r *ctrdResult) pairOwnStart() {
	var rs []float64
	for i, ready := range r.Modes[Containerd].Ready.Runs {
		rs = append(rs, ready/(r.Modes[Direct].Ready.Runs[i]+r.Modes[Local].Process.Runs[i]))
	}
	r.Paired[ownStart] = newRatio(rs)
}

// check makes sure that the starts were what they are to be. compressed is the
// size of the original image's layers.
func (r *ctrdResult) check(compressed int64) error {
	if n := r.Modes[Local].Requests.Max; n > 0 {
		return fmt.Errorf("a start of the local image made %.0f requests", n)
	}
	if n := r.Modes[OverlayFS].Bytes.Min; n < float64(compressed) {
		return fmt.Errorf("a pull of the original image fetched %.0f of %d bytes", n, compressed)
	}
	return nil
}

// met says whether a bound was kept.
func met(ok bool) string {
	if ok {
		return "met"
	}
	return "not met"
}

// writeContainerd prints results for people.
func writeContainerd(w io.Writer, all []*ctrdResult) error {
	fmt.Fprintf(w, "\n%d cold starts a way, medians; requests and bytes at ready; containerd %s; %s\n\n", all[0].Runs, all[0].Containerd, all[0].codec)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "image\tlink\tstart\tpulled\tprocess\tready\trequests\tMB\tstall\tcoverage\taccuracy\tCPU\t")
	for _, r := range all {
		for _, v := range r.variants {
			f, pulled, served := r.Modes[v.Name], "", "\t\t\t"
			if at := phase(r.typical[v.Name].Report, "pulled"); at > 0 {
				pulled = fmt.Sprintf("%.2f s", at.Seconds())
			}
			if v.Trace != "none" { // it is reprise's
				served = fmt.Sprintf("%.2f s\t%.1f %%\t%.1f %%\t%.2f s", f.Stall.Median, 100*f.Coverage.Median, 100*f.Accuracy.Median, f.CPU.Median)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%.2f s\t%.2f s\t%.0f\t%.1f\t%s\t\n", r.image, r.Link, v.Name, pulled,
				f.Process.Median, f.Ready.Median, f.Requests.Median, f.Bytes.Median/1e6, served)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "image\tlink\treprise by run\t95 %%\tat most %.2f\tby run + containerd's own\t95 %%\toverlayfs by reprise\t95 %%\tat least %.0f\t\n", maxOfDirect, minOfOverlays)
	for _, r := range all {
		direct, sum, overlays := r.Paired["reprise/run"], r.Paired[ownStart], r.Paired["overlayfs/reprise"]
		fmt.Fprintf(t, "%s\t%s\t%.3f\t%.2f–%.2f\t%s\t%.3f\t%.2f–%.2f\t%.2f\t%.2f–%.2f\t%s\t\n", r.image, r.Link,
			direct.Median, direct.Low, direct.High, met(direct.Median <= maxOfDirect), sum.Median, sum.Low, sum.High,
			overlays.Median, overlays.Low, overlays.High, met(overlays.Median >= minOfOverlays))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprint(w, ctrdLegend)
	return err
}

const ctrdLegend = `
overlayfs   containerd pulls and unpacks the original image
reprise     the converted image: reprise pull, a container on the daemon's snapshotter, automatic replay
local       the original image is there already; the time to its process is containerd's own
run         reprise run of the converted image, without containerd, automatic replay
Programs are in the page cache when a start begins, and nothing of images.
`
