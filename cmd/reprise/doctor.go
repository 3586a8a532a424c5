package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

func newDoctor() *cobra.Command {
	var x examination
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [REF]",
		Short: "Say what this machine offers reprise, and what is missing",
		Long: `Looks at the kernel, the privileges, the programs and the directories that
reprise needs, and at containerd's way to 'reprise daemon', and says what to do
where something is missing. With REF it also asks that image's registry, and each
of its mirrors: whether it can be reached, as whom, and what it can do. It changes
nothing. The exit status is 0 if images, and REF, can be mounted here, 1 if not.`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if len(a) > 0 {
				x.ref = a[0]
			}
			configured := x.configure(cmd)
			if err := x.check(cmd); err != nil {
				return err
			}
			d := x.examine(cmd.Context(), configured)
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
	x.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// An examination is what is to be looked at.
type examination struct {
	nodeFlags // root, and those of the registry
	ctrd      ctrdFlags
	config    string // the daemon's
	ref       string // empty for none
}

func (x *examination) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&x.root, "root", node.DefaultRoot, "state directory")
	addConfig(cmd, &x.config)
	x.addRegistry(cmd)
	fs.StringVar(&x.ctrd.address, "address", defaultCtrdSocket, "containerd's socket")
	fs.StringVar(&x.ctrd.config, "containerd-config", defaultCtrdConfig, "containerd's configuration")
	fs.StringVar(&x.ctrd.snapshotter, "snapshotter", snapshotter.DefaultName, "name of the snapshotter in it")
}

// configure takes what the command line does not say from the daemon's
// configuration, and says what is wrong with that.
func (x *examination) configure(cmd *cobra.Command) finding {
	f := finding{Group: groupNode, Name: "daemon config", Grade: fine}
	c, err := loadConfig(x.config)
	if err == nil {
		f.Detail = c.path
		asConfigured(cmd, c)
		err = checkConfig(x.config)
	}
	switch {
	case errors.Is(err, os.ErrPermission) && os.Geteuid() != 0:
		f.Grade, f.Detail = without, err.Error()
	case err != nil:
		f.Grade, f.Detail = lacking, err.Error()
		f.Remedy = "correct it: the daemon does not start with it; 'reprise daemon config' prints all keys"
	case !exists(c.path):
		f.Grade, f.Detail = without, "no "+c.path+": the daemon has its defaults"
	}
	return f
}

// asConfigured sets those flags that were not given and that the daemon's
// configuration has.
func asConfigured(cmd *cobra.Command, c *config) {
	set := func(flag, value string) {
		if f := cmd.Flags().Lookup(flag); f != nil && !f.Changed && value != "" {
			_ = f.Value.Set(value) // nothing is wrong with a string, nor with true
		}
	}
	for flag, value := range map[string]*string{
		"root": c.Root, "hosts-dir": c.Registry.HostsDir, "address": c.Containerd.Address,
	} {
		if value != nil {
			set(flag, *value)
		}
	}
	if c.Registry.PlainHTTP != nil && *c.Registry.PlainHTTP {
		set("plain-http", "true")
	}
}

// check finds what is wrong with the flags themselves.
func (x *examination) check(cmd *cobra.Command) error {
	if x.root == "" {
		return usagef(cmd, "--root is empty")
	}
	if _, err := registry.ParseReference(x.ref); x.ref != "" && err != nil {
		return usagef(cmd, "%v", err)
	}
	return nil
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
	Ref      string    `json:"ref,omitempty"` // that was asked about
	Kernel   string    `json:"kernel"`
	Findings []finding `json:"findings"`
}

func (d *diagnosis) add(f ...finding) { d.Findings = append(d.Findings, f...) }

// count is how many findings have a grade, of those about REF or of the others.
func (d *diagnosis) count(g grade, ref bool) (n int) {
	for _, f := range d.Findings {
		if f.Grade == g && ref == strings.HasPrefix(f.Group, groupRegistry) {
			n++
		}
	}
	return n
}

// print writes a table. On a terminal it is as wide as that, elsewhere a finding
// is a line.
func (d *diagnosis) print(w io.Writer) error {
	t := newTable(w)
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
	t.line("\n")
	for _, v := range d.verdict() {
		t.line("%s\n", t.bold(t.fold(v, 0)))
	}
	return t.err
}

// verdict is a line about the machine and, if it was asked for, one about REF.
func (d *diagnosis) verdict() (lines []string) {
	fails, warns := d.count(broken, false), d.count(lacking, false)
	switch {
	case fails > 0:
		lines = append(lines, fmt.Sprintf("This machine cannot run reprise: see FAIL above (%d).", fails))
	case warns > 0:
		lines = append(lines, fmt.Sprintf("This machine can run reprise; some things do not work: see warn above (%d).", warns))
	default:
		lines = append(lines, "This machine can run reprise.")
	}
	fails, warns = d.count(broken, true), d.count(lacking, true)
	switch {
	case d.Ref == "":
	case fails > 0:
		lines = append(lines, fmt.Sprintf("%s cannot be loaded: see FAIL above (%d).", d.Ref, fails))
	case warns > 0:
		lines = append(lines, fmt.Sprintf("%s can be loaded; some things do not work: see warn above (%d).", d.Ref, warns))
	default:
		lines = append(lines, d.Ref+" can be loaded.")
	}
	return lines
}

// table prints findings, and what ps lists.
type table struct {
	w     io.Writer
	name  int // width of the names
	width int // of the terminal; 0: do not fold
	color bool
	err   error // the first
}

// newTable is for w, in colour and as wide as it is if that is a terminal.
func newTable(w io.Writer) *table {
	t := &table{w: w}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		t.width, _, _ = term.GetSize(int(f.Fd()))
		t.color = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	return t
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
	for i, line := range f.remedyLines() {
		mark := "  "
		if i == 0 {
			mark = "→ "
		}
		t.line("%s%s%s\n", strings.Repeat(" ", indent), mark, t.fold(line, indent+2))
	}
}

// remedyLines are those of the remedy: words, and, further in, what is to be
// written somewhere.
func (f *finding) remedyLines() []string {
	if f.Remedy == "" {
		return nil
	}
	return strings.Split(f.Remedy, "\n")
}

// fold breaks text at blanks, for the column that begins at indent.
func (t *table) fold(text string, indent int) string {
	room := t.width - indent
	if room < 20 || strings.HasPrefix(text, " ") { // nothing is gained, the width is not known, or not words
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
