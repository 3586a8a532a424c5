package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/reprise-project/reprise/replayer/node"
)

func newDoctor() *cobra.Command {
	var root, hostsDir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine offers reprise, and what is missing",
		Long: `Looks at the kernel, the privileges, the programs and the directories that
reprise needs, and says what to do where something is missing. It changes
nothing. The exit status is 0 if images can be mounted here, 1 if not.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if root == "" {
				return usagef(cmd, "--root is empty")
			}
			d := examine(cmd.Context(), root, cmp.Or(hostsDir, defaultHostsDir))
			if asJSON {
				if err := printJSON(cmd, d); err != nil {
					return err
				}
			} else if err := d.print(cmd.OutOrStdout()); err != nil {
				return err
			}
			if !d.OK {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&root, "root", node.DefaultRoot, "state directory")
	cmd.Flags().StringVar(&hostsDir, "hosts-dir", "", "containerd's hosts.toml directory (default "+defaultHostsDir+")")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// grade is how much a finding matters.
type grade string

const (
	fine    grade = "ok"
	without grade = "-"    // not there, and not needed
	lacking grade = "warn" // something does not work without it
	broken  grade = "FAIL" // nothing works without it
)

// A finding is one thing that was looked at.
type finding struct {
	Group  string `json:"group"`
	Name   string `json:"name"`
	Grade  grade  `json:"grade"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
	// Survives is said of transports: whether devices outlive a killed server.
	Survives *bool `json:"survives_kill,omitempty"`
}

// diagnosis is all that was found. It is OK if images can be mounted.
type diagnosis struct {
	OK       bool      `json:"ok"`
	Version  string    `json:"version"`
	Kernel   string    `json:"kernel"`
	Findings []finding `json:"findings"`
}

func (d *diagnosis) add(f ...finding) { d.Findings = append(d.Findings, f...) }

// count is how many findings have a grade.
func (d *diagnosis) count(g grade) (n int) {
	for _, f := range d.Findings {
		if f.Grade == g {
			n++
		}
	}
	return n
}

// print writes a table. On a terminal it is as wide as that, elsewhere a finding
// is a line.
func (d *diagnosis) print(w io.Writer) error {
	t := table{w: w}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		t.width, _, _ = term.GetSize(int(f.Fd()))
		t.color = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	for _, f := range d.Findings {
		t.name = max(t.name, utf8.RuneCountInString(f.Name))
	}
	group := ""
	for _, f := range d.Findings {
		if f.Group != group {
			group = f.Group
			t.line("\n%s\n", t.bold(group))
		}
		t.finding(f)
	}
	t.line("\n%s\n", t.bold(t.fold(d.verdict(), 0)))
	return t.err
}

func (d *diagnosis) verdict() string {
	fails, warns := d.count(broken), d.count(lacking)
	switch {
	case fails > 0:
		return fmt.Sprintf("This machine cannot run reprise: see FAIL above (%d).", fails)
	case warns > 0:
		return fmt.Sprintf("This machine can run reprise; some things do not work: see warn above (%d).", warns)
	}
	return "This machine can run reprise."
}

// table prints findings.
type table struct {
	w     io.Writer
	name  int // width of the names
	width int // of the terminal; 0: do not fold
	color bool
	err   error // the first
}

func (t *table) line(format string, a ...any) {
	if t.err == nil {
		_, t.err = fmt.Fprintf(t.w, format, a...)
	}
}

func (t *table) bold(s string) string {
	if !t.color {
		return s
	}
	return "\x1b[1m" + s + "\x1b[0m"
}

// gradeWidth is that of the longest grade.
const gradeWidth = 4

func (t *table) finding(f finding) {
	mark := fmt.Sprintf("%-*s", gradeWidth, f.Grade)
	if c := map[grade]string{fine: "32", lacking: "33", broken: "31"}[f.Grade]; t.color && c != "" {
		mark = "\x1b[" + c + "m" + mark + "\x1b[0m"
	}
	indent := 2 + gradeWidth + 2 + t.name + 2
	pad := strings.Repeat(" ", t.name-utf8.RuneCountInString(f.Name))
	t.line("  %s  %s%s  %s\n", mark, f.Name, pad, t.fold(f.Detail, indent))
	if f.Remedy != "" {
		t.line("%s%s\n", strings.Repeat(" ", indent), t.fold("→ "+f.Remedy, indent))
	}
}

// fold breaks text at blanks, for the column that begins at indent.
func (t *table) fold(text string, indent int) string {
	room := t.width - indent
	if room < 20 { // nothing is gained, or the width is not known
		return text
	}
	var b strings.Builder
	col := 0
	for word := range strings.FieldsSeq(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case col == 0:
		case col+1+n > room:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			col = 0
		default:
			b.WriteByte(' ')
			col++
		}
		b.WriteString(word)
		col += n
	}
	return b.String()
}
