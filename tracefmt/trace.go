package tracefmt

import (
	_ "crypto/sha256" // digests of layers
	_ "crypto/sha512"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Version is the version of the native format that this package writes, and
// the newest that it reads.
const Version = 1

// Limits of a trace. A Writer refuses what is beyond them, and so does Read.
const (
	MaxEvents = 1 << 20 // events of one trace
	MaxLayers = 255     // layers of one image

	maxString  = 4096      // bytes of a path or of any other name
	maxArgs    = 4096      // arguments of the workload
	maxArg     = 128 << 10 // bytes of one argument, as in Linux
	maxStrings = 1 << 18   // entries of the string table
	maxTable   = 16 << 20  // bytes of the string table
	maxRuns    = 1 << 20   // recordings that were merged
	maxPid     = 1 << 30   // Linux itself has at most 1 << 22
)

// The values of Header.Space.
const (
	LayerSpace  = "layer"  // offsets are in the uncompressed LSMT file of a layer
	DeviceSpace = "device" // offsets are on the merged block device
)

// A Header says what was recorded.
type Header struct {
	Version  int           // of the format; NewWriter fills it
	Image    string        // reference of the image, as the user gave it
	Manifest digest.Digest // of the platform's image manifest; may be empty
	Platform string        // linux/amd64
	Layers   []Layer       // bottom first; empty if the trace does not know them

	Workload string   // name of what was started
	Args     []string // the effective entrypoint and arguments

	Tool      string    // that wrote the trace, with its version
	Start     time.Time // the zero of all times of the trace; kept in microseconds
	ReadAhead int64     // bytes of the device's read-ahead while recording; 0 unknown
	Space     string    // LayerSpace (also if empty) or DeviceSpace
	Runs      int       // recordings that were merged; 0 is one
}

// A Layer is one layer of the image that was recorded.
type Layer struct {
	Digest  digest.Digest // of the blob; empty for a local file without one
	Size    int64         // bytes of the blob; 0 unknown
	Decoded int64         // bytes of the LSMT file in it; 0 unknown
}

// An Event is one read. Times have a resolution of a microsecond; what is
// below is lost when a trace is written.
type Event struct {
	At     time.Duration // start of the read, since Header.Start
	Wait   time.Duration // until its bytes were on the node
	Layer  int           // index into Header.Layers; 0 in device space
	Off    int64         // bytes; in the space that the header names
	Len    int64         // bytes, at least one
	Origin uint8         // where the bytes came from; FORMAT.md lists the values

	// BlobOff and BlobLen are where the bytes lie in the layer's blob, in whole
	// blocks of its compression; a BlobLen of 0 is unknown, and BlobOff is 0
	// then. A part of an event keeps those of the whole.
	BlobOff, BlobLen int64

	Path    string // of the file in the image that the bytes belong to; empty unknown
	FileOff int64  // offset of Off in that file, bytes

	Process   string // name of the process that read; empty unknown
	Pid       int    // of it, as the host counts; 0 unknown
	Container string // that it was in; empty unknown

	Hits int // in how many of Header.Runs recordings; 0 is one
}

// An End says why and how a recording ended.
type End struct {
	Reason   string        // why it stopped
	Ready    time.Duration // when the workload was ready, since Header.Start; 0 never
	Events   int           // of the trace; a Writer counts them itself
	Bytes    int64         // sum of their lengths; a Writer counts them itself
	Duration time.Duration // of the recording, since Header.Start
}

// A Trace is what one recording, or a merge of several, knows.
type Trace struct {
	Header
	Events []Event
	End    *End // nil if the file was cut off
}

// Check tells whether every event lies within the limits and within the
// layers that the header lists. Read has done so; a caller that changes
// Layers, after reading a reference trace for instance, calls it again.
func (t *Trace) Check() error {
	if err := t.Header.check(); err != nil {
		return err
	}
	if len(t.Events) > MaxEvents {
		return fmt.Errorf("%d events: at most %d", len(t.Events), MaxEvents)
	}
	for i := range t.Events {
		if err := t.checkEvent(&t.Events[i]); err != nil {
			return fmt.Errorf("event %d: %w", i, err)
		}
	}
	if t.End != nil {
		return t.End.check()
	}
	return nil
}

func (h *Header) check() error {
	if h.Version != Version {
		return fmt.Errorf("trace format version %d: this program reads version %d, use one that knows it", h.Version, Version)
	}
	if h.Space != LayerSpace && h.Space != DeviceSpace {
		return fmt.Errorf("trace space %.32q: neither %q nor %q", h.Space, LayerSpace, DeviceSpace)
	}
	if h.ReadAhead < 0 {
		return fmt.Errorf("read-ahead of %d bytes", h.ReadAhead)
	}
	if h.Runs < 0 || h.Runs > maxRuns {
		return fmt.Errorf("merge of %d recordings: not within 0 and %d", h.Runs, maxRuns)
	}
	if us := h.Start.UnixMicro(); !h.Start.IsZero() && (us < 0 || us > maxMicros) {
		return fmt.Errorf("start time %d µs is out of range", us)
	}
	if err := h.checkStrings(); err != nil {
		return err
	}
	if len(h.Layers) > MaxLayers {
		return fmt.Errorf("%d layers: at most %d", len(h.Layers), MaxLayers)
	}
	for i, l := range h.Layers {
		if err := l.check(); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return nil
}

func (h *Header) checkStrings() error {
	for _, s := range []string{h.Image, h.Platform, h.Workload, h.Tool, string(h.Manifest)} {
		if len(s) > maxString {
			return fmt.Errorf("string of %d bytes in the header: at most %d", len(s), maxString)
		}
	}
	if len(h.Args) > maxArgs {
		return fmt.Errorf("%d arguments: at most %d", len(h.Args), maxArgs)
	}
	sum := 0
	for _, a := range h.Args {
		if len(a) > maxArg {
			return fmt.Errorf("argument of %d bytes: at most %d", len(a), maxArg)
		}
		sum += len(a)
	}
	if sum > maxFrame/2 {
		return fmt.Errorf("arguments of %d bytes: at most %d", sum, maxFrame/2)
	}
	if h.Manifest == "" {
		return nil
	}
	if err := h.Manifest.Validate(); err != nil {
		return fmt.Errorf("manifest %.80q: %w", h.Manifest, err)
	}
	return nil
}

func (l *Layer) check() error {
	if l.Size < 0 || l.Decoded < 0 {
		return fmt.Errorf("negative size (%d, decoded %d)", l.Size, l.Decoded)
	}
	if l.Digest == "" {
		return nil
	}
	if err := l.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.80q: %w", l.Digest, err)
	}
	return nil
}

func (h *Header) checkEvent(e *Event) error {
	switch {
	case e.At < 0 || e.Wait < 0:
		return fmt.Errorf("negative time (at %v, wait %v)", e.At, e.Wait)
	case e.Off < 0 || e.Len <= 0 || e.FileOff < 0:
		return fmt.Errorf("range of %d bytes at %d (file offset %d): not a range", e.Len, e.Off, e.FileOff)
	case e.Off > math.MaxInt64-e.Len || e.FileOff > math.MaxInt64-e.Len:
		return fmt.Errorf("range of %d bytes at %d (file offset %d): overflow", e.Len, e.Off, e.FileOff)
	}
	if err := h.checkWho(e); err != nil {
		return err
	}
	if err := h.checkRange(e); err != nil {
		return err
	}
	return h.checkBlob(e)
}

// checkWho tells whether the names and numbers of an event are within their
// limits.
func (h *Header) checkWho(e *Event) error {
	switch {
	case len(e.Path) > maxString || len(e.Process) > maxString || len(e.Container) > maxString:
		return fmt.Errorf("path of %d, process of %d, container of %d bytes: at most %d",
			len(e.Path), len(e.Process), len(e.Container), maxString)
	case e.Pid < 0 || e.Pid > maxPid:
		return fmt.Errorf("process number %d: not within 0 and %d", e.Pid, maxPid)
	case e.Hits < 0 || e.Hits > h.runs():
		return fmt.Errorf("seen in %d recordings of %d", e.Hits, h.runs())
	}
	return nil
}

// runs is how many recordings the trace was made of.
func (h *Header) runs() int { return max(h.Runs, 1) }

// hits is in how many of them the event was seen.
func (e *Event) hits() int { return max(e.Hits, 1) }

func (h *Header) checkRange(e *Event) error {
	if h.Space == DeviceSpace {
		if e.Layer != 0 {
			return fmt.Errorf("layer %d in a trace of a device", e.Layer)
		}
		return nil
	}
	n := len(h.Layers)
	if n == 0 {
		n = MaxLayers
	}
	if e.Layer < 0 || e.Layer >= n {
		return fmt.Errorf("layer %d: there are %d", e.Layer, n)
	}
	if len(h.Layers) == 0 {
		return nil
	}
	if size := h.Layers[e.Layer].Decoded; size > 0 && e.Off+e.Len > size {
		return fmt.Errorf("range of %d bytes at %d: layer %d has %d bytes", e.Len, e.Off, e.Layer, size)
	}
	return nil
}

func (e *End) check() error {
	if e.Ready < 0 || e.Duration < 0 || e.Events < 0 || e.Bytes < 0 {
		return errors.New("end: negative number")
	}
	if len(e.Reason) > maxString {
		return fmt.Errorf("end: reason of %d bytes: at most %d", len(e.Reason), maxString)
	}
	return nil
}

// FirstTouch returns the parts of the events that no earlier event has
// touched, in order of time; events of the same time keep their order. The
// trace is not changed.
func (t *Trace) FirstTouch() []Event {
	in := t.Events
	if len(in) == 0 {
		return nil
	}
	if !slices.IsSortedFunc(in, byTime) {
		in = slices.Clone(in)
		slices.SortStableFunc(in, byTime)
	}
	var touched Touched
	out := make([]Event, 0, len(in))
	for i := range in {
		out = touched.Add(out, in[i])
	}
	return out
}

func byTime(a, b Event) int {
	switch {
	case a.At < b.At:
		return -1
	case a.At > b.At:
		return 1
	}
	return 0
}

// Bytes returns how many distinct bytes the trace touches.
func (t *Trace) Bytes() int64 {
	return sumLen(t.FirstTouch())
}

func sumLen(events []Event) int64 {
	var n int64
	for i := range events {
		n += min(events[i].Len, math.MaxInt64-n)
	}
	return n
}

// joinWithin is how much later a neighbour may have been read to be joined to
// the extent before it.
const joinWithin = 10 * time.Millisecond

// Compact reduces the events to their first touches and joins those that
// follow each other, on the layer and within some milliseconds in time, if they
// have file, process, container and hits in common: the joined event has the
// first's time and origin, the sum of the waits, and a blob range that covers
// theirs.
func (t *Trace) Compact() {
	t.Events = joined(t.FirstTouch())
	if t.End != nil {
		end := *t.End
		end.Events, end.Bytes = len(t.Events), sumLen(t.Events)
		t.End = &end
	}
}

// joined joins neighbours in place.
func joined(events []Event) []Event {
	out := events[:0]
	for _, e := range events {
		if n := len(out); n > 0 && continues(&out[n-1], &e) {
			out[n-1].Len += e.Len
			joinBlobs(&out[n-1], &e)
			out[n-1].Wait += min(e.Wait, math.MaxInt64-out[n-1].Wait)
			continue
		}
		out = append(out, e)
	}
	return out
}

func continues(a, b *Event) bool {
	if a.Layer != b.Layer || a.Off+a.Len != b.Off || b.At-a.At > joinWithin {
		return false
	}
	if a.Path != b.Path || (a.BlobLen == 0) != (b.BlobLen == 0) || a.hits() != b.hits() {
		return false
	}
	if a.Process != b.Process || a.Pid != b.Pid || a.Container != b.Container {
		return false
	}
	if a.Path == "" {
		return a.FileOff == b.FileOff
	}
	return a.FileOff+a.Len == b.FileOff
}
