package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer"
)

// RunOptions say what [Run] starts, and how.
type RunOptions struct {
	// Request asks for the image's device; Ref, Args, Begun and Leased are set by
	// Run, and ID if it is empty.
	Request Request
	Args    []string // replace the image's command
	Config  container.Config
	Stdin   *os.File
	Stdout  io.Writer
	Stderr  io.Writer
	// Say, if set, is told what the server logs while it opens the image.
	Say func(line string)
	// Ready is called once, when the container is ready, with the report so
	// far; the container goes on.
	Ready func(*Report)
	// Grace is how long a container has to end after ctx ends, 10 s by default.
	Grace time.Duration
	// Root is where the container's own files are, and Log receives warnings:
	// the node's for [Node.Run].
	Root  string
	Log   *slog.Logger
	hooks hooks
}

// hooks are where a recording takes part in a run. Each may be nil.
type hooks struct {
	attached func(*Status)                                // nothing has been mounted of the device
	started  func(*container.Container)                   // it runs
	ready    func(at time.Time, how string, failed error) // the container is ready, or known never to be
	over     func()                                       // the container has ended
	end      <-chan struct{}                              // ends the container when closed
}

// unwantedGrace is how long a container has to end once it has been recorded: a
// good start is all that was wanted of it.
const unwantedGrace = time.Second

// lastReads is how long the reads of a container that has ended, or is killed,
// may still take.
const lastReads = time.Second

// Report is what one start did.
type Report struct {
	Image    string    `json:"image"`
	Manifest string    `json:"manifest,omitempty"`
	Workload string    `json:"workload"`
	Layers   int       `json:"layers"`
	Phases   []Phase   `json:"phases"`
	Ready    bool      `json:"ready"`
	ReadyAt  time.Time `json:"ready_at"` // wall clock
	NotReady string    `json:"not_ready,omitempty"`
	Start    Snapshot  `json:"at_ready"` // figures when it was ready
	End      Snapshot  `json:"at_end"`   // figures when it had ended
	Trace    string    `json:"trace"`    // where the trace is from, or why there is none
	// Explain says in a line why the trace was used, partly used or not, as far
	// as it is known.
	Explain string          `json:"explain"`
	Replay  replayer.Result `json:"replay"`
	Exit    int             `json:"exit"`
	// Restarts is how often the image's server was started again meanwhile: it
	// had been killed, and figures count from the last time on. Before are those
	// of the servers before, but for their last seconds.
	Restarts int              `json:"restarts"`
	Before   *backstore.Stats `json:"before,omitempty"`
}

// Run starts a container on an image of this process's own server, as the
// function Run does. A killed process takes the container along.
func (n *Node) Run(ctx context.Context, ref string, o *RunOptions) (*Report, error) {
	return n.run(ctx, ref, o, nil)
}

func (n *Node) run(ctx context.Context, ref string, o *RunOptions, opened func(*Image) error) (*Report, error) {
	s := NewServer(n, &ServerOptions{Log: n.o.Log, opened: opened})
	local := *o
	local.Root, local.Log = n.o.Root, n.o.Log
	r, err := Run(ctx, s, ref, &local)
	return r, errors.Join(err, s.Close())
}

// Run starts a container on the image, with the trace that the options name,
// and waits for its end. It returns the container's exit status. When ctx ends
// the container is stopped. Nothing is left behind, whatever happens, except
// that a killed process leaves its directory below Root, which the next run
// removes.
//
// The image is served by s: when that is killed and started again the container
// only waits.
func Run(ctx context.Context, s Devices, ref string, o *RunOptions) (*Report, error) {
	r := &run{s: s, o: *o, phases: NewPhases(), report: &Report{Image: ref}}
	r.o.Log = cmp.Or(r.o.Log, slog.Default())
	q := &r.o.Request
	q.ID = cmp.Or(q.ID, NewID())
	q.Ref, q.Args, q.Entrypoint, q.Begun, q.Leased = ref, o.Args, o.Config.Entrypoint, r.phases.Start(), true
	err := r.run(ctx)
	r.report.Phases = merged(r.phases.List(), r.report.Phases)
	return r.report, err
}

// run is one start while it lasts.
type run struct {
	s      Devices
	o      RunOptions
	phases *Phases    // of this process; those of the server are in the report
	mu     sync.Mutex // guards report while the container runs
	report *Report
}

func (r *run) run(ctx context.Context) (err error) {
	state, err := newRunDir(r.o.Root, r.o.Log)
	if err != nil {
		return err
	}
	defer state.remove()
	attached := r.attach(ctx) // beside the start of the stage
	stage, err := container.NewStage(ctx, &container.Options{Stdin: r.o.Stdin, Stdout: r.o.Stdout, Stderr: r.o.Stderr})
	if err != nil {
		return errors.Join(err, attached.undo())
	}
	defer func() { err = errors.Join(err, stage.Close()) }() // again, for the early returns
	dev, err := attached.wait()
	if err != nil {
		if errors.Is(err, context.Cause(ctx)) {
			err = fmt.Errorf("open %s: %w", r.report.Image, err)
		}
		return err
	}
	r.note(dev)
	if r.o.hooks.attached != nil {
		r.o.hooks.attached(dev)
	}
	defer func() { err = errors.Join(err, r.release()) }()
	ctx, stop := r.lease(ctx)
	defer stop()
	defer func() {
		// Nobody wants bytes any more, but unmounting waits for those under way.
		r.quiesce()
		err = errors.Join(err, stage.Close())
		if r.o.hooks.over != nil {
			r.o.hooks.over()
		}
	}()
	return r.contain(ctx, stage, dev, state.path)
}

// An attaching is a request for a device that is under way.
type attaching struct {
	r      *run
	cancel context.CancelFunc
	done   chan struct{} // closed: what follows is there
	dev    *Status
	err    error
}

// attach begins to ask for the device.
func (r *run) attach(ctx context.Context) *attaching {
	a := &attaching{r: r, done: make(chan struct{})}
	ctx, a.cancel = context.WithCancel(ctx)
	go func() {
		defer close(a.done)
		a.dev, a.err = r.s.Attach(ctx, &r.o.Request, r.o.Say)
	}()
	return a
}

func (a *attaching) wait() (*Status, error) {
	<-a.done
	a.cancel()
	return a.dev, a.err
}

// undo gives the request up.
func (a *attaching) undo() error {
	a.cancel()
	<-a.done
	if a.err != nil {
		return nil
	}
	return a.r.release()
}

// lease holds the device. The context that it returns ends with it; stop ends
// the lease and waits for it.
func (r *run) lease(ctx context.Context) (_ context.Context, stop func()) {
	lost, cancel := context.WithCancelCause(ctx)
	held, letGo := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.s.Lease(held, r.o.Request.ID); err != nil {
			cancel(fmt.Errorf("%s: %w", r.report.Image, err))
		}
	}()
	return lost, func() {
		letGo()
		<-done
		cancel(nil)
	}
}

// note takes what the server says of the device into the report. r.mu is held,
// or the container does not run.
func (r *run) note(st *Status) {
	p := r.report
	p.Manifest, p.Layers, p.Workload = string(st.Manifest), st.Layers, st.Workload
	p.Phases, p.Trace, p.Explain, p.Replay = st.Phases, st.Trace, st.Explain, st.Replay
	p.Restarts, p.Before = st.Restarts, st.Before
}

// serverTime bounds what is asked of the server when a container has ended.
const serverTime = 30 * time.Second

// status asks for the figures of this moment, to which it adds this process's.
func (r *run) status() (Snapshot, error) {
	ctx, cancel := context.WithTimeout(context.Background(), serverTime)
	defer cancel()
	st, err := r.s.Status(ctx, r.o.Request.ID, false)
	if err != nil {
		return Snapshot{}, err
	}
	r.note(st)
	return r.withOwn(st), nil
}

// withOwn adds this process's part to the server's figures.
func (r *run) withOwn(st *Status) Snapshot {
	now := st.Now
	if st.Pid != os.Getpid() {
		now.addUsage()
	}
	return now
}

// quiesce ends the replay and has reads fail soon.
func (r *run) quiesce() {
	ctx, cancel := context.WithTimeout(context.Background(), serverTime)
	defer cancel()
	st, err := r.s.Quiesce(ctx, r.o.Request.ID, lastReads)
	if err != nil {
		return // the server is gone, and its device
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note(st)
}

func (r *run) release() error {
	ctx, cancel := context.WithTimeout(context.Background(), serverTime)
	defer cancel()
	err := r.s.Release(ctx, r.o.Request.ID, false)
	switch {
	case errors.Is(err, ErrServerEnded):
		return nil // and its device with it; what the container met says more
	case ctx.Err() != nil:
		return fmt.Errorf("release the device of %s: it is still in use, perhaps in another mount namespace: %w", r.report.Image, err)
	}
	return err
}

// fail makes reads fail.
func (r *run) fail() {
	ctx, cancel := context.WithTimeout(context.Background(), serverTime)
	defer cancel()
	_ = r.s.Fail(ctx, r.o.Request.ID)
}

// contain runs the container itself.
func (r *run) contain(ctx context.Context, stage *container.Stage, dev *Status, state string) error {
	cfg := r.o.Config
	cfg.Image, cfg.Args = dev.Config.Config, r.o.Args
	cfg.Device, cfg.FSType, cfg.MountOptions = dev.Device, dev.FSType, dev.MountOptions
	cfg.StateDir = state
	stop := context.AfterFunc(ctx, r.fail) // mounting cannot be interrupted while it waits for bytes
	c, err := stage.Start(ctx, &cfg)
	stop()
	if err != nil {
		var failed *container.StartError
		if errors.As(err, &failed) {
			r.report.Exit = failed.Status
		}
		return err
	}
	if r.o.hooks.started != nil {
		r.o.hooks.started(c)
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
		r.o.hooks.ready(at, c.How(), err)
	}
	r.mu.Lock()
	if err == nil {
		r.report.Ready, r.report.ReadyAt = true, at
	} else {
		r.report.NotReady = err.Error()
	}
	var figures error
	r.report.Start, figures = r.status()
	now := *r.report
	r.mu.Unlock()
	if figures != nil {
		r.o.Log.Warn("no figures of the start", "err", figures)
	}
	if now.Phases = merged(r.phases.List(), now.Phases); err == nil && r.o.Ready != nil {
		r.o.Ready(&now)
	}
}

// await waits for the container's end, and brings it about when ctx ends or a
// recording is done.
func (r *run) await(ctx context.Context, c *container.Container) error {
	over, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	var unwanted atomic.Bool
	watch.Go(func() {
		select {
		case <-r.o.hooks.end:
			unwanted.Store(true)
			stop()
		case <-over.Done():
		}
	})
	defer watch.Wait()
	defer stop()
	status, err := c.Wait(over)
	if err != nil && over.Err() != nil {
		grace := cmp.Or(r.o.Grace, 10*time.Second)
		if unwanted.Load() {
			grace = min(grace, unwantedGrace)
		}
		// A process that waits for bytes cannot be killed, so then they come no more.
		fail := time.AfterFunc(grace+lastReads, r.fail)
		status, err = c.Stop(context.WithoutCancel(ctx), grace)
		fail.Stop()
	}
	r.mu.Lock()
	r.report.Exit = status
	r.report.End, _ = r.status()
	r.mu.Unlock()
	r.phases.mark("ended")
	if cause := context.Cause(ctx); errors.Is(cause, ErrServerEnded) || errors.Is(cause, ErrNoDevice) {
		err = errors.Join(cause, err)
	}
	return err
}
