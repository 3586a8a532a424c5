package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
)

// recordRuns records several cold starts and merges them into f. Each is
// recorded into a file beside f, which is there until f is complete. An
// interrupt ends the recording that is under way; those before it are merged.
func (f *recordFlags) recordRuns(cmd *cobra.Command, n *node.Node, ref string, out *node.TraceFile, o *node.RecordOptions) (err error) {
	var traces []*tracefmt.Trace
	var paths []string
	defer func() {
		if err == nil || f.out == "" {
			for _, p := range paths {
				_ = os.Remove(p)
			}
		}
	}()
	w := cmd.ErrOrStderr()
	for i := range f.runs {
		path := fmt.Sprintf("%s.run%d", out.Name(), i+1)
		fmt.Fprintf(w, "run %d of %d:\n", i+1, f.runs)
		err := f.recordCold(cmd, n, ref, path, *o)
		if i > 0 && cmd.Context().Err() != nil {
			_ = os.Remove(path)
			fmt.Fprintf(w, "interrupted: the %d recordings before this one are merged\n", i)
			break
		}
		paths = append(paths, path)
		if err != nil {
			return fmt.Errorf("run %d: %w", i+1, err)
		}
		t, err := tracefmt.Open(path)
		if err != nil {
			return fmt.Errorf("run %d: read back the trace: %w", i+1, err)
		}
		traces = append(traces, t)
		if cmd.Context().Err() != nil {
			break
		}
	}
	merged, agreement, err := tracefmt.Merge(traces, f.mode)
	if err != nil {
		return err
	}
	sayMerged(w, merged, agreement, f.mode)
	return node.ReplaceTrace(out.Name(), merged)
}

// recordCold records with a state directory of its own, so that nothing of the
// image is on the machine: no chunk, no index, no connection. The device, and
// with it what the kernel keeps of it, is new each time anyway.
func (f *recordFlags) recordCold(cmd *cobra.Command, n *node.Node, ref, path string, o node.RecordOptions) (err error) {
	root, err := os.MkdirTemp(n.Root(), "cold-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	cold := f.node
	cold.root = filepath.Join(root, "state")
	own, err := cold.open(cmd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, own.Close()) }()
	file, err := createTrace(path)
	if err != nil {
		return err
	}
	defer file.Close()
	o.Run.Request.ID = node.NewID()
	return recordOnce(cmd, own, ref, file, &o)
}

// sayMerged says what the recordings have in common.
func sayMerged(w io.Writer, t *tracefmt.Trace, a *tracefmt.Agreement, mode tracefmt.MergeMode) {
	fmt.Fprintf(w, "merged %d recordings (%s): %s; %.1f %% of %d extents, and %.1f %% of %s, were read in all of them\n",
		a.Runs, mode, size(t.Bytes()), percent(int64(a.ExtentsAll), int64(a.Extents)), a.Extents, percent(a.BytesAll, a.Bytes), size(a.Bytes))
}

func percent(part, all int64) float64 { return 100 * ratio(part, all) }
