package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/tracefmt"
)

// RecordOptions say what [Node.Record] starts and when it stops recording.
type RecordOptions struct {
	Run   RunOptions
	Rules recorder.Options // Stalled is set by Record
	// Out receives the live trace; its last second may be missing after a kill.
	Out io.Writer
	// Keep lets the container run on when the recording has ended.
	Keep bool
	// Annotate finds out which files the reads belong to, and by eBPF which
	// processes read, for [Recording.Annotate].
	Annotate bool
}

// Recording is what one recording did.
type Recording struct {
	Report *Report        `json:"run"`
	Reason string         `json:"reason"` // why it stopped
	Stats  recorder.Stats `json:"stats"`
	// Readers says of how much of the trace the process is known, and Missing, a
	// line each, what could not be found out, and why.
	Readers recorder.AttributeStats `json:"readers"`
	Missing []string                `json:"missing,omitempty"`

	files *recorder.Files  // nil if they are not known
	reads []tracefmt.Event // of the device, as eBPF saw them
	m     recorder.DeviceMap
}

// annotateTime bounds the search for the files of a recording, which reads the
// image's metadata.
const annotateTime = time.Minute

// Record starts a container on the image as Run does, without a replay unless
// the options name a trace, and writes the demand reads of its start to o.Out.
// When a stop rule ends the recording the container is stopped. A container
// that fails before it is ready is a *container.ExitedError; the trace of that
// is complete all the same. The end of ctx is a stop rule, not an error.
//
// What cannot be found out for annotations is no error: Missing says it.
func (n *Node) Record(ctx context.Context, ref string, o *RecordOptions) (*Recording, error) {
	r := &recording{n: n, o: o, end: make(chan struct{})}
	run := o.Run
	run.hooks = hooks{ready: r.ready, over: r.over}
	if o.Annotate {
		r.watch = startWatching()
		run.hooks.attached, run.hooks.started = r.attached, r.watch.started
	}
	if !o.Keep {
		run.hooks.end = r.end
	}
	report, err := n.run(ctx, ref, &run, r.open)
	out := &Recording{Report: report}
	if r.rec == nil {
		r.watch.end(out, time.Time{})
		return out, err
	}
	r.watch.end(out, r.im.Opened())
	r.over() // also where the container was never started
	reason, recErr := r.rec.Wait(ctx)
	out.Reason, out.Stats, out.m = reason, r.rec.Stats(), r.im.deviceMap()
	if o.Annotate && out.Stats.Events > 0 {
		if ctx.Err() != nil { // which was one way to end the recording
			ctx = context.WithoutCancel(ctx)
		}
		r.findFiles(ctx, ref, out)
	}
	return out, errors.Join(err, recErr, r.failed)
}

type recording struct {
	n     *Node
	o     *RecordOptions
	im    *Image
	rec   *recorder.Recorder
	watch *watching
	end   chan struct{}
	// failed is a container that ended while it was recorded, and not ready.
	failed error
}

func (r *recording) open(im *Image) error {
	rules := r.o.Rules
	rules.Stalled = func() time.Duration { return im.Stats().Stall }
	rec, err := recorder.New(r.o.Out, im.traceHeader(r.n.o.Tool, r.imageOptions()), &rules)
	if err != nil {
		return err
	}
	r.rec, r.im = rec, im
	im.recorded = true
	im.SetObserver(rec)
	go func() {
		<-rec.Done()
		close(r.end)
	}()
	return nil
}

func (r *recording) imageOptions() ImageOptions {
	o := r.o.Run.Request.imageOptions()
	o.Args, o.Entrypoint = r.o.Run.Args, r.o.Run.Config.Entrypoint
	return o
}

func (r *recording) attached(dev *Status) { r.watch.attached(dev.Device) }

func (r *recording) ready(at time.Time, how string, err error) {
	var exited *container.ExitedError
	switch {
	case err == nil:
		r.rec.ReadyAt(at, how)
	case errors.Is(err, context.Canceled):
		r.rec.Stop("interrupted")
	default:
		if errors.As(err, &exited) && !r.ended() {
			r.failed = exited
		}
		r.rec.Stop(err.Error())
	}
}

// ended tells whether a stop rule has ended the recording.
func (r *recording) ended() bool {
	select {
	case <-r.rec.Done():
		return true
	default:
		return false
	}
}

// over ends a recording whose container has ended.
func (r *recording) over() {
	r.rec.Over("the container ended")
	<-r.rec.Done()
	r.im.SetObserver(nil)
}

// findFiles opens the image again, at the version that was recorded: the device
// of the recording is gone, and what it has read is on the node.
func (r *recording) findFiles(ctx context.Context, ref string, out *Recording) {
	ctx, cancel := context.WithTimeout(ctx, annotateTime)
	defer cancel()
	q := r.o.Run.Request
	q.Ref = ref
	files, err := r.n.filesAgain(ctx, &q, r.im.pinned())
	if err != nil {
		out.Missing = append(out.Missing, "files are not named: "+err.Error())
		return
	}
	out.files = files
	if n, err := files.Skipped(); n > 0 {
		out.Missing = append(out.Missing, fmt.Sprintf("%d files are not named: %v", n, err))
	}
}

// filesAgain maps the files of an image that was open before.
func (n *Node) filesAgain(ctx context.Context, r *Request, p *imageState) (_ *recorder.Files, err error) {
	w, err := n.with(r, n.o.Log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.client.Close()) }()
	im, err := w.reopen(ctx, r, p, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	return im.files(ctx)
}

// Annotate names files and processes in the trace of the recording, as far as
// they are known.
func (r *Recording) Annotate(t *tracefmt.Trace) {
	if r.reads != nil {
		r.Readers = recorder.Attribute(t, r.reads, r.m)
	}
	if r.files != nil {
		r.files.Annotate(t)
	}
}

// RecordFile is Record into a file, which is replaced by the annotated trace in
// the end: at every moment a trace of what was recorded is there under its name.
func (n *Node) RecordFile(ctx context.Context, ref string, f *TraceFile, o *RecordOptions) (*Recording, error) {
	opts := *o
	opts.Out, opts.Annotate = f, true
	rec, err := n.Record(ctx, ref, &opts)
	if rec.Reason == "" {
		return rec, err
	}
	if bad := rec.annotateFile(f.Name()); bad != nil {
		rec.Missing = append(rec.Missing, "the trace is left as it was recorded: "+bad.Error())
	}
	return rec, err
}

func (r *Recording) annotateFile(path string) error {
	if r.files == nil && r.reads == nil {
		return nil
	}
	t, err := tracefmt.Open(path)
	if err != nil || t.End == nil {
		return err
	}
	r.Annotate(t)
	return ReplaceTrace(path, t)
}

// ReplaceTrace writes a trace in the place of the file at path, if there is one:
// whatever happens, either is there, whole.
func ReplaceTrace(path string, t *tracefmt.Trace) (err error) {
	perm := os.FileMode(0o666) // less the umask
	switch old, err := os.Stat(path); {
	case err == nil:
		perm = old.Mode().Perm()
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	beside := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	f, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(beside)
		}
	}()
	err = errors.Join(writeTrace(f, t), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(beside, path)
	}
	return err
}

func writeTrace(w io.Writer, t *tracefmt.Trace) error {
	out, err := tracefmt.NewWriter(w, t.Header)
	if err != nil {
		return err
	}
	for i := range t.Events {
		if err := out.Add(t.Events[i]); err != nil {
			return err
		}
	}
	if t.End == nil {
		return out.Flush()
	}
	return out.Finish(*t.End)
}

// traceHeader describes the image to a trace.
func (im *Image) traceHeader(tool string, o ImageOptions) tracefmt.Header {
	h := tracefmt.Header{
		Image: im.Ref, Manifest: im.Manifest, Platform: im.platform(),
		Workload: im.workload(o), Args: im.effective(o),
		Tool: tool, Start: im.Opened(), ReadAhead: recordReadAheadKB << 10, Space: tracefmt.LayerSpace,
		Layers: im.traceLayers(),
	}
	return h
}

func (im *Image) platform() string {
	if im.Config.OS == "" {
		return runtime.GOOS + "/" + runtime.GOARCH
	}
	p := im.Config.OS + "/" + im.Config.Architecture
	if im.Config.Variant != "" {
		p += "/" + im.Config.Variant
	}
	return p
}
