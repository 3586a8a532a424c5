package compare

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/replayer/node"
)

// A ctrdStart is one start through containerd.
type ctrdStart struct {
	*ctrd
	ref, snapshotter string
	// pull, if not nil, brings the image; its time is the start's.
	pull func(context.Context) error
	// ready is called once, at readiness or when that is known never to be; seen,
	// if not nil, after that, while the container still runs.
	ready func()
	seen  func(context.Context, *ctrdStart) error

	begin  time.Time
	report *node.Report
	pulled time.Duration // since begin
}

// ctrdPatience bounds what takes a start away.
const ctrdPatience = 30 * time.Second

func (s *ctrdStart) mark(name string) { s.markAt(name, time.Now()) }

func (s *ctrdStart) markAt(name string, at time.Time) {
	s.report.Phases = append(s.report.Phases, node.Phase{Name: name, At: at.Sub(s.begin)})
}

// run starts a container on the image, waits until it is ready, and removes it.
// Its process is the result.
func (s *ctrdStart) run(ctx context.Context) (p process, err error) {
	var once sync.Once
	ready := s.ready
	s.ready = func() { once.Do(ready) }
	defer s.ready()
	s.begin, s.report = time.Now(), &node.Report{Image: s.ref}
	if s.pull != nil {
		if err := s.pull(ctx); err != nil {
			return p, err
		}
		s.mark("pulled")
		s.pulled = time.Since(s.begin)
	}
	exit, err := s.contain(ctx)
	return process{begin: s.begin, report: s.report, exit: exit}, err
}

// contain makes the container and removes it.
func (s *ctrdStart) contain(ctx context.Context) (exit int, err error) {
	im, err := s.GetImage(ctx, s.ref)
	if err != nil {
		return 0, err
	}
	s.report.Manifest = im.Target().Digest.String()
	name := filepath.Base(s.tmp) // runc has one directory for all containerds
	ctr, err := s.NewContainer(ctx, name,
		client.WithImage(im), client.WithSnapshotter(s.snapshotter), client.WithNewSnapshot(name, im),
		client.WithRuntime("io.containerd.runc.v2", nil),
		client.WithNewSpec(oci.WithImageConfig(im), noCgroups))
	if err != nil {
		return 0, fmt.Errorf("make the container: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ctrdPatience)
		defer cancel()
		err = errors.Join(err, ctr.Delete(ctx, client.WithSnapshotCleanup))
	}()
	s.mark("container created")
	return s.execute(ctx, ctr)
}

// execute runs the container until it is ready, and kills it.
func (s *ctrdStart) execute(ctx context.Context, ctr client.Container) (exit int, err error) {
	out := newReadyLog()
	// What is given up half-way would leave a process.
	making, cancel := context.WithTimeout(context.WithoutCancel(ctx), ctrdPatience)
	defer cancel()
	task, err := ctr.NewTask(making, cio.NewCreator(cio.WithStreams(nil, out, out), cio.WithFIFODir(filepath.Join(s.tmp, "fifo"))))
	if err != nil {
		return 0, fmt.Errorf("make the container's process: %w", err)
	}
	s.mark("process created")
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ctrdPatience)
		defer cancel()
		st, gone := task.Delete(ctx, client.WithProcessKill)
		if err = errors.Join(err, gone); st != nil {
			exit = int(st.ExitCode())
		}
	}()
	ended, err := task.Wait(ctx)
	if err != nil {
		return 0, err
	}
	if err := task.Start(making); err != nil {
		return 0, fmt.Errorf("start the container's process: %w", err)
	}
	s.mark("process started")
	select {
	case at := <-out.ready:
		s.ready()
		s.markAt("ready", at)
		s.report.Ready, s.report.ReadyAt = true, at
	case st := <-ended:
		return 0, fmt.Errorf("the container ended with status %d before it was ready: %s", st.ExitCode(), out)
	case <-ctx.Done():
		return 0, fmt.Errorf("the container is not ready: %w: %s", context.Cause(ctx), out)
	}
	if s.seen == nil {
		return 0, nil
	}
	return 0, s.seen(ctx, s)
}

// noCgroups leaves the container in containerd's own: limits are not measured,
// and not every machine lets them be set.
func noCgroups(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
	s.Linux.CgroupsPath = ""
	s.Linux.Resources = nil
	return nil
}

// A readyLog is a container's output. The moment when one of its lines says that
// it is ready comes out of ready, once. It is safe for concurrent use.
type readyLog struct {
	ready chan time.Time // holds one

	mu   sync.Mutex // guards all below
	all  []byte
	line int // where the last line of all begins
	seen bool
}

func newReadyLog() *readyLog { return &readyLog{ready: make(chan time.Time, 1)} }

func (l *readyLog) Write(p []byte) (int, error) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, p...)
	for !l.seen {
		end := bytes.IndexByte(l.all[l.line:], '\n')
		if end < 0 {
			break
		}
		if l.seen = saysReady.Match(l.all[l.line : l.line+end]); l.seen {
			l.ready <- now
		}
		l.line += end + 1
	}
	return len(p), nil
}

func (l *readyLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.all)
}

// pullLazily runs `reprise pull` and adds its processor time to the figures.
func (s *ctrdStart) pullLazily(ctx context.Context, program string) error {
	cmd := exec.CommandContext(ctx, program, "pull", "--address", s.socket, s.ref)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = ctrdPatience
	if _, err := output(cmd); err != nil {
		return err
	}
	s.report.Start.CPU += cmd.ProcessState.SystemTime() + cmd.ProcessState.UserTime()
	return nil
}

// note takes what the daemon says of the image's device into the report. Its
// phases count from when the container's snapshot was asked for, which is when
// the image had been pulled but for some milliseconds.
func (s *ctrdStart) note(st *node.Status) {
	r, cpu := s.report, s.report.Start.CPU
	r.Manifest, r.Layers, r.Workload = string(st.Manifest), st.Layers, st.Workload
	r.Trace, r.Explain, r.Replay, r.Start = st.Trace, st.Explain, st.Replay, st.Now
	r.Start.CPU += cpu
	for _, p := range st.Phases {
		r.Phases = append(r.Phases, node.Phase{Name: p.Name, At: s.pulled + p.At})
	}
}
