package compare

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the page's parts
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"strings"
)

// A page is a report as one HTML document that needs nothing else: styles,
// scripts and data are in it, and its content security policy lets it load
// nothing and run no other script. It reads in light and dark.
//
// All strings of a page may come from hostile input: they are escaped where
// they are written. What does not print should have gone through [Printable],
// so that a reader sees it.
type page struct {
	Title   string
	Lead    string // a sentence or two below it
	Facts   []pageFact
	Notes   []string // what a reader must know before the rest
	Parts   []any    // *pageChart or *pageTable, from top to bottom
	Footer  string
	scripts []string // of tests, which run last
}

// A pageFact is a name and what it stands for.
type pageFact struct{ Name, Value string }

// A pageChart is a drawing by one of the kinds of page/page.js: "areas" draws a
// *pageAreas, "reads" a *pageReads.
type pageChart struct {
	ID    string // of the section; letters only
	Kind  string
	Title string
	About string // what it shows, and how to read it
	Label string // what it shows in figures, for those who cannot see it
	Group string // charts of a group show the same part of their horizontal axis
	Data  any    // becomes JSON
}

// A pageTable is a table that can be sorted by any column and, if it is long,
// filtered; only its first rows show until one asks for all. Without scripts
// all of it shows.
type pageTable struct {
	ID      string
	Title   string
	About   string
	Missing string // why there is nothing, or less than one would want
	Columns []pageColumn
	Rows    [][]pageCell // each as long as Columns
	More    string       // what has been left out
}

// A pageColumn heads a column.
type pageColumn struct {
	Name  string
	About string // more words, shown on demand
	// Kind is pageText, pageNumber, or pageShare for numbers behind which a bar
	// shows how they compare.
	Kind string
}

// The kinds of columns.
const (
	pageText   = "text"
	pageNumber = "number"
	pageShare  = "share"
)

// Sorted tells whether cells are sorted by their Value; others are by their
// Text.
func (c pageColumn) Sorted() bool { return c.Kind != pageText }

// A pageCell is one cell: what shows, and for numbers what it is sorted by.
type pageCell struct {
	Text  string
	Value float64
}

// A pageAxis is an axis of a chart.
type pageAxis struct {
	Name string  `json:"name"`
	Unit string  `json:"unit"` // pageBytes, pageMicros or pageCount
	Min  float64 `json:"min"`
	Max  float64 `json:"max"`
}

// The units of axes.
const (
	pageBytes  = "bytes"
	pageMicros = "us"
	pageCount  = "count"
)

// A pageMark is a moment with a name.
type pageMark struct {
	At   float64 `json:"at"`
	Name string  `json:"name"`
}

// pageAreas are lines over a common horizontal axis.
type pageAreas struct {
	X       pageAxis   `json:"x"`
	Y       pageAxis   `json:"y"`  // Min and Max follow from the lines
	At      []float64  `json:"at"` // ascending
	Lines   []pageLine `json:"lines"`
	Stacked bool       `json:"stacked"` // each on top of the one before
	Stepped bool       `json:"stepped"` // each value holds until the next
	Marks   []pageMark `json:"marks"`
}

// A pageLine has a value for each place of [pageAreas].At.
type pageLine struct {
	Name   string    `json:"name"`
	Values []float64 `json:"values"`
}

// maxPageGroups is how many colours a chart has. The last is for all others.
const maxPageGroups = 8

var (
	//go:embed page/page.html
	pageHTML string
	//go:embed page/page.css
	pageCSS string
	//go:embed page/page.js
	pageJS string
	//go:embed page/uplot/uPlot.iife.min.js
	uplotJS string
	//go:embed page/uplot/uPlot.min.css
	uplotCSS string
	//go:embed page/uplot/LICENSE
	uplotLicence string
)

var pageTemplate = template.Must(template.New("page").Parse(pageHTML))

// filledPage is what the template is given.
type filledPage struct {
	Page    *page
	Policy  string
	Styles  []template.CSS
	Scripts []template.JS
	Parts   []pagePart
}

// A pagePart is one or the other.
type pagePart struct {
	Chart *pageChart
	Table *pageTable
}

// JSON writes data for a script element: encoding/json escapes what could end
// one.
func (*filledPage) JSON(v any) (template.JS, error) {
	b, err := json.Marshal(v)
	return template.JS(b), err
}

// write writes the document.
func (p *page) write(w io.Writer) error {
	f := &filledPage{
		Page:    p,
		Styles:  []template.CSS{template.CSS(uplotCSS), template.CSS(pageCSS)},
		Scripts: []template.JS{template.JS("/*\n" + uplotLicence + "*/\n" + uplotJS), template.JS(pageJS)},
	}
	for _, s := range p.scripts {
		f.Scripts = append(f.Scripts, template.JS(s))
	}
	f.Policy = policy(f)
	for _, part := range p.Parts {
		switch part := part.(type) {
		case *pageChart:
			f.Parts = append(f.Parts, pagePart{Chart: part})
		case *pageTable:
			f.Parts = append(f.Parts, pagePart{Table: part})
		default:
			return fmt.Errorf("page: a part is a %T", part)
		}
	}
	var b bytes.Buffer // so that an error leaves nothing half written
	if err := pageTemplate.Execute(&b, f); err != nil {
		return fmt.Errorf("page: %w", err)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// policy allows the page's own styles and scripts, by their digests, and nothing
// else: no address is ever asked for anything.
func policy(f *filledPage) string {
	var styles, scripts []string
	for _, s := range f.Styles {
		styles = append(styles, sourceHash(string(s)))
	}
	for _, s := range f.Scripts {
		scripts = append(scripts, sourceHash(string(s)))
	}
	return "default-src 'none'; base-uri 'none'; form-action 'none'; style-src " + strings.Join(styles, " ") + "; script-src " + strings.Join(scripts, " ")
}

func sourceHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}
