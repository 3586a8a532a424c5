package node

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer"
)

// RunOptions say what [Node.Run] starts, and how.
type RunOptions struct {
	Image  ImageOptions
	Args   []string // replace the image's command
	Config container.Config
	Stdin  *os.File
	Stdout io.Writer
	Stderr io.Writer
	// Plan are the settings of the replay.
	Plan replayer.Options
	// Ready is called once, when the container is ready, with the report so
	// far; the container goes on.
	Ready func(*Report)
	// Grace is how long a container has to end after ctx ends, 10 s by default.
	Grace time.Duration
	hooks hooks
}

// hooks are where a recording takes part in a run. Each may be nil.
type hooks struct {
	open  func(*Image) error // the image is open, nothing has been read
	ready func(error)        // the container is ready, or known never to be
	over  func()             // the container has ended
	end   <-chan struct{}    // ends the container when closed
}

// lastReads is how long the reads of a container that has ended, or is killed,
// may still take.
const lastReads = time.Second

// Report is what one start did.
type Report struct {
	Image    string          `json:"image"`
	Manifest string          `json:"manifest,omitempty"`
	Workload string          `json:"workload"`
	Layers   int             `json:"layers"`
	Phases   []Phase         `json:"phases"`
	Ready    bool            `json:"ready"`
	ReadyAt  time.Time       `json:"ready_at"` // wall clock
	NotReady string          `json:"not_ready,omitempty"`
	Start    Snapshot        `json:"at_ready"` // figures when it was ready
	End      Snapshot        `json:"at_end"`   // figures when it had ended
	Trace    string          `json:"trace"`    // where the trace is from, or why there is none
	Replay   replayer.Result `json:"replay"`
	Exit     int             `json:"exit"`
}

// Run starts a container on the image, with the trace that the options name,
// and waits for its end. It returns the container's exit status. When ctx ends
// the container is stopped. Nothing is left behind, whatever happens, except
// that a killed process leaves its directory below Root, which the next run
// removes.
func (n *Node) Run(ctx context.Context, ref string, o *RunOptions) (*Report, error) {
	r := &run{n: n, o: *o, report: &Report{Image: ref}}
	r.phases = cmp.Or(o.Image.Phases, NewPhases())
	r.o.Image.Phases, r.o.Image.Args = r.phases, o.Args
	err := r.run(ctx, ref)
	r.report.Phases = r.phases.List()
	return r.report, err
}

// run is one start while it lasts.
type run struct {
	n      *Node
	o      RunOptions
	phases *Phases
	im     *Image
	mu     sync.Mutex // guards report while the container runs
	report *Report
	replay chan replayer.Result
	stop   context.CancelFunc // of the replay
	ended  sync.Once          // likewise
}

func (r *run) run(ctx context.Context, ref string) (err error) {
	state, err := r.n.newRunDir()
	if err != nil {
		return err
	}
	defer state.remove(r.n)
	stage, err := container.NewStage(ctx, &container.Options{Stdin: r.o.Stdin, Stdout: r.o.Stdout, Stderr: r.o.Stderr})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stage.Close()) }() // again, for the early returns
	if r.im, err = r.n.OpenImage(ctx, ref, &r.o.Image); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.im.Close()) }()
	r.report.Manifest, r.report.Layers = string(r.im.Manifest), len(r.im.Layers())
	r.report.Workload = r.im.workload(r.o.Image)
	r.startReplay(ctx)
	defer r.endReplay()
	if h := r.o.hooks; h.open != nil {
		if err := h.open(r.im); err != nil {
			return err
		}
		defer h.over()
	}
	dev, err := r.im.attach(ctx, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	defer func() {
		// Nobody wants bytes any more, but unmounting waits for those under way.
		r.endReplay()
		fail := time.AfterFunc(lastReads, r.im.fail)
		err = errors.Join(err, stage.Close())
		fail.Stop()
	}()
	return r.contain(ctx, stage, dev, state.path)
}

// contain runs the container itself.
func (r *run) contain(ctx context.Context, stage *container.Stage, dev *device.Device, state string) error {
	cfg := r.o.Config
	cfg.Image, cfg.Args = r.im.Config.Config, r.o.Args
	cfg.Device, cfg.FSType, cfg.MountOptions = dev.Path(), r.im.FSType, r.im.mountOptions()
	cfg.StateDir = state
	stop := r.im.failWith(ctx)
	c, err := stage.Start(ctx, &cfg)
	stop()
	if err != nil {
		var failed *container.StartError
		if errors.As(err, &failed) {
			r.report.Exit = failed.Status
		}
		return err
	}
	r.phases.markAt("mounted", c.Timeline().Mounted)
	r.phases.markAt("process started", c.Timeline().ProcessStarted)
	var watch sync.WaitGroup
	watching, giveUp := context.WithCancel(ctx)
	defer giveUp()
	watch.Go(func() { r.awaitReady(watching, c) })
	if err = r.await(ctx, c); err != nil {
		giveUp()
	}
	watch.Wait() // the end of the container ends it, and may be what makes it ready
	return err
}

// awaitReady waits until the container is ready and takes the figures of that
// moment.
func (r *run) awaitReady(ctx context.Context, c *container.Container) {
	at, err := c.WaitReady(ctx)
	if err == nil {
		r.phases.markAt("ready", at)
	}
	if r.o.hooks.ready != nil {
		r.o.hooks.ready(err)
	}
	r.mu.Lock()
	if err == nil {
		r.report.Ready, r.report.ReadyAt = true, at
	} else {
		r.report.NotReady = err.Error()
	}
	r.report.Start = snapshot(r.im)
	now := *r.report
	r.mu.Unlock()
	if now.Phases = r.phases.List(); err == nil && r.o.Ready != nil {
		r.o.Ready(&now)
	}
}

// await waits for the container's end, and brings it about when ctx ends or a
// recording is done.
func (r *run) await(ctx context.Context, c *container.Container) error {
	over, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-r.o.hooks.end:
			stop()
		case <-over.Done():
		}
	})
	defer watch.Wait()
	defer stop()
	status, err := c.Wait(over)
	if err != nil && over.Err() != nil {
		grace := cmp.Or(r.o.Grace, 10*time.Second)
		// A process that waits for bytes cannot be killed, so then they come no more.
		fail := time.AfterFunc(grace+lastReads, r.im.fail)
		status, err = c.Stop(context.WithoutCancel(ctx), grace)
		fail.Stop()
	}
	r.mu.Lock()
	r.report.Exit, r.report.End = status, snapshot(r.im)
	r.mu.Unlock()
	r.phases.mark("ended")
	return err
}

// startReplay fetches ahead once the trace is found.
func (r *run) startReplay(ctx context.Context) {
	ctx, r.stop = context.WithCancel(ctx)
	r.replay = make(chan replayer.Result, 1)
	go func() { r.replay <- r.n.replay(ctx, r.im, r.o.Plan) }() // endReplay waits for it
}

// endReplay stops the replay, if it goes on, and reports of it.
func (r *run) endReplay() {
	r.ended.Do(func() {
		r.stop()
		r.report.Replay = <-r.replay
		select {
		case <-r.im.trace.done:
			r.report.Trace = r.im.trace.why
		default:
			r.report.Trace = "the lookup had not ended"
		}
	})
}

// replay waits for the trace of an image and replays it. A trace that was there
// and could not be used is worth a line.
func (n *Node) replay(ctx context.Context, im *Image, o replayer.Options) replayer.Result {
	t, why := im.Trace(ctx)
	if t == nil {
		if im.trace.hasFailed() {
			n.o.Log.Warn("no trace is replayed", "image", im.Ref, "why", why)
		}
		return replayer.Result{Reason: why}
	}
	p, err := replayer.NewPlan(t, im, &o)
	if err != nil {
		n.o.Log.Warn("the trace is not replayed", "image", im.Ref, "trace", why, "why", err)
		return replayer.Result{Reason: err.Error()}
	}
	im.phases.mark("replay started")
	result := replayer.Replay(ctx, im.Image, p)
	im.phases.mark("replay ended")
	return result
}
