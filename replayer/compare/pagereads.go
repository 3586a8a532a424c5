package compare

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/reprise-project/reprise/tracefmt"
)

// A pageDim is a property of reads that colours tell apart.
type pageDim struct {
	Name  string   `json:"name"`
	Names []string `json:"names"` // at most maxPageGroups
	Of    []int    `json:"of"`    // of each mark, the place in Names

	group []int // of each event
}

// known are the properties that the trace knows, at least one.
func (b *traceView) known() []pageDim {
	dims := []pageDim{b.dim("process", func(e *tracefmt.Event) string { return e.Process })}
	dims = append(dims,
		b.dim("layer", func(e *tracefmt.Event) string { return "layer " + strconv.Itoa(e.Layer) }),
		b.dim("directory", func(e *tracefmt.Event) string { return directory(e.Path, 2) }),
		b.dim("where the bytes came from", func(e *tracefmt.Event) string { return origins[min(int(e.Origin), len(origins)-1)] }))
	dims = slices.DeleteFunc(dims, func(d pageDim) bool {
		return len(d.Names) < 2 && (d.Name != "process" || slices.Contains(d.Names, notKnown))
	})
	if len(dims) > 0 {
		return dims
	}
	return []pageDim{b.dim("reads", func(*tracefmt.Event) string { return "reads" })}
}

const notKnown = "not known"

// origins are the values of tracefmt.Event.Origin (FORMAT.md), in words.
var origins = []string{"a local file", "the cache", "the cache, by a prefetch", "a fetch under way", "a fetch of its own", notKnown}

// dim groups reads by a name; those with the most bytes have a group of their
// own.
func (b *traceView) dim(name string, of func(*tracefmt.Event) string) pageDim {
	bytes := map[string]int64{}
	names := make([]string, len(b.first))
	var order []string
	for i := range b.first {
		n := cmp.Or(of(&b.first[i]), notKnown)
		names[i] = n
		if _, ok := bytes[n]; !ok {
			order = append(order, n)
		}
		bytes[n] = satAdd(bytes[n], b.first[i].Len)
	}
	slices.SortStableFunc(order, func(x, y string) int { return cmp.Compare(bytes[y], bytes[x]) })
	d := pageDim{Name: name, Names: slices.Clone(order), group: make([]int, len(names))}
	if len(order) > maxPageGroups {
		d.Names = append(order[:maxPageGroups-1:maxPageGroups-1], fmt.Sprintf("%d others", len(order)-maxPageGroups+1))
	}
	places := map[string]int{}
	for i, n := range order {
		places[n] = min(i, len(d.Names)-1)
	}
	for i, n := range names {
		d.group[i] = places[n]
	}
	for i := range d.Names {
		d.Names[i] = pageName(d.Names[i], maxMarkName)
	}
	return d
}

// pageReads draws reads over time and place: each mark is one, or several that
// lie close together. What is of each mark is in a slice.
type pageReads struct {
	X      pageAxis   `json:"x"`
	Y      pageAxis   `json:"y"`
	Tall   bool       `json:"tall"`
	Height float64    `json:"height"`
	Bands  []pageBand `json:"bands"` // from bottom to top
	Marks  []pageMark `json:"marks"`
	Dims   []pageDim  `json:"dims"`
	Paths  []string   `json:"paths"`

	T  []int64   `json:"t"`  // place on the horizontal axis
	W  []int64   `json:"w"`  // and its length
	Y0 []float64 `json:"y0"` // place on the vertical axis, bytes
	H  []int64   `json:"h"`  // from its first to its last byte
	N  []int     `json:"n"`  // reads
	B  []int64   `json:"b"`  // bytes
	P  []int     `json:"p"`  // in Paths; absent if there are none
}

// A pageBand is a layer's place on the vertical axis, bytes.
type pageBand struct {
	Name string  `json:"name"`
	At   float64 `json:"at"`
	Size float64 `json:"size"`
}

func (b *traceView) reads() *pageChart {
	d := &pageReads{X: b.x, Y: pageAxis{Name: "place on the device", Unit: pageBytes}, Tall: true, Bands: b.bands(), Marks: b.marks(), Dims: slices.Clone(b.dims)}
	last := d.Bands[len(d.Bands)-1]
	d.Height = last.At + last.Size
	cells, cell := b.cells(d)
	names := newPathNames(b.first)
	for _, c := range cells {
		b.mark(d, c, names)
	}
	d.Paths = names.list
	across := "when it began and how long it waited"
	if !b.timed {
		across = "in which order it came"
	}
	about := "Each mark is a read: from left to right " + across + ", from bottom to top where on the device it lies; " +
		"the layers of the image are stacked, the bottom one below. Point at a mark to see more of it. Drag over a part to enlarge it, double-click to go back."
	if cell != "" {
		about += " " + cell
	}
	title := "Reads, by time and place"
	if !b.timed {
		title = "Reads, by order and place"
	}
	return &pageChart{
		ID: "reads", Kind: "reads", Group: "time", Title: title, About: about, Data: d,
		Label: fmt.Sprintf("Drawing of %d reads over time and place. The tables below have the same in figures.", len(b.first)),
	}
}

// bands stacks the layers.
func (b *traceView) bands() []pageBand {
	n := len(b.t.Layers)
	ends := make([]int64, max(n, 1))
	for i := range b.t.Layers {
		ends[i] = b.t.Layers[i].Decoded
	}
	for i := range b.first {
		e := &b.first[i]
		for len(ends) <= e.Layer {
			ends = append(ends, 0)
		}
		ends[e.Layer] = max(ends[e.Layer], e.Off+e.Len)
	}
	bands := make([]pageBand, len(ends))
	at := 0.0
	for i, end := range ends {
		bands[i] = pageBand{Name: "layer " + strconv.Itoa(i), At: at, Size: float64(end)}
		at += float64(end)
	}
	if b.t.Space == tracefmt.DeviceSpace {
		bands = bands[:1]
	}
	return bands
}

// A readCell is where reads are joined to one mark.
type readCell struct {
	layer, group int
	t, y         int64
}

// cells returns the events of each mark, and says how they were joined, if
// they were: those that lie in the same small part of the time and of the
// device, of the same layer and group.
func (b *traceView) cells(d *pageReads) (cells [][]int, said string) {
	if len(b.first) <= maxPageReads {
		for i := range b.first {
			cells = append(cells, []int{i})
		}
		return cells, ""
	}
	for columns := 1024.0; ; columns *= 0.8 {
		width, height := max(b.x.Max/columns, 1), max(d.Height/columns, 1)
		index := map[readCell]int{}
		cells = cells[:0]
		for i := range b.first {
			e := &b.first[i]
			k := readCell{e.Layer, d.Dims[0].group[i], int64(float64(b.at(i)) / width), int64(float64(e.Off) / height)}
			n, ok := index[k]
			if !ok {
				n = len(cells)
				index[k] = n
				cells = append(cells, nil)
			}
			cells[n] = append(cells[n], i)
		}
		if len(cells) <= maxPageReads || columns < 1 {
			return cells, fmt.Sprintf("So that this page stays small, the trace's %d reads are drawn as %d marks: each joins what lies within %s and %s.",
				len(b.first), len(cells), b.along(width), pageSize(int64(height)))
		}
	}
}

// along prints a length on the horizontal axis.
func (b *traceView) along(v float64) string {
	if !b.timed {
		return fmt.Sprintf("%.0f reads", v)
	}
	return pageTime(time.Duration(v) * time.Microsecond)
}

// mark adds the mark of some events; for what they differ in the first stands.
func (b *traceView) mark(d *pageReads, events []int, names *pathNames) {
	i := events[0]
	e := &b.first[i]
	lo, hi, until := e.Off, e.Off+e.Len, b.at(i)
	var bytes int64
	for _, j := range events {
		o := &b.first[j]
		lo, hi = min(lo, o.Off), max(hi, o.Off+o.Len)
		until = max(until, satAdd(b.at(j), o.Wait.Microseconds()))
		bytes = satAdd(bytes, o.Len)
	}
	d.T = append(d.T, b.at(i))
	d.W = append(d.W, until-b.at(i))
	d.Y0 = append(d.Y0, d.Bands[e.Layer].At+float64(lo))
	d.H = append(d.H, hi-lo)
	d.N = append(d.N, len(events))
	d.B = append(d.B, bytes)
	if names.any {
		d.P = append(d.P, names.of(e.Path, len(events) > 1))
	}
	for k := range d.Dims {
		d.Dims[k].Of = append(d.Dims[k].Of, d.Dims[k].group[i])
	}
}

// pathNames numbers the names that marks show.
type pathNames struct {
	any   bool
	list  []string
	place map[string]int
}

func newPathNames(first []tracefmt.Event) *pathNames {
	n := &pathNames{list: []string{}, place: map[string]int{}}
	n.any = slices.ContainsFunc(first, func(e tracefmt.Event) bool { return e.Path != "" })
	return n
}

// pageName is a name for a page, of which the end shows if it is longer than
// some n bytes: of a path that tells most.
func pageName(s string, n int) string {
	return tail(Printable(tail(s, n)), n)
}

// tail is the last n bytes of s, roughly.
func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	i := len(s) - n
	for i < len(s) && !utf8.RuneStart(s[i]) {
		i++
	}
	return "…" + s[i:]
}

// of returns the number of a file's name; of several files it is that of
// their directory.
func (n *pathNames) of(p string, several bool) int {
	name := notAFile
	switch {
	case p != "" && several:
		name = pageName(path.Dir(p), maxMarkName) + "/…"
	case p != "":
		name = pageName(p, maxMarkName)
	}
	i, ok := n.place[name]
	if !ok {
		i = len(n.list)
		n.place[name] = i
		n.list = append(n.list, name)
	}
	return i
}
