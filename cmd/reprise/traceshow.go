package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/compare"
	"github.com/reprise-project/reprise/tracefmt"
)

// showFlags are what trace show is asked.
type showFlags struct {
	o    compare.BreakdownOptions
	top  int
	html string
	json bool
	nf   nodeFlags
}

func newTraceShow() *cobra.Command {
	var f showFlags
	cmd := &cobra.Command{
		Use:   "show TRACE",
		Short: "Say what is in a trace: which files were read, how much, when, and by whom",
		Long: `Say what is in a trace, native or of the reference implementation: which files were
read, how much of each, when, and by which process. Without flags it is a summary;
--by gives all layers, directories, files, processes or parts of the time; --html
draws it on a page for a browser, which needs nothing else.

BYTES counts each byte once, for the first read of it; PIECES are its parts without a
gap between them. WAIT is how long the reads waited, added up: reads wait beside one
another, so it can be more than the time that passed. For a merged trace RUNS says in
what share of the recordings the bytes were read.

` + traceArgHelp,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error { return f.run(cmd, a[0]) },
	}
	fs := cmd.Flags()
	f.nf.addRegistry(cmd)
	f.nf.addPlatform(cmd)
	fs.StringVar(&f.o.By, "by", "", "break it down by layer, dir, file, process or time")
	fs.StringVar(&f.o.Sort, "sort", "", "order of the rows: bytes, first (touch), wait, reads or name (default: bytes; layers and times have their own)")
	fs.IntVar(&f.o.Depth, "depth", 0, "with --by dir, join directories below this many parts of a path (default: none)")
	fs.IntVar(&f.top, "top", 0, "how many rows of a table (default: all with --by, 5 of each in the summary)")
	fs.StringVar(&f.html, "html", "", "write a page for a browser to this new file ('-' is standard output)")
	fs.BoolVar(&f.json, "json", false, "print header, events and end as JSON; with --by, its rows")
	return cmd
}

func (f *showFlags) run(cmd *cobra.Command, name string) error {
	if err := f.check(cmd); err != nil {
		return err
	}
	t, err := f.open(cmd, name)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	switch {
	case f.html != "":
		return writeOut(cmd, f.html, func(w io.Writer) error { return compare.WriteTracePage(w, t) })
	case f.o.By != "":
		b, err := compare.NewBreakdown(t, f.o)
		if err != nil {
			return err
		}
		if f.json {
			return printJSON(cmd, f.breakdownJSON(b))
		}
		return f.print(out, b)
	case f.json:
		return printJSON(cmd, t)
	default:
		return f.summary(out, t)
	}
}

// open reads the trace. Only one beside an image needs what talks to
// registries.
func (f *showFlags) open(cmd *cobra.Command, name string) (t *tracefmt.Trace, err error) {
	if _, err := os.Stat(name); err == nil || !strings.Contains(name, "#") {
		return tracefmt.Open(name)
	}
	err = withClient(cmd, &f.nf, func(client *registry.Client) error {
		t, err = openTraceArg(cmd, client, name, f.nf.wanted())
		return err
	})
	return t, err
}

// check refuses options before anything is read.
func (f *showFlags) check(cmd *cobra.Command) error {
	switch {
	case f.html != "" && (f.json || f.o.By != ""):
		return usagef(cmd, "--html has everything: give neither --by nor --json with it")
	case f.top < 0:
		return usagef(cmd, "--top %d: cannot be negative", f.top)
	case f.o.Depth < 0:
		return usagef(cmd, "--depth %d: cannot be negative", f.o.Depth)
	case f.o.Depth > 0 && f.o.By != compare.ByDir:
		return usagef(cmd, "--depth is for --by dir")
	case f.o.By == "" && f.o.Sort != "":
		return usagef(cmd, "--sort is for --by")
	}
	if err := f.nf.checkPlatform(cmd); err != nil {
		return err
	}
	by := f.o
	by.By = cmp.Or(by.By, compare.ByLayer)
	if _, err := compare.NewBreakdown(&tracefmt.Trace{}, by); err != nil {
		return usagef(cmd, "--%v", err)
	}
	return nil
}

// summary prints what is known of the trace, its layers, and the largest of
// everything else.
func (f *showFlags) summary(w io.Writer, t *tracefmt.Trace) error {
	showHeader(w, t)
	for _, by := range []string{compare.ByLayer, compare.ByDir, compare.ByFile, compare.ByProcess} {
		b, err := compare.NewBreakdown(t, compare.BreakdownOptions{By: by})
		if err != nil {
			return err
		}
		if by == compare.ByFile && b.Missing != "" {
			continue // said of directories
		}
		short := showFlags{top: cmp.Or(f.top, 5)}
		if by == compare.ByLayer && f.top == 0 {
			short.top = 0
		}
		fmt.Fprintln(w)
		if err := short.print(w, b); err != nil {
			return err
		}
	}
	return nil
}

func showHeader(w io.Writer, t *tracefmt.Trace) {
	known := func(s string) string { return cmp.Or(compare.Printable(s), "unknown") }
	start := "unknown time"
	if !t.Start.IsZero() {
		start = t.Start.Local().Format(time.DateTime)
	}
	fmt.Fprintf(w, "image     %s\nmanifest  %s\nworkload  %s %q\nrecorded  %s by %s\n",
		known(t.Image), known(string(t.Manifest)), known(t.Workload), t.Args, start, known(t.Tool))
	if t.Runs > 1 {
		fmt.Fprintf(w, "merged    from %d recordings\n", t.Runs)
	}
	switch {
	case t.End == nil:
		fmt.Fprintf(w, "end       none: the recording was cut off\n")
	case t.End.Ready > 0:
		fmt.Fprintf(w, "end       %s, ready after %v\n", known(t.End.Reason), t.End.Ready.Round(time.Millisecond))
	default:
		fmt.Fprintf(w, "end       %s, never ready\n", known(t.End.Reason))
	}
	fmt.Fprintf(w, "reads     %d, of %d bytes (%s) in %s space\n", len(t.FirstTouch()), t.Bytes(), size(t.Bytes()), t.Space)
}

// A showColumn is a column of a table of shares.
type showColumn struct {
	head string
	cell func(*compare.Share) string
}

func showColumns(b *compare.Breakdown) []showColumn {
	columns := []showColumn{{"BYTES", func(s *compare.Share) string { return size(s.Bytes) }}}
	if b.By == compare.ByLayer {
		columns = append(columns, showColumn{"OF", func(s *compare.Share) string {
			if s.Of == 0 {
				return "?"
			}
			return size(s.Of)
		}})
	}
	columns = append(columns,
		showColumn{"PIECES", func(s *compare.Share) string { return fmt.Sprint(s.Extents) }},
		showColumn{"READS", func(s *compare.Share) string { return fmt.Sprint(s.Reads) }})
	if b.Timed {
		columns = append(columns,
			showColumn{"FIRST AT", func(s *compare.Share) string { return s.First.Round(time.Millisecond).String() }},
			showColumn{"WAIT", func(s *compare.Share) string { return s.Wait.Round(time.Millisecond).String() }})
	}
	if b.Runs > 1 {
		columns = append(columns, showColumn{"RUNS", func(s *compare.Share) string { return fmt.Sprintf("%.0f %%", 100*s.Seen) }})
	}
	return columns
}

// print writes the rows as a table, or what the trace lacks for it.
func (f *showFlags) print(w io.Writer, b *compare.Breakdown) error {
	if b.Missing != "" {
		fmt.Fprintln(w, b.Missing)
		if b.By != compare.ByLayer {
			return nil
		}
	}
	columns := showColumns(b)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, c := range columns {
		fmt.Fprintf(tw, "%s\t", c.head)
	}
	fmt.Fprintf(tw, "  %s\n", strings.ToUpper(b.By))
	rows := f.cut(b)
	for i := range rows {
		s := &rows[i]
		for _, c := range columns {
			text := c.cell(s)
			if s.Bytes == 0 && c.head != "BYTES" && c.head != "OF" {
				text = ""
			}
			fmt.Fprintf(tw, "%s\t", text)
		}
		fmt.Fprintf(tw, "  %s\n", shareName(b, s))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if n := len(b.Rows) - len(rows); n > 0 {
		fmt.Fprintf(w, "… and %d more, %s\n", n, size(sumBytes(b.Rows[len(rows):])))
	}
	return nil
}

// cut returns the first rows.
func (f *showFlags) cut(b *compare.Breakdown) []compare.Share {
	if f.top > 0 {
		return b.Rows[:min(f.top, len(b.Rows))]
	}
	return b.Rows
}

func sumBytes(rows []compare.Share) (n int64) {
	for i := range rows {
		n += rows[i].Bytes
	}
	return n
}

// shareName is what a row is of, for a terminal.
func shareName(b *compare.Breakdown, s *compare.Share) string {
	name := compare.Printable(s.Name)
	switch b.By {
	case compare.ByLayer:
		return strings.TrimSpace(name + " " + compare.Printable(string(s.Digest)))
	case compare.ByTime:
		return fmt.Sprintf("%v to %v", s.From, s.To)
	case compare.ByProcess:
		name = cmp.Or(name, "(unknown)")
		if s.Pid != 0 {
			name += fmt.Sprintf(" [%d]", s.Pid)
		}
		if s.Container != "" {
			name += " in " + compare.Printable(s.Container)
		}
		return name
	default:
		return cmp.Or(name, "(no file)")
	}
}

// showJSON is what trace show --by … --json prints.
type showJSON struct {
	By      string     `json:"by"`
	Runs    int        `json:"runs"`
	Missing string     `json:"missing,omitempty"` // what the trace does not know, and how to get it
	Rows    []shareRow `json:"rows"`
	Total   shareRow   `json:"total"` // of all rows, those that --top leaves out among them
}

// shareRow is a row of it. Times are microseconds since the recording began.
type shareRow struct {
	Name      string        `json:"name"` // empty: of no file, or of no known process
	Layer     *int          `json:"layer,omitempty"`
	Digest    digest.Digest `json:"digest,omitempty"`
	Of        int64         `json:"of_bytes,omitempty"`
	Pid       int           `json:"pid,omitempty"`
	Container string        `json:"container,omitempty"`
	From      *int64        `json:"from_us,omitempty"`
	To        *int64        `json:"to_us,omitempty"`
	Bytes     int64         `json:"bytes"`
	Extents   int           `json:"extents"`
	Reads     int           `json:"reads"`
	Files     int           `json:"files"`
	First     int64         `json:"first_us"`
	Last      int64         `json:"last_us"`
	Wait      int64         `json:"wait_us"`
	Seen      float64       `json:"seen"` // share of the runs, by bytes
}

func (f *showFlags) breakdownJSON(b *compare.Breakdown) *showJSON {
	j := &showJSON{By: b.By, Runs: b.Runs, Missing: b.Missing, Rows: []shareRow{}, Total: newShareRow(&b.Total)}
	rows := f.cut(b)
	for i := range rows {
		s := &rows[i]
		r := newShareRow(s)
		switch b.By {
		case compare.ByLayer:
			r.Layer = &s.Layer
		case compare.ByTime:
			from, to := s.From.Microseconds(), s.To.Microseconds()
			r.From, r.To = &from, &to
		}
		j.Rows = append(j.Rows, r)
	}
	return j
}

func newShareRow(s *compare.Share) shareRow {
	return shareRow{
		Name: s.Name, Digest: s.Digest, Of: s.Of, Pid: s.Pid, Container: s.Container,
		Bytes: s.Bytes, Extents: s.Extents, Reads: s.Reads, Files: s.Files,
		First: s.First.Microseconds(), Last: s.Last.Microseconds(), Wait: s.Wait.Microseconds(), Seen: s.Seen,
	}
}
