package compare

import (
	"cmp"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/tracefmt"
)

// What a trace is broken down by: the values of [BreakdownOptions.By].
const (
	ByLayer   = "layer"
	ByDir     = "dir"
	ByFile    = "file"
	ByProcess = "process"
	ByTime    = "time"
)

// The orders of rows: the values of [BreakdownOptions.Sort].
const (
	SortBytes = "bytes" // most first
	SortFirst = "first" // earliest first
	SortWait  = "wait"  // longest first
	SortReads = "reads" // most first
	SortName  = "name"
)

// BreakdownOptions say what a trace is broken down by, and in which order.
type BreakdownOptions struct {
	By string // one of the By constants
	// Sort is one of the Sort constants. By default layers and times are in
	// their own order, all else in that of bytes.
	Sort string
	// Depth joins directories below this many parts of a path; 0 joins none.
	Depth int
}

// A Breakdown says how the bytes that a trace has read divide among layers,
// directories, files, processes or parts of the time. Bytes that were read
// more than once count for the first who did.
type Breakdown struct {
	By    string
	Rows  []Share
	Total Share // of all rows
	// Missing says what the trace does not know, and how to get it. Rows is
	// empty, or has one row without a name.
	Missing string
	Runs    int  // recordings that were merged, at least 1
	Timed   bool // whether the trace knows times

	step time.Duration // by time: the length of a row
}

// A Share is a row of a [Breakdown]. Times are since the start of the
// recording.
type Share struct {
	// Name is a path, a process, a layer's number or a time; as the trace has
	// it, so not fit for printing (see [Printable]). It is empty for what
	// belongs to none: the file system's own blocks among files, for instance.
	Name      string
	Layer     int           // by layer: its number, the bottom is 0
	Digest    digest.Digest // by layer: of the blob; may be empty
	Of        int64         // by layer: its bytes, uncompressed; 0 unknown
	Pid       int           // by process: as the host counts; 0 unknown
	Container string        // by process; empty unknown
	From, To  time.Duration // by time: the part of the time

	Bytes   int64
	Extents int // pieces without a gap, in the space of the trace
	Reads   int // that reached it
	Files   int // by directory, layer or process: files that were read
	// First and Last are when the first and the last of its bytes were read.
	First, Last time.Duration
	// Wait is how long its reads waited, one beside another, so that it can
	// exceed the time that passed.
	Wait time.Duration
	// Seen is the share of the merged recordings that its bytes were in, by
	// bytes, from 0 to 1.
	Seen float64
}

// NewBreakdown breaks a trace down. It fails only for options that are not
// among the constants.
func NewBreakdown(t *tracefmt.Trace, o BreakdownOptions) (*Breakdown, error) {
	return breakDown(t, t.FirstTouch(), o)
}

// breakDown does so for a trace whose first touches are known.
func breakDown(t *tracefmt.Trace, first []tracefmt.Event, o BreakdownOptions) (*Breakdown, error) {
	b := &Breakdown{By: o.By, Runs: max(t.Runs, 1), Timed: timed(t)}
	key, err := b.keys(t, first, o)
	if err != nil {
		return nil, err
	}
	order, err := sharesBy(o)
	if err != nil {
		return nil, err
	}
	c := newShareCounter(t)
	b.emptyRows(c, t, first)
	for i := range first {
		c.add(key(&first[i]), &first[i])
	}
	b.Rows, b.Total = c.finish(first)
	for i := range b.Rows {
		b.describe(t, &b.Rows[i])
	}
	slices.SortStableFunc(b.Rows, order)
	return b, nil
}

// emptyRows adds the rows that show even if nothing was read of them.
func (b *Breakdown) emptyRows(c *shareCounter, t *tracefmt.Trace, first []tracefmt.Event) {
	switch {
	case b.Missing != "":
	case b.By == ByLayer:
		for i := range t.Layers {
			c.group(shareKey{layer: i})
		}
	case b.By == ByTime:
		for at := time.Duration(0); at <= lastAt(first) && at >= 0; at += b.step {
			c.group(shareKey{from: at})
		}
	}
}

// A shareKey is what the events of a row have in common.
type shareKey struct {
	name, container string
	pid, layer      int
	from            time.Duration
}

// keys returns what tells the row of an event, and says what the trace lacks.
func (b *Breakdown) keys(t *tracefmt.Trace, first []tracefmt.Event, o BreakdownOptions) (func(*tracefmt.Event) shareKey, error) {
	switch o.By {
	case ByLayer:
		if t.Space == tracefmt.DeviceSpace {
			b.Missing = missingLayers
		}
		return func(e *tracefmt.Event) shareKey { return shareKey{layer: e.Layer} }, nil
	case ByDir, ByFile:
		if !slices.ContainsFunc(first, func(e tracefmt.Event) bool { return e.Path != "" }) {
			b.Missing = missingPaths
		}
		if o.By == ByFile {
			return func(e *tracefmt.Event) shareKey { return shareKey{name: e.Path} }, nil
		}
		return func(e *tracefmt.Event) shareKey { return shareKey{name: directory(e.Path, o.Depth)} }, nil
	case ByProcess:
		if !slices.ContainsFunc(first, func(e tracefmt.Event) bool { return e.Process != "" || e.Pid != 0 }) {
			b.Missing = missingProcesses
		}
		merged := b.Runs > 1 // the numbers of processes mean nothing beyond their run
		return func(e *tracefmt.Event) shareKey {
			k := shareKey{name: e.Process, container: e.Container, pid: e.Pid}
			if merged {
				k.container, k.pid = "", 0
			}
			return k
		}, nil
	case ByTime:
		if !b.Timed {
			b.Missing = missingTimes
		}
		b.step = timeStep(lastAt(first))
		return func(e *tracefmt.Event) shareKey { return shareKey{from: e.At / b.step * b.step} }, nil
	default:
		return nil, fmt.Errorf("by %q: not one of %s, %s, %s, %s, %s", o.By, ByLayer, ByDir, ByFile, ByProcess, ByTime)
	}
}

const (
	missingPaths = "This trace does not say which files its reads belong to: it is of another program or an earlier version, or was cut off. " +
		"'reprise record' finds that out when a recording ends, and 'reprise attach' for traces that lack it."
	missingProcesses = "This trace does not say which processes read. 'reprise record' learns that by eBPF, which needs root and a kernel with BTF: " +
		"'reprise doctor' tells whether this machine has them."
	missingLayers = "This trace is of a device: its offsets are not those of layers. 'reprise record --device' gives layers when it is told the image."
	missingTimes  = "This trace has an order, but no times: the format of the reference implementation has none. " +
		"A recording by 'reprise record' has them."
)

func directory(p string, depth int) string {
	if p == "" {
		return ""
	}
	dir := path.Dir(p)
	if depth <= 0 {
		return dir
	}
	at := 0
	if strings.HasPrefix(dir, "/") {
		at = 1
	}
	for range depth {
		i := strings.IndexByte(dir[min(at, len(dir)):], '/')
		if i < 0 {
			return dir
		}
		at += i + 1
	}
	return dir[:at-1]
}

// timed tells whether a trace knows when its reads were.
func timed(t *tracefmt.Trace) bool {
	return len(t.Events) == 0 || !t.Start.IsZero() || slices.ContainsFunc(t.Events, func(e tracefmt.Event) bool { return e.At > 0 })
}

// lastAt is when the last read was; events are in order of time.
func lastAt(events []tracefmt.Event) time.Duration {
	if len(events) == 0 {
		return 0
	}
	return events[len(events)-1].At
}

// timeStep returns a round length of which at most 40 begin within d.
func timeStep(d time.Duration) time.Duration {
	step := time.Millisecond
	for {
		for _, by := range []time.Duration{1, 2, 5} {
			if d/40 < step*by {
				return step * by
			}
		}
		step *= 10
	}
}

// satAdd adds what is not negative; input can make sums overflow.
func satAdd[T ~int64](a, b T) T {
	if s := a + b; s >= 0 {
		return s
	}
	return math.MaxInt64
}

// A shareCounter sums events up.
type shareCounter struct {
	t      *tracefmt.Trace
	shares []Share
	groups map[shareKey]int
	rows   []int // of each event, its share
	files  map[shareFile]bool
	last   []tracefmt.Event // of each share
	all    tracefmt.Event   // the last event of all
	hits   []float64        // of each share, bytes × hits
	total  Share
}

// A shareFile is a file that a share has; the share is -1 for the total.
type shareFile struct {
	share int
	path  string
}

func newShareCounter(t *tracefmt.Trace) *shareCounter {
	return &shareCounter{t: t, groups: map[shareKey]int{}, files: map[shareFile]bool{}}
}

// group returns the share of a key.
func (c *shareCounter) group(k shareKey) int {
	i, ok := c.groups[k]
	if !ok {
		i = len(c.shares)
		c.groups[k] = i
		c.shares = append(c.shares, Share{Name: k.name, Layer: k.layer, Pid: k.pid, Container: k.container, From: k.from})
		c.last = append(c.last, tracefmt.Event{})
		c.hits = append(c.hits, 0)
	}
	return i
}

// add counts the parts of one read, which follow each other, as one.
func (c *shareCounter) add(k shareKey, e *tracefmt.Event) {
	i := c.group(k)
	s := &c.shares[i]
	s.count(e, &c.last[i])
	c.total.count(e, &c.all)
	c.hits[i] += float64(e.Len) * float64(max(e.Hits, 1))
	s.Files += c.newFile(i, e.Path)
	c.total.Files += c.newFile(-1, e.Path)
	c.last[i], c.all = *e, *e
	c.rows = append(c.rows, i)
}

// newFile returns 1 for a file that the share has not had.
func (c *shareCounter) newFile(share int, path string) int {
	k := shareFile{share, path}
	if path == "" || c.files[k] {
		return 0
	}
	c.files[k] = true
	return 1
}

func (s *Share) count(e, last *tracefmt.Event) {
	if s.Bytes == 0 {
		s.First = e.At
	}
	s.Last = max(s.Last, e.At)
	s.Bytes = satAdd(s.Bytes, e.Len)
	if s.Reads == 0 || !sameRead(e, last) {
		s.Reads++
		s.Wait = satAdd(s.Wait, e.Wait)
	}
}

// sameRead tells whether two events are parts of one read: a read is cut at
// the ends of layers and files, and where bytes had been read before. Without
// times each event is a read.
func sameRead(a, b *tracefmt.Event) bool {
	return a.At == b.At && a.Wait == b.Wait && a.Pid == b.Pid && a.Process == b.Process && (a.At > 0 || a.Wait > 0)
}

// finish counts extents and hits.
func (c *shareCounter) finish(first []tracefmt.Event) ([]Share, Share) {
	order := make([]int, len(first))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(first[a].Layer, first[b].Layer), cmp.Compare(first[a].Off, first[b].Off))
	})
	ends := make([]pieceEnd, len(c.shares))
	var all pieceEnd
	for _, i := range order {
		row := c.rows[i]
		c.shares[row].Extents += ends[row].next(&first[i])
		c.total.Extents += all.next(&first[i])
	}
	runs, hits := float64(max(c.t.Runs, 1)), 0.0
	for i := range c.shares {
		s := &c.shares[i]
		if s.Bytes > 0 {
			s.Seen = min(c.hits[i]/float64(s.Bytes)/runs, 1)
		}
		hits += c.hits[i]
	}
	if c.total.Bytes > 0 {
		c.total.Seen = min(hits/float64(c.total.Bytes)/runs, 1)
	}
	return c.shares, c.total
}

// A pieceEnd is where a piece without a gap has ended so far.
type pieceEnd struct {
	layer int
	end   int64 // 0 before the first
}

// next returns 1 if the event begins a new piece.
func (p *pieceEnd) next(e *tracefmt.Event) int {
	joined := p.end > 0 && p.layer == e.Layer && p.end == e.Off
	p.layer, p.end = e.Layer, e.Off+e.Len
	if joined {
		return 0
	}
	return 1
}

// describe fills in what a row's group says of it.
func (b *Breakdown) describe(t *tracefmt.Trace, s *Share) {
	switch b.By {
	case ByLayer:
		s.Name = strconv.Itoa(s.Layer)
		if b.Missing != "" {
			s.Name = "device"
		}
		if s.Layer < len(t.Layers) {
			s.Digest, s.Of = t.Layers[s.Layer].Digest, t.Layers[s.Layer].Decoded
		}
	case ByTime:
		s.To = satAdd(s.From, b.step)
		s.Name = s.From.String()
	}
}

// sharesBy returns the order of rows; equal ones stay in that of their first
// touch.
func sharesBy(o BreakdownOptions) (func(a, b Share) int, error) {
	by := o.Sort
	if by == "" && o.By != ByLayer && o.By != ByTime {
		by = SortBytes
	}
	orders := map[string]func(a, b Share) int{
		"":        func(a, b Share) int { return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.From, b.From)) },
		SortName:  func(a, b Share) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Pid, b.Pid)) },
		SortBytes: func(a, b Share) int { return cmp.Compare(b.Bytes, a.Bytes) },
		SortFirst: func(a, b Share) int { return cmp.Compare(a.First, b.First) },
		SortWait:  func(a, b Share) int { return cmp.Compare(b.Wait, a.Wait) },
		SortReads: func(a, b Share) int { return cmp.Compare(b.Reads, a.Reads) },
	}
	order, ok := orders[by]
	if !ok {
		return nil, fmt.Errorf("sort %q: not one of %s, %s, %s, %s, %s", by, SortBytes, SortFirst, SortWait, SortReads, SortName)
	}
	return order, nil
}

// Printable returns s for a terminal or a page: what does not print (control
// characters, marks that change the direction of writing, bytes that are not
// UTF-8) as escapes of Go, and backslashes doubled, so that no two strings
// look the same.
func Printable(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r == '\\' || r == utf8.RuneError || !unicode.IsPrint(r) }) {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case r == '\\':
			b.WriteString(`\\`)
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
		s = s[n:]
	}
	return b.String()
}
