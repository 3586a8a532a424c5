package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/probe"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// RecordRules say when the recording of a container that a server does by itself
// ends; see [Request.Record]. The first rule that applies ends it. A zero field
// means its default, a negative one that the rule never applies.
//
// The reads of a device are recorded from the first on, so only for a device that
// the request makes: what is in the page cache of another is not read again. All
// containers that have come to the device by the end of the recording are in the
// trace; if one of them is of another workload there is none. It ends also when
// the last process of the containers has ended, and when the device is released.
//
// A trace is put beside its image if the container was ready, or its processes
// still ran at the end. Where that is not possible, or the image has got a trace
// of the workload meanwhile, or the container has just ended, which may have been
// its failure, see [Status.Recording]. A server that is killed forgets its
// recordings.
type RecordRules struct {
	// Tail bounds how long a recording goes on when the container is ready: when
	// the first of its processes listens on a TCP port, which eBPF tells. 60 s by
	// default; negative for no tail.
	Tail time.Duration `json:"tail_ns,omitempty"`
	// Settle ends the tail when nothing new was read for so long, 2 s by default.
	Settle time.Duration `json:"settle_ns,omitempty"`
	// Quiet ends a recording, before the container is ready, when nothing new was
	// read for so long since its first process has begun, 5 s by default. The time
	// in which a read waits for the registry does not count.
	Quiet time.Duration `json:"quiet_ns,omitempty"`
	// MaxDuration ends it so long after the image was opened, 60 s by default.
	MaxDuration time.Duration `json:"max_duration_ns,omitempty"`
	// MaxBytes ends it when so many distinct bytes were read; no limit by default.
	MaxBytes int64 `json:"max_bytes,omitempty"`
}

// The defaults of RecordRules that are not those of [recorder.Options].
const (
	defaultTail   = time.Minute
	defaultSettle = 2 * time.Second
)

func (r *RecordRules) options() recorder.Options {
	o := recorder.Options{Tail: r.Tail, Settle: r.Settle, Quiet: r.Quiet, MaxDuration: r.MaxDuration, MaxBytes: max(r.MaxBytes, 0)}
	if o.Tail == 0 {
		o.Tail = defaultTail
	}
	if o.Settle == 0 {
		o.Settle = defaultSettle
	}
	return o // which takes a negative Tail and Settle for none
}

// recordings are those of a server.
type recordings struct {
	mu    sync.Mutex // guards what follows
	going map[recordingKey]struct{}
	told  map[string]struct{} // what is said once
}

// A recordingKey is what is recorded once at a time.
type recordingKey struct {
	manifest digest.Digest
	workload string
}

// enter tells whether a recording may begin; leave ends it then.
func (r *recordings) enter(k recordingKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.going == nil {
		r.going = map[recordingKey]struct{}{}
	}
	if _, there := r.going[k]; there {
		return false
	}
	r.going[k] = struct{}{}
	return true
}

func (r *recordings) leave(k recordingKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.going, k)
}

// first tells whether something has not been said yet.
func (r *recordings) first(what string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.told == nil {
		r.told = map[string]struct{}{}
	}
	_, said := r.told[what]
	r.told[what] = struct{}{}
	return !said
}

// An autoRecording is one that a server does by itself.
type autoRecording struct {
	d     *served
	im    *Image
	key   recordingKey
	begun time.Time
	rec   *recorder.Recorder
	trace bytes.Buffer  // what rec writes, until it is done
	known chan struct{} // closed: the image has no trace, or it is given up

	// Of watch, until run has waited for it.
	reads   []tracefmt.Event // of the device, as eBPF saw them
	missing []string         // what could not be found out

	mu      sync.Mutex    // guards what follows
	started time.Duration // since begun, when a process was first seen; 0: not yet
	alive   bool          // there was one when it was last looked
	drop    string        // why the trace is not wanted; empty if it is
	says    string        // how it goes; empty while it is not known to be needed
}

// startRecording begins to record the reads of the image of a device that is not
// there yet, if that is asked for and may be needed.
func (d *served) startRecording() {
	r := &d.state.Request
	if r.Record == nil {
		return
	}
	a := &autoRecording{d: d, im: d.im, begun: d.im.Opened(), known: make(chan struct{})}
	a.key = recordingKey{d.im.Manifest, d.im.workload(r.imageOptions())}
	if !a.isNeeded() || !d.s.recordings.enter(a.key) {
		return
	}
	rules := r.Record.options()
	rules.Stalled = a.stalled
	var err error
	if a.rec, err = recorder.New(&a.trace, a.im.traceHeader(d.n.o.Tool, r.imageOptions()), &rules); err != nil {
		d.log.Warn("the container is not recorded", "image", r.Ref, "why", err)
		d.s.recordings.leave(a.key)
		return
	}
	d.im.recorded = true
	d.im.SetObserver(a.rec)
	d.recording.Store(a)
	d.state.Recording = true
	d.wg.Go(a.run)
}

// loseRecording notes, before the device is ready, that the server before was
// killed amid a recording.
func (d *served) loseRecording() {
	if !d.state.Recording {
		return
	}
	d.state.Recording, d.lost = false, true
	d.log.Info("the recording of a container is lost: the server was started again amid it", "image", d.state.Request.Ref)
}

// recordingState says how the recording goes, if there is or has been one.
func (d *served) recordingState() string {
	a := d.recording.Load()
	switch {
	case d.lost:
		return "lost: the server was started again amid it"
	case a == nil:
		return ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.says
}

// isNeeded tells whether there may be a trace to record. Whether the image has one
// is perhaps not known yet.
func (a *autoRecording) isNeeded() bool {
	r := &a.d.state.Request
	if a.im.Manifest == "" || strings.HasPrefix(a.im.Ref, layoutScheme) {
		return false // traces are beside images at registries
	}
	if _, err := os.Stat(a.path(false)); err == nil {
		if a.d.s.recordings.first(a.path(false)) {
			a.d.log.Info("the container is not recorded: a trace of its workload is kept on this node",
				"image", r.Ref, "workload", a.key.workload, "file", a.path(false), "push", a.command(a.path(false)))
		}
		return false
	}
	return !a.isKnown() || !a.im.trace.failed && !a.isOwn()
}

// isKnown tells whether the lookup of the trace that is replayed has ended, where
// that is of the workload's.
func (a *autoRecording) isKnown() bool {
	select {
	case <-a.im.trace.done:
		return a.d.state.Request.Trace == "auto"
	default:
		return false
	}
}

// isOwn tells whether the lookup has found a trace of the workload.
func (a *autoRecording) isOwn() bool { return a.im.trace.trace != nil && !a.im.trace.foreign }

// hasTrace waits until it is known whether the image has a trace of the workload.
func (a *autoRecording) hasTrace(ctx context.Context) (bool, error) {
	if l := a.im.trace; a.d.state.Request.Trace == "auto" {
		select {
		case <-l.done:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		if l.failed {
			return false, errors.New(l.why)
		}
		return a.isOwn(), nil
	}
	store, err := artifact.New(a.d.n.client, a.im.Ref)
	if err != nil {
		return false, err
	}
	_, _, err = store.Pull(ctx, a.key.manifest, a.key.workload)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// run sees the recording to its end.
func (a *autoRecording) run() {
	ctx, cancel := context.WithCancel(a.d.work)
	var wg sync.WaitGroup
	wg.Go(func() { a.checkTrace(ctx) })
	wg.Go(func() { a.watch(ctx) })
	select {
	case <-a.rec.Done():
	case <-a.d.work.Done():
		a.rec.Over("the device was released")
		<-a.rec.Done()
	}
	a.im.SetObserver(nil)
	a.look()
	cancel()
	wg.Wait()
	a.d.noteRecorded()
	f := a.finishing()
	a.d.s.wg.Go(func() {
		defer a.d.s.recordings.leave(a.key)
		f.run()
	})
}

// noteRecorded lets the next server know that the recording is over.
func (d *served) noteRecorded() { d.note(func(s *state) { s.Recording = false }) }

// checkTrace gives the recording up if the image has a trace, or if that cannot be
// known.
func (a *autoRecording) checkTrace(ctx context.Context) {
	defer close(a.known)
	has, err := a.hasTrace(ctx)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		a.giveUp("it is not known whether the image has a trace: " + err.Error())
	case has:
		a.giveUp(notMissing)
	default:
		a.say("recording")
	}
}

// notMissing gives a recording up that had only begun because it was not known yet
// that the image has a trace.
const notMissing = "the image has a trace"

// say notes how the recording goes.
func (a *autoRecording) say(says string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.says = says
}

// isOver tells whether the recording has ended, or was given up.
func (a *autoRecording) isOver() bool {
	select {
	case <-a.rec.Done():
		return true
	default:
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.drop != ""
}

// giveUp ends the recording without a trace.
func (a *autoRecording) giveUp(why string) {
	a.mu.Lock()
	if a.drop == "" {
		a.drop = why
	}
	a.mu.Unlock()
	a.rec.Stop(why)
}

// joined tells the recording that somebody else has come to the device.
func (d *served) joined(r *Request) {
	a := d.recording.Load()
	if a == nil || a.isOver() {
		return
	}
	if w := a.im.workload(r.imageOptions()); w != a.key.workload {
		a.giveUp("a container of workload " + w + " has come to the same device")
	}
}

// stalled is for how long reads have waited; and before the first process of a
// container is there nothing is quiet.
func (a *autoRecording) stalled() time.Duration {
	a.mu.Lock()
	before := a.started
	a.mu.Unlock()
	if before == 0 {
		before = time.Since(a.begun)
	}
	return before + a.im.Stats().Stall
}

// lookEvery is how often it is looked for the processes of the containers.
const lookEvery = 250 * time.Millisecond

// probeBuffer is the size of the buffer for eBPF's events, bytes: there may be
// many recordings at once, and one is of one start.
const probeBuffer = 1 << 20

// watch sees, until ctx ends, who reads and who listens, and whether there are
// processes in the containers. The device is not made to wait for that: to load the
// programs takes some 50 ms, and is left until it is known that there is something
// to record, or somebody may begin to read.
func (a *autoRecording) watch(ctx context.Context) {
	select {
	case <-a.known:
	case <-a.d.ready:
	case <-ctx.Done():
	}
	if a.isOver() || ctx.Err() != nil {
		return
	}
	p, err := probe.Start(&probe.Options{Listen: true, Start: a.begun, Buffer: probeBuffer})
	if err != nil {
		a.missing = append(a.missing, notNamed(err))
	} else {
		var listening sync.WaitGroup
		listening.Go(func() { a.awaitListen(p) })
		defer a.endProbe(p, &listening)
	}
	select {
	case <-a.d.ready:
	case <-ctx.Done():
		return
	}
	a.watchDevice(p)
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		a.look()
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// watchDevice has the probe watch the device.
func (a *autoRecording) watchDevice(p *probe.Probe) {
	if p == nil {
		return
	}
	rdev, err := blockDevice(a.d.path())
	if err == nil {
		err = p.AddDevice(rdev)
	}
	if err != nil {
		a.missing = append(a.missing, notNamed(err))
	}
}

// blockDevice is the number of a block device.
func blockDevice(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s is not a block device", path)
	}
	return st.Rdev, nil
}

// awaitListen tells the recorder of the first process of a container that listens.
func (a *autoRecording) awaitListen(p *probe.Probe) {
	for l := range p.Listens() {
		if a.isReady() && a.place().has(l.Pid) {
			a.rec.ReadyAt(a.begun.Add(l.At), "port "+strconv.Itoa(int(l.Addr.Port())))
		}
	}
}

func (a *autoRecording) endProbe(p *probe.Probe, listening *sync.WaitGroup) {
	if err := p.Close(); err != nil {
		a.missing = append(a.missing, "eBPF: "+err.Error())
	}
	listening.Wait()
	a.reads = p.Reads()
	if s := p.Stats(); s.Lost > 0 {
		a.missing = append(a.missing, fmt.Sprintf("eBPF: %d of %d events were lost", s.Lost, s.Reads+s.Lost))
	}
}

// look looks for the processes of the containers, and ends the recording with the
// last of them.
func (a *autoRecording) look() {
	if !a.isReady() {
		return
	}
	alive := a.place().inUse()
	a.mu.Lock()
	defer a.mu.Unlock()
	if alive && a.started == 0 {
		a.started = max(time.Since(a.begun), 1)
	}
	if a.alive && !alive {
		a.rec.Over("the container has ended")
	}
	a.alive = alive
}

// isReady tells whether the device is there. As long as the recording goes on, one
// that could not be attached is not.
func (a *autoRecording) isReady() bool {
	select {
	case <-a.d.ready:
		return true
	default:
		return false
	}
}

// path is where a trace is kept that cannot be put beside its image; ended says
// that it is of a container that had just ended.
func (a *autoRecording) path(ended bool) string {
	name := artifact.Tag(a.key.manifest, a.key.workload)
	if ended {
		name += ".ended"
	}
	return filepath.Join(tracesDir(a.d.s.n.o.Root), name+".trace")
}

// tracesDir holds traces that wait for somebody to push them.
func tracesDir(root string) string { return filepath.Join(root, "traces") }

// command puts a kept trace beside its image.
func (a *autoRecording) command(path string) string {
	words := []string{"reprise", "attach"}
	r := &a.d.state.Request
	if r.PlainHTTP {
		words = append(words, "--plain-http")
	}
	if r.HostsDir != "" {
		words = append(words, "--hosts-dir", r.HostsDir)
	}
	return strings.Join(append(words, a.pinnedRef(), path), " ")
}
