package compare

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// start is what one start measured, at the moment of readiness.
type start struct {
	Ready    time.Duration // from the command to readiness
	Process  time.Duration // from the command to the start of the container's process
	Stall    time.Duration // during which demand waited for bytes
	Requests int64         // all, at the link where there is one
	Bytes    int64
	Serial   time.Duration // longest time with exactly one request in flight
	Coverage float64       // share of demand that a prefetch served
	Accuracy float64       // share of the prefetched bytes that demand read
	CPU      time.Duration // of reprise
	Report   *node.Report

	Begin time.Time         // of the command
	Log   []regtest.Request // at the link, until it was ready
	Exit  int               // status of the command, which SIGTERM ended
	Said  []string          // what --explain said of the trace, at the end
}

// A process is a `reprise run` that got ready and was ended then.
type process struct {
	begin  time.Time
	report *node.Report // at readiness
	exit   int          // status of the command, which SIGTERM has ended
	said   string
}

// runUntilReady runs a `reprise run` that reports to descriptor 3 until its
// container is ready, and ends it. It calls atReady once: when the container is
// ready, or when it is known never to be.
func runUntilReady(ctx context.Context, program string, env, argv []string, atReady func()) (p process, err error) {
	var once sync.Once
	defer once.Do(atReady)
	r, w, err := os.Pipe()
	if err != nil {
		return p, err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, program, argv...)
	cmd.Env = env
	cmd.ExtraFiles = []*os.File{w}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	p = process{begin: time.Now(), report: new(node.Report)}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return p, err
	}
	line, err := bufio.NewReader(r).ReadBytes('\n')
	once.Do(atReady)
	switch {
	case err != nil:
		err = errors.New("the container never got ready")
	default:
		if err = json.Unmarshal(line, p.report); err != nil {
			err = fmt.Errorf("report: %w", err)
		}
	}
	_ = cmd.Process.Signal(unix.SIGTERM)
	ended := cmd.Wait()
	if err != nil {
		return p, explain(ctx, err, ended, said.String())
	}
	p.exit, p.said = cmd.ProcessState.ExitCode(), said.String()
	return p, nil
}

// launch starts once and measures.
func (c *comparison) launch(ctx context.Context, v *Variant, root string) (start, error) {
	var link regtest.Stats
	p, err := c.starter(v)(ctx, root, func() {
		if c.o.Link != nil {
			link = c.o.Link.Stats()
		}
	})
	if err != nil {
		return start{}, err
	}
	s := newStart(&p)
	if c.o.Link != nil {
		s.Requests, s.Bytes, s.Serial, s.Log = link.Requests, link.BytesSent, link.SerialTime, link.Log
		if link.NewConns == 0 && !v.local {
			return s, errors.New("no connection was made: not a cold start")
		}
	}
	if v.Check != nil {
		err = v.Check(s.Report)
	}
	return s, err
}

// starter is what starts the variant.
func (c *comparison) starter(v *Variant) starter {
	if v.start != nil {
		return v.start
	}
	return func(ctx context.Context, root string, atReady func()) (process, error) {
		return runUntilReady(ctx, c.o.Program, c.o.Env, c.args(v, root), atReady)
	}
}

// newStart takes the figures out of a report.
func newStart(p *process) start {
	at := &p.report.Start
	return start{
		Begin: p.begin, Report: p.report, Process: phase(p.report, "process started"), Exit: p.exit, Said: explained(p.said),
		Ready: p.report.ReadyAt.Sub(p.begin), Stall: at.Stats.Stall, CPU: at.CPU, Coverage: at.Coverage, Accuracy: at.Accuracy,
		Requests: at.Stats.DemandRequests + at.Stats.BackgroundRequests,
		Bytes:    at.Stats.DemandBytes + at.Stats.BackgroundBytes,
	}
}

// phase is when a start reached the phase, 0 if it did not.
func phase(r *node.Report, name string) time.Duration {
	for _, p := range r.Phases {
		if p.Name == name {
			return p.At
		}
	}
	return 0
}

// explained picks what --explain says of the trace.
func explained(said string) (lines []string) {
	for line := range strings.Lines(said) {
		for _, head := range []string{"trace:", "replay:"} {
			text, ok := strings.CutPrefix(line, head)
			if text = head + " " + strings.TrimSpace(text); ok && !slices.Contains(lines, text) {
				lines = append(lines, text)
			}
		}
	}
	return lines
}

func (c *comparison) args(v *Variant, root string) []string {
	args := []string{"run", "--root", root, "--trace", v.Trace, "--explain", "--report-fd", "3"}
	args = append(append(args, c.o.Flags...), v.Flags...)
	args = append(args, c.o.Ref)
	if len(c.o.Args) > 0 {
		args = append(append(args, "--"), c.o.Args...)
	}
	return args
}

// explain says why a start failed.
func explain(ctx context.Context, err, ended error, said string) error {
	if cause := ctx.Err(); cause != nil {
		err = fmt.Errorf("%w (%w)", err, cause)
	}
	if ended != nil {
		err = fmt.Errorf("%w: %w", err, ended)
	}
	lines := strings.Split(strings.TrimSpace(said), "\n")
	if n := len(lines); n > 12 {
		lines = lines[n-12:]
	}
	if said != "" {
		err = fmt.Errorf("%w; it said:\n  %s", err, strings.Join(lines, "\n  "))
	}
	return err
}

// FillRoot brings all of an image into a state directory.
func FillRoot(ctx context.Context, root, ref string) error {
	n, err := node.Open(&node.Config{Root: root, Cache: backstore.CacheOptions{}})
	if err != nil {
		return err
	}
	im, err := n.OpenImage(ctx, ref, nil)
	if err != nil {
		return errors.Join(err, n.Close())
	}
	err = im.Complete(ctx, nil)
	return errors.Join(err, im.Close(), n.Close())
}
