package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
)

// perlPages is a Perl program that reads the pages, and says so of each.
const perlPages = `$| = 1; for (0..%d) { open F, "<", "/pages/$_" or die; sysread F, $b, 65536; print "page $_\n"; select undef, undef, undef, .01 }`

// perlListens is one that listens on port 8080 of the loopback device.
const perlListens = `socket S, 2, 1, 0 or die; bind S, pack "S n C4 x8", 2, 8080, 127, 0, 0, 1 or die; listen S, 5 or die; `

// untold are workloads that are recorded without a word of when to stop.
var untold = map[string]struct {
	script string
	ends   string // how the reason begins
}{
	"job":           {fmt.Sprintf(perlPages, pageCount-1), "ready: exit"},
	"service":       {fmt.Sprintf(perlPages, pageCount-1) + "; " + perlListens + "sleep 1000", "ready: "},
	"listens first": {perlListens + fmt.Sprintf(perlPages, pageCount-1) + "; sleep 1000", "ready: "},
	"never listens": {fmt.Sprintf(perlPages, pageCount-1) + "; sleep 1000", "quiet: "},
}

// A recording that is not told when to stop ends by itself, and has all that its
// workload has read to be of use; it knows the files; and a start with it, on
// a node that has nothing, reads next to nothing that it does not have.
func TestRecordUntold(t *testing.T) {
	skipWithoutRunc(t)
	if !hasTool("perl") {
		t.Skip("needs perl")
	}
	im := newPagesImage(newBench(t), "usr/bin/perl")
	t.Run("workloads", func(t *testing.T) {
		for name, w := range untold {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				b := newBench(t)
				b.loop = append(b.loop, im.addr)
				command := []string{"--", "/usr/bin/perl", "-e", w.script}
				file := b.path("trace")
				said := b.recorded(append([]string{"record", "--net", "own", "--attach", "-o", file, im.ref}, command...)...)
				tr, err := tracefmt.Open(file)
				require.NoError(t, err)
				t.Logf("%s, %s: %s", tr.End.Reason, named(tr), lastLine(said))
				require.True(t, strings.HasPrefix(tr.End.Reason, w.ends), tr.End.Reason)
				require.Empty(t, im.misses(tr, pageCount), "pages that are not in the trace")
				require.Empty(t, im.misnamed(tr), "pages without their path")
				if strings.Contains(said, "processes are not named") {
					t.Log("no eBPF: who read is not known")
				} else {
					require.Empty(t, im.notReadBy(tr, "perl"), "pages that somebody else has read")
				}

				// What was there in time depends on the machine: `make coldstart WHAT=recording`
				// measures that on a link. What another start reads does not.
				again := b.path("again")
				b.recorded(append([]string{"record", "--net", "own", "--root", b.mkdir("again.state"), "-o", again, im.ref}, command...)...)
				other, err := tracefmt.Open(again)
				require.NoError(t, err)
				d := tracefmt.Diff(tr, other)
				require.GreaterOrEqual(t, float64(d.Both)/float64(d.Both+d.OnlyB), 0.98, "of what another start reads")

				r := b.replayUntil(fmt.Sprintf("^page %d$", pageCount-1), im.ref, command...)
				t.Logf("coverage %.2f %%, accuracy %.2f %%: %s", 100*r.Start.Coverage, 100*r.Start.Accuracy, r.Explain)
				require.True(t, strings.HasPrefix(r.Explain, "used: "), r.Explain)
				require.Less(t, r.Replay.Outside, r.Replay.Need/10, "what demand fetches is in the trace")
			})
		}
	})
}

// recorded records, and gives what was said; the container's output is a part.
func (b *bench) recorded(args ...string) (said string) {
	b.t.Helper()
	r := b.run(args...)
	require.Zero(b.t, r.code, r.stderr)
	return r.stderr
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// misnamed lists those of the pages that the trace has under another name, or
// at another place of the file.
func (im *pagesImage) misnamed(t *tracefmt.Trace) []int {
	return im.without(t, func(e *tracefmt.Event, page int, off int64) bool {
		return strings.Trim(e.Path, "/") == fmt.Sprintf("pages/%d", page) && e.FileOff == off
	})
}

// notReadBy lists those of the pages that another process has read.
func (im *pagesImage) notReadBy(t *tracefmt.Trace, process string) []int {
	return im.without(t, func(e *tracefmt.Event, _ int, _ int64) bool { return e.Process == process && e.Pid > 0 })
}

// without lists the pages of which the trace has an event that is not as it
// should be. off is where in the page's file the event's bytes are.
func (im *pagesImage) without(t *tracefmt.Trace, is func(e *tracefmt.Event, page int, off int64) bool) (pages []int) {
	for page, blocks := range im.blocks {
		for i, block := range blocks {
			for _, e := range t.Events {
				overlap := e.Layer == block.Layer && e.Off < block.Off+block.Len && block.Off < e.Off+e.Len
				if overlap && !is(&e, page, int64(i*pageBlock)+e.Off-block.Off) {
					pages = append(pages, page)
				}
			}
		}
	}
	return slices.Compact(pages)
}

// replayUntil starts a container with the image's trace, on a node that has
// nothing, and ends it when a line of its output says that it is ready.
func (b *bench) replayUntil(line, ref string, command ...string) *node.Report {
	b.t.Helper()
	r, w, err := os.Pipe()
	require.NoError(b.t, err)
	defer r.Close()
	args := []string{"run", "--root", b.mkdir("replay"), "--net", "own", "--explain", "--report-fd", "3", "--ready-log", line, ref}
	cmd := b.command(append(args, command...)...)
	cmd.ExtraFiles = []*os.File{w}
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	require.NoError(b.t, cmd.Start())
	require.NoError(b.t, w.Close())
	report := new(node.Report)
	err = json.NewDecoder(r).Decode(report)
	_ = cmd.Process.Signal(unix.SIGTERM)
	_ = cmd.Wait() // with the container's status
	require.NoError(b.t, err, said.String())
	return report
}
