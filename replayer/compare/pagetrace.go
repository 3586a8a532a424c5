package compare

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/reprise-project/reprise/tracefmt"
)

// What keeps the page of a large trace small, and quick to draw.
const (
	maxPageReads = 8000 // marks of the drawing of reads; more are joined
	maxPageRows  = 1000 // of a table
	maxPageName  = 500  // bytes of a name in a table
	maxMarkName  = 200  // and beside a mark
	pageSteps    = 300  // parts of the time in the other drawings
)

// WriteTracePage writes what is in a trace as one HTML document that needs
// nothing else: reads over time and place, bytes and waits over time, and
// tables of layers, directories, files and processes. The document's size is
// bounded, whatever the trace; what is joined or left out in it is said there.
func WriteTracePage(w io.Writer, t *tracefmt.Trace) error {
	p, err := newTracePage(t)
	if err != nil {
		return err
	}
	return p.write(w)
}

func newTracePage(t *tracefmt.Trace) (*page, error) {
	first := t.FirstTouch()
	b := &traceView{t: t, first: first, timed: timed(t)}
	b.x, b.dims = b.axis(), b.known()
	p := &page{Title: b.title(), Lead: b.lead(), Facts: b.facts(), Notes: b.notes(), Footer: "Written by 'reprise trace show --html'."}
	if t.Tool != "" {
		p.Footer = fmt.Sprintf("Trace recorded by %s. %s", pageName(t.Tool, maxMarkName), p.Footer)
	}
	if len(first) > 0 {
		p.Parts = append(p.Parts, b.reads(), b.bytes())
		if b.waited() {
			p.Parts = append(p.Parts, b.waits())
		}
	}
	for _, by := range []string{ByFile, ByDir, ByProcess, ByLayer} {
		table, err := b.table(by)
		if err != nil {
			return nil, err
		}
		if by == ByDir && len(table.Rows) == 0 {
			continue // that of files has said why
		}
		p.Parts = append(p.Parts, table)
	}
	return p, nil
}

// A traceView is a trace on its way to a page.
type traceView struct {
	t     *tracefmt.Trace
	first []tracefmt.Event
	timed bool
	x     pageAxis
	dims  []pageDim
}

// at is the place of a read on the horizontal axis: its time or, without
// times, its number.
func (b *traceView) at(i int) int64 {
	if b.timed {
		return b.first[i].At.Microseconds()
	}
	return int64(i + 1)
}

func (b *traceView) axis() pageAxis {
	if !b.timed {
		return pageAxis{Name: "number of the read", Unit: pageCount, Max: float64(len(b.first) + 1)}
	}
	var end time.Duration
	for i := range b.first {
		end = max(end, satAdd(b.first[i].At, b.first[i].Wait))
	}
	if b.t.End != nil {
		end = max(end, b.t.End.Ready)
	}
	return pageAxis{Name: "time since the recording began", Unit: pageMicros, Max: max(float64(end.Microseconds())*1.02, 1)}
}

func (b *traceView) title() string {
	name := cmp.Or(b.t.Workload, b.t.Image, "a start")
	return "What " + pageName(name, maxMarkName) + " read"
}

func (b *traceView) lead() string {
	var bytes int64
	for i := range b.first {
		bytes = satAdd(bytes, b.first[i].Len)
	}
	s := fmt.Sprintf("This start read %s", pageSize(bytes))
	if of := decoded(b.t); of > 0 {
		s += fmt.Sprintf(" of the image's %s (%.2g %%)", pageSize(of), 100*float64(bytes)/float64(of))
	}
	if e := b.t.End; e != nil && e.Ready > 0 {
		s += fmt.Sprintf(", and was ready after %s", pageTime(e.Ready))
	}
	return s + "."
}

// decoded is the sum of all layers, 0 if one is not known.
func decoded(t *tracefmt.Trace) (sum int64) {
	for _, l := range t.Layers {
		if l.Decoded <= 0 {
			return 0
		}
		sum = satAdd(sum, l.Decoded)
	}
	return sum
}

func (b *traceView) facts() []pageFact {
	t := b.t
	facts := []pageFact{
		{"Image", t.Image}, {"Workload", t.Workload}, {"Command", strings.Join(quoted(t.Args), " ")},
		{"Manifest", string(t.Manifest)}, {"Platform", t.Platform},
	}
	if !t.Start.IsZero() {
		facts = append(facts, pageFact{"Recorded", t.Start.UTC().Format(time.DateTime) + " UTC"})
	}
	if t.Runs > 1 {
		facts = append(facts, pageFact{"Merged from", fmt.Sprintf("%d recordings", t.Runs)})
	}
	if t.End != nil {
		facts = append(facts, pageFact{"Ended because", t.End.Reason})
		if t.End.Ready > 0 {
			facts = append(facts, pageFact{"Ready after", pageTime(t.End.Ready)})
		}
	}
	if t.ReadAhead > 0 {
		facts = append(facts, pageFact{"Device's read-ahead", pageSize(t.ReadAhead)})
	}
	facts = slices.DeleteFunc(facts, func(f pageFact) bool { return f.Value == "" })
	for i := range facts {
		if facts[i].Name != "Command" {
			facts[i].Value = Printable(facts[i].Value)
		}
		facts[i].Value = tail(facts[i].Value, 4*maxPageName)
	}
	return facts
}

// quoted returns arguments so that a reader sees where each ends: as strings
// of Go where they are not plain words.
func quoted(args []string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		if out[i] = a; a == "" || strings.ContainsAny(a, " \"'`") || Printable(a) != a {
			out[i] = strconv.Quote(a)
		}
	}
	return out
}

func (b *traceView) notes() (notes []string) {
	if b.t.End == nil && b.timed {
		notes = append(notes, "The recording was cut off: it has no end, so it is not known whether the workload became ready.")
	}
	if !b.timed {
		notes = append(notes, missingTimes)
	}
	if b.t.Space == tracefmt.DeviceSpace {
		notes = append(notes, missingLayers)
	}
	return notes
}

func (b *traceView) marks() []pageMark {
	if e := b.t.End; b.timed && e != nil && e.Ready > 0 {
		return []pageMark{{At: float64(e.Ready.Microseconds()), Name: "ready"}}
	}
	return []pageMark{}
}

func (b *traceView) waited() bool {
	return slices.ContainsFunc(b.first, func(e tracefmt.Event) bool { return e.Wait > 0 })
}

// steps are the places at which the drawings over time have values.
func (b *traceView) steps() []float64 {
	at := make([]float64, pageSteps+1)
	for i := range at {
		at[i] = b.x.Max * float64(i) / pageSteps
	}
	return at
}

// bytes draws how many bytes had been read at each time.
func (b *traceView) bytes() *pageChart {
	dim := b.dims[0]
	d := &pageAreas{X: b.x, Y: pageAxis{Name: "bytes read so far", Unit: pageBytes}, At: b.steps(), Stacked: true, Marks: b.marks()}
	for _, name := range dim.Names {
		d.Lines = append(d.Lines, pageLine{Name: name, Values: make([]float64, len(d.At))})
	}
	for i := range b.first {
		step := min(int(float64(b.at(i))/b.x.Max*pageSteps)+1, pageSteps)
		d.Lines[dim.group[i]].Values[step] += float64(b.first[i].Len)
	}
	for _, l := range d.Lines {
		for i := 1; i < len(l.Values); i++ {
			l.Values[i] += l.Values[i-1]
		}
	}
	about := "How many bytes had been read by then, each counted once."
	if len(dim.Names) > 1 {
		about += " The areas, one on top of another, show the " + dim.Name + " that they belong to."
	}
	return &pageChart{
		ID: "bytes", Kind: "areas", Group: "time", Title: "Bytes read so far", About: about, Data: d,
		Label: "Drawing of the bytes that had been read by each moment. " + b.lead(),
	}
}

// waits draws how many reads were waiting at each time, on average over each
// step.
func (b *traceView) waits() *pageChart {
	d := &pageAreas{X: b.x, Y: pageAxis{Name: "reads that wait", Unit: pageCount}, At: b.steps(), Stepped: true, Marks: b.marks()}
	busy := make([]float64, len(d.At))  // of a step, what of its time was waited
	whole := make([]float64, len(d.At)) // what begins, less what ends, with whole steps
	width := b.x.Max / pageSteps
	var sum time.Duration
	for i := range b.first {
		e := &b.first[i]
		if i > 0 && sameRead(e, &b.first[i-1]) {
			continue
		}
		sum = satAdd(sum, e.Wait)
		from, to := float64(e.At.Microseconds())/width, float64(satAdd(e.At, e.Wait).Microseconds())/width
		f, l := min(int(from), pageSteps-1), min(int(to), pageSteps-1)
		if f == l {
			busy[f] += to - from
			continue
		}
		busy[f] += float64(f+1) - from
		busy[l] += to - float64(l)
		whole[f+1]++
		whole[l]--
	}
	values := make([]float64, len(d.At))
	for i, n := 0, 0.0; i < len(values); i++ {
		n += whole[i]
		values[i] = n + busy[i]
	}
	d.Lines = []pageLine{{Name: "waiting", Values: values}}
	return &pageChart{
		ID: "waits", Kind: "areas", Group: "time", Title: "Reads that wait, over time", Data: d,
		About: fmt.Sprintf("How many reads were waiting for their bytes, on average over each %s. All waits together are %s; reads wait beside one another, so that can be more than the time that passed.",
			b.along(width), pageTime(sum)),
		Label: "Drawing of how many reads were waiting at each moment. All waits together are " + pageTime(sum) + ".",
	}
}

// pageSize prints bytes.
func pageSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	for f >= 1024 && unit < 5 {
		f /= 1024
		unit++
	}
	return strconv.FormatFloat(f, 'g', 4, 64) + " " + "KMGTPE"[unit:unit+1] + "iB"
}

// pageTime prints a time.
func pageTime(d time.Duration) string {
	switch {
	case d == 0:
		return "0 s"
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%.4g ms", float64(d)/1e6)
	default:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
}
