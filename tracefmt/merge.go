package tracefmt

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A MergeMode says which bytes a merged trace has.
type MergeMode int

const (
	MergeUnion        MergeMode = iota // those of any recording
	MergeMajority                      // those of more than half of the recordings
	MergeIntersection                  // those of all recordings
)

var mergeModes = [...]string{MergeUnion: "union", MergeMajority: "majority", MergeIntersection: "intersection"}

// ParseMergeMode takes what String gives.
func ParseMergeMode(s string) (MergeMode, error) {
	for m, name := range mergeModes {
		if s == name {
			return MergeMode(m), nil
		}
	}
	return 0, fmt.Errorf("merge mode %.32q: neither union, majority nor intersection", s)
}

// String gives "union", "majority" or "intersection".
func (m MergeMode) String() string {
	if m < 0 || int(m) >= len(mergeModes) {
		return fmt.Sprintf("MergeMode(%d)", int(m))
	}
	return mergeModes[m]
}

// keeps tells whether bytes that are in hits of runs recordings are kept.
func (m MergeMode) keeps(hits, runs int) bool {
	switch m {
	case MergeMajority:
		return hits > runs/2
	case MergeIntersection:
		return hits == runs
	}
	return true
}

// An Agreement tells how much recordings have in common, whatever of it was
// kept. What it counts are first touches.
type Agreement struct {
	Runs       int     `json:"runs"`        // recordings, with those of traces that were merged before
	Bytes      int64   `json:"bytes"`       // distinct bytes, of any recording
	BytesAll   int64   `json:"bytes_all"`   // of them, in all recordings
	Extents    int     `json:"extents"`     // of all traces together
	ExtentsAll int     `json:"extents_all"` // of them, whole in all recordings
	Unique     []int64 `json:"unique"`      // bytes that only this trace has, in the order of the arguments
}

// Merge makes one trace of several, of one run of a workload each, or merged
// ones. Bytes are compared, not events: a byte's Hits are the recordings that
// read it, of the Runs of all traces together, and mode says how many it takes
// to be kept. What an earlier merge left out counts as not read.
//
// The times of a part, At and Wait, are the medians of its first touches in
// the recordings that have it (of an even number, halfway between the two in
// the middle), and that is its place in the order; where times are equal, or
// none are known, the median of the places in the traces decides. Path,
// process and origin are those of the first trace that knows them, the blob
// range is the shortest that is known, and Pid and Container stay where all
// recordings of the part agree.
//
// Layers are matched by digest, one without a digest by its place and length.
// So traces of images that share layers can be merged: the layers of the
// result are those of the first trace, and then those that only others have.
// Of the header's fields, image, manifest, workload, arguments, tool and
// read-ahead stay where all traces agree, and Start is the latest. It
// is an error if spaces or platforms differ, if one digest has two sizes, if
// some traces list their layers and others do not, and if traces of devices
// are not of the same image, or if the result has too many events for a trace.
//
// The end's reason is "merge of N runs", and its times are medians of those
// that are known. The traces are not changed; the result is compact. Merge
// takes a microsecond or two for an event of each trace.
func Merge(traces []*Trace, mode MergeMode) (*Trace, *Agreement, error) {
	if len(traces) == 0 {
		return nil, nil, errors.New("merge: no traces")
	}
	if mode < MergeUnion || mode > MergeIntersection {
		return nil, nil, fmt.Errorf("merge: unknown mode %d", int(mode))
	}
	m := &merger{mode: mode}
	if err := m.enter(traces); err != nil {
		return nil, nil, fmt.Errorf("merge: %w", err)
	}
	all, err := m.events()
	if err != nil {
		return nil, nil, fmt.Errorf("merge: %w", err)
	}
	events := joined(all)
	if len(events) > MaxEvents {
		return nil, nil, fmt.Errorf("merge: %d events: at most %d", len(events), MaxEvents)
	}
	out := &Trace{Header: m.header, Events: events}
	out.End = mergeEnds(traces, m.header.Runs)
	out.End.Events, out.End.Bytes = len(events), sumLen(events)
	if err := out.Check(); err != nil {
		return nil, nil, fmt.Errorf("merge: %w", err)
	}
	return out, &m.agreement, nil
}

// A merger lays traces over each other.
type merger struct {
	mode      MergeMode
	header    Header
	lanes     []*lane
	agreement Agreement
	partly    [][]bool // which events of each lane are not whole in all recordings

	at, wait, places medians // of the part at hand
}

// enter checks the traces and makes the lanes and the header.
func (m *merger) enter(traces []*Trace) error {
	var s stack
	ids := make([][]int, len(traces))
	for i, t := range traces {
		h := t.Header.filled()
		if err := (&Trace{Header: h, Events: t.Events}).Check(); err != nil {
			return fmt.Errorf("trace %d: %w", i+1, err)
		}
		var err error
		if i == 0 {
			m.header = h
			m.header.Runs = h.runs()
		} else {
			err = m.header.agree(&h)
		}
		if err == nil {
			ids[i], err = s.enter(&h)
		}
		if err != nil {
			return fmt.Errorf("trace %d: %w", i+1, err)
		}
	}
	m.header.Layers = s.layers
	if err := m.header.check(); err != nil {
		return err
	}
	m.agreement = Agreement{Runs: m.header.Runs, Unique: make([]int64, len(traces))}
	for i, t := range traces {
		l := newLane(t, ids[i])
		m.lanes = append(m.lanes, l)
		m.partly = append(m.partly, make([]bool, len(l.events)))
	}
	return nil
}

// agree takes the facts of another header into h, which has those of the
// traces before.
func (h *Header) agree(of *Header) error {
	switch {
	case h.Space != of.Space:
		return fmt.Errorf("it is in space %q, those before it are in space %q", of.Space, h.Space)
	case h.Platform != "" && of.Platform != "" && h.Platform != of.Platform:
		return fmt.Errorf("it is of platform %s, those before it are of %s", of.Platform, h.Platform)
	case (len(h.Layers) == 0) != (len(of.Layers) == 0):
		return errors.New("some traces list their layers and others do not")
	case h.Space == DeviceSpace && !sameStack(h, of):
		return errors.New("it is of a device of another image")
	}
	common(&h.Image, of.Image)
	common(&h.Manifest, of.Manifest)
	h.Platform = cmp.Or(h.Platform, of.Platform)
	common(&h.Tool, of.Tool)
	common(&h.ReadAhead, of.ReadAhead)
	if common(&h.Workload, of.Workload); !slices.Equal(h.Args, of.Args) {
		h.Args = nil
	}
	if of.Start.After(h.Start) {
		h.Start = of.Start
	}
	h.Runs += of.runs()
	return nil
}

// common keeps what both have in common.
func common[T comparable](v *T, of T) {
	if *v != of {
		*v = *new(T)
	}
}

// sameStack tells whether two devices, as far as is known, have the same bytes.
func sameStack(a, b *Header) bool {
	if len(a.Layers) == 0 || len(b.Layers) == 0 {
		return a.Manifest == b.Manifest || a.Manifest == "" || b.Manifest == ""
	}
	if len(a.Layers) != len(b.Layers) {
		return false
	}
	for i := range a.Layers {
		if a.layerKey(i) != b.layerKey(i) {
			return false
		}
	}
	return true
}

// mergeEnds makes the end of a trace of so many recordings.
func mergeEnds(traces []*Trace, runs int) *End {
	var ready, duration medians
	for _, t := range traces {
		if t.End == nil {
			continue
		}
		if t.End.Ready > 0 {
			ready.add(int64(t.End.Ready), t.runs())
		}
		if t.End.Duration > 0 {
			duration.add(int64(t.End.Duration), t.runs())
		}
	}
	return &End{
		Reason: fmt.Sprintf("merge of %d runs", runs),
		Ready:  micros(ready.take()), Duration: micros(duration.take()),
	}
}

// micros drops what a trace file does not hold.
func micros(v int64) time.Duration { return time.Duration(v).Truncate(time.Microsecond) }

// maxParts bounds the memory of a merge: parts before they are joined.
const maxParts = 4 * MaxEvents

// A mergedPart is an event of a merged trace and its place where times are
// equal.
type mergedPart struct {
	Event
	place int64
}

// events are those of the merged trace, in order, not joined.
func (m *merger) events() ([]Event, error) {
	var parts []mergedPart
	overlay(m.lanes, func(p *part) {
		if v, ok := m.merge(p); ok && len(parts) <= maxParts {
			parts = append(parts, v)
		}
	})
	if len(parts) > maxParts {
		return nil, fmt.Errorf("more than %d events", maxParts)
	}
	for i, l := range m.lanes {
		m.agreement.Extents += len(l.events)
		for _, partly := range m.partly[i] {
			if !partly {
				m.agreement.ExtentsAll++
			}
		}
	}
	slices.SortFunc(parts, func(a, b mergedPart) int {
		return cmp.Or(cmp.Compare(a.At, b.At), cmp.Compare(a.place, b.place),
			cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Off, b.Off))
	})
	var out []Event
	for i := range parts {
		out = append(out, parts[i].Event)
	}
	return out, nil
}

// merge makes one event of a part, if it is kept, and takes note of who has it.
func (m *merger) merge(p *part) (mergedPart, bool) {
	v := mergedPart{Event: Event{Layer: p.layer, Off: p.off, Len: p.n}}
	lanes := 0
	for i, n := range p.of {
		if n < 0 {
			continue
		}
		e := &m.lanes[i].events[n]
		hits := e.hits()
		m.at.add(int64(e.At), hits)
		m.wait.add(int64(e.Wait), hits)
		m.places.add(int64(n), hits)
		v.take(e, lanes == 0)
		lanes++
	}
	m.count(p, v.Hits, lanes)
	v.At, v.Wait, v.place = micros(m.at.take()), micros(m.wait.take()), m.places.take()
	if !m.mode.keeps(v.Hits, m.header.Runs) {
		return v, false
	}
	return v, true
}

// take takes what an event knows of the range of e, which is a part of it.
func (e *Event) take(of *Event, first bool) {
	e.Hits += of.hits()
	if first {
		e.Origin, e.Pid, e.Container = of.Origin, of.Pid, of.Container
	}
	common(&e.Pid, of.Pid)
	common(&e.Container, of.Container)
	if e.Process == "" {
		e.Process = of.Process
	}
	if e.Path == "" && of.Path != "" {
		e.Path, e.FileOff = of.Path, of.FileOff+e.Off-of.Off
	}
	if of.BlobLen > 0 && (e.BlobLen == 0 || of.BlobLen < e.BlobLen) {
		e.BlobOff, e.BlobLen = of.BlobOff, of.BlobLen
	}
}

// count takes note of a part that some lanes have.
func (m *merger) count(p *part, hits, lanes int) {
	a := &m.agreement
	addUp(&a.Bytes, p.n)
	if hits == a.Runs {
		addUp(&a.BytesAll, p.n)
	}
	for i, n := range p.of {
		if n < 0 {
			continue
		}
		if lanes == 1 {
			addUp(&a.Unique[i], p.n)
		}
		if hits < a.Runs {
			m.partly[i][n] = true
		}
	}
}

// medians are values, each of which counts several times.
type medians []weighted

type weighted struct{ value, times int64 }

func (m *medians) add(v int64, times int) {
	*m = append(*m, weighted{v, int64(times)})
}

// take returns the median, and forgets the values. Of an even number it is
// halfway between the two in the middle, rounded down; of none it is 0.
func (m *medians) take() int64 {
	list := *m
	*m = list[:0]
	slices.SortFunc(list, func(a, b weighted) int { return cmp.Compare(a.value, b.value) })
	var all int64
	for _, v := range list {
		all += v.times
	}
	low := list.nth((all - 1) / 2)
	return low + (list.nth(all/2)-low)/2
}

// nth returns the value with n before it, in sorted medians.
func (m medians) nth(n int64) int64 {
	for _, v := range m {
		if n -= v.times; n < 0 {
			return v.value
		}
	}
	return 0
}
