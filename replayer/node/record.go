package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/tracefmt"
)

// RecordOptions say what [Node.Record] starts and when it stops recording.
type RecordOptions struct {
	Run   RunOptions
	Rules recorder.Options
	// Out receives the live trace; its last second may be missing after a kill.
	Out io.Writer
	// Keep lets the container run on when the recording has ended.
	Keep bool
}

// Recording is what one recording did.
type Recording struct {
	Report *Report        `json:"run"`
	Reason string         `json:"reason"` // why it stopped
	Stats  recorder.Stats `json:"stats"`
}

// Record starts a container on the image as Run does, without a replay unless
// the options name a trace, and writes the demand reads of its start to o.Out.
// When a stop rule ends the recording the container is stopped. A container
// that fails before it is ready is a *container.ExitedError; the trace of that
// is complete all the same. The end of ctx is a stop rule, not an error.
func (n *Node) Record(ctx context.Context, ref string, o *RecordOptions) (*Recording, error) {
	r := &recording{n: n, o: o, end: make(chan struct{})}
	run := o.Run
	run.hooks = hooks{ready: r.ready, over: r.over}
	if !o.Keep {
		run.hooks.end = r.end
	}
	report, err := n.run(ctx, ref, &run, r.open)
	out := &Recording{Report: report}
	if r.rec == nil {
		return out, err
	}
	r.over() // also where the container was never started
	reason, recErr := r.rec.Wait(ctx)
	out.Reason, out.Stats = reason, r.rec.Stats()
	return out, errors.Join(err, recErr, r.failed)
}

type recording struct {
	n   *Node
	o   *RecordOptions
	im  *Image
	rec *recorder.Recorder
	end chan struct{}
	// failed is a container that ended while it was recorded, and not ready.
	failed error
}

func (r *recording) open(im *Image) error {
	rec, err := recorder.New(r.o.Out, im.traceHeader(r.n.o.Tool, r.o.Run.Request.imageOptions(), r.o.Run.Args), &r.o.Rules)
	if err != nil {
		return err
	}
	r.rec, r.im = rec, im
	im.SetObserver(rec)
	go func() {
		<-rec.Done()
		close(r.end)
	}()
	return nil
}

func (r *recording) ready(err error) {
	var exited *container.ExitedError
	switch {
	case err == nil:
		r.rec.Ready(r.readyRule())
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

// readyRule says in words what the container was waited for.
func (r *recording) readyRule() string {
	switch ready := r.o.Run.Config.Ready; {
	case ready.Port != 0:
		return fmt.Sprintf("port %d", ready.Port)
	case ready.Log != nil:
		return fmt.Sprintf("log %q", ready.Log)
	case ready.HTTP != "":
		return "http " + ready.HTTP
	case len(ready.Exec) > 0:
		return fmt.Sprintf("exec %q", ready.Exec)
	case ready.Exit:
		return "exit 0"
	}
	return "listens or exited"
}

// over ends a recording whose container has ended.
func (r *recording) over() {
	r.rec.Stop("the container ended")
	<-r.rec.Done()
	r.im.SetObserver(nil)
}

// traceHeader describes the image to a trace.
func (im *Image) traceHeader(tool string, o ImageOptions, args []string) tracefmt.Header {
	o.Args = args
	h := tracefmt.Header{
		Image: im.Ref, Manifest: im.Manifest, Platform: im.platform(),
		Workload: im.workload(o), Args: im.Command(args),
		Tool: tool, Start: im.Opened(), ReadAhead: readAheadKB << 10, Space: tracefmt.LayerSpace,
	}
	for _, l := range im.Layers() {
		h.Layers = append(h.Layers, tracefmt.Layer{Digest: l.Digest, Size: l.Size, Decoded: l.Decoded})
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
