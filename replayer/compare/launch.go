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
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// start is what one start measured, at the moment of readiness.
type start struct {
	Ready    time.Duration // from the command to readiness
	Stall    time.Duration // during which demand waited for bytes
	Requests int64         // all, at the link where there is one
	Bytes    int64
	Serial   time.Duration // longest time with exactly one request in flight
	Coverage float64       // share of demand that a prefetch served
	Accuracy float64       // share of the prefetched bytes that demand read
	CPU      time.Duration // of reprise
	Report   *node.Report
}

// launch runs `reprise run` in a process of its own until the container is
// ready, and ends it.
func (c *comparison) launch(ctx context.Context, m Mode, root string) (start, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return start{}, err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, c.o.Program, c.args(m, root)...)
	cmd.ExtraFiles = []*os.File{w}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	begin := time.Now()
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return start{}, err
	}
	s, err := c.awaitReady(m, begin, bufio.NewReader(r))
	_ = cmd.Process.Signal(unix.SIGTERM)
	ended := cmd.Wait()
	if err != nil {
		return s, c.explain(ctx, err, ended, said.String())
	}
	return s, nil
}

func (c *comparison) args(m Mode, root string) []string {
	trace := "none"
	if m == Replay {
		trace = "auto"
	}
	args := []string{"run", "--root", root, "--trace", trace, "--report-fd", "3"}
	args = append(args, c.o.Flags...)
	args = append(args, c.o.Ref)
	if len(c.o.Args) > 0 {
		args = append(append(args, "--"), c.o.Args...)
	}
	return args
}

// awaitReady reads the report that the run sends when it is ready.
func (c *comparison) awaitReady(m Mode, begin time.Time, r *bufio.Reader) (start, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return start{}, errors.New("the container never got ready")
	}
	s := start{Report: new(node.Report)}
	var link regtest.Stats
	if c.o.Link != nil {
		link = c.o.Link.Stats()
	}
	if err := json.Unmarshal(line, s.Report); err != nil {
		return s, fmt.Errorf("report: %w", err)
	}
	at := s.Report.Start
	s.Ready = s.Report.ReadyAt.Sub(begin)
	s.Stall, s.CPU = at.Stats.Stall, at.CPU
	s.Coverage, s.Accuracy = at.Coverage, at.Accuracy
	s.Requests = at.Stats.DemandRequests + at.Stats.BackgroundRequests
	s.Bytes = at.Stats.DemandBytes + at.Stats.BackgroundBytes
	if c.o.Link != nil {
		s.Requests, s.Bytes, s.Serial = link.Requests, link.BytesSent, link.SerialTime
		if link.NewConns == 0 {
			return s, errors.New("no connection was made: not a cold start")
		}
	}
	if m == Replay && !replayed(s.Report) {
		return s, fmt.Errorf("no trace was replayed: %s", s.Report.Trace)
	}
	return s, nil
}

// replayed tells whether a start had a trace. Its result is not known yet at
// readiness when the replay still runs; the phase is.
func replayed(r *node.Report) bool {
	return slices.ContainsFunc(r.Phases, func(p node.Phase) bool { return p.Name == "replay started" })
}

func (c *comparison) explain(ctx context.Context, err, ended error, said string) error {
	if cause := ctx.Err(); cause != nil {
		err = fmt.Errorf("%w (%w after %v)", err, cause, c.o.Timeout)
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

// fillRoot brings all of the image into a state directory.
func (c *comparison) fillRoot(ctx context.Context, root string) error {
	n, err := node.Open(&node.Config{Root: root, Cache: backstore.CacheOptions{}})
	if err != nil {
		return err
	}
	im, err := n.OpenImage(ctx, c.o.Ref, nil)
	if err != nil {
		return errors.Join(err, n.Close())
	}
	err = im.Complete(ctx, nil)
	return errors.Join(err, im.Close(), n.Close())
}
