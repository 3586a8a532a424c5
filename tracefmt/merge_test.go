package tracefmt

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// layerNamed is a layer with a digest of its own.
func layerNamed(name string, decoded int64) Layer {
	return Layer{Digest: digest.FromString(name), Size: decoded / 2, Decoded: decoded}
}

// touch is a trace of one layer: each event is a place and a time.
func touch(events ...Event) *Trace {
	return &Trace{Header: Header{Layers: []Layer{layerNamed("l", 1<<20)}}, Events: events}
}

func TestMergeModes(t *testing.T) {
	traces := []*Trace{
		touch(Event{At: ms(1), Off: 0, Len: 100}, Event{At: ms(90), Off: 500, Len: 100}),
		touch(Event{At: ms(30), Off: 50, Len: 100}),
		touch(Event{At: ms(60), Off: 50, Len: 50}, Event{At: ms(2), Off: 900, Len: 1}),
	}
	for name, c := range map[string][]Event{
		"union": {
			{At: ms(1), Off: 0, Len: 50, Hits: 1},
			{At: ms(2), Off: 900, Len: 1, Hits: 1},
			{At: ms(30), Off: 50, Len: 50, Hits: 3},
			{At: ms(30), Off: 100, Len: 50, Hits: 1},
			{At: ms(90), Off: 500, Len: 100, Hits: 1},
		},
		"majority":     {{At: ms(30), Off: 50, Len: 50, Hits: 3}},
		"intersection": {{At: ms(30), Off: 50, Len: 50, Hits: 3}},
	} {
		mode, err := ParseMergeMode(name)
		require.NoError(t, err)
		require.Equal(t, name, mode.String())
		got, agreement, err := Merge(traces, mode)
		require.NoError(t, err, name)
		require.Equal(t, c, got.Events, name)
		require.Equal(t, &Agreement{
			Runs: 3, Bytes: 251, BytesAll: 50, Extents: 5, ExtentsAll: 1, Unique: []int64{150, 50, 1},
		}, agreement, name)
		require.Equal(t, 3, got.Runs)
		require.Equal(t, &End{Reason: "merge of 3 runs", Events: len(c), Bytes: sumLen(c)}, got.End, name)
		again, err := Read(bytes.NewReader(plain(t, got)))
		require.NoError(t, err)
		require.Equal(t, got, again, name)
	}
	_, err := ParseMergeMode("all")
	require.ErrorContains(t, err, "neither union")
	require.Equal(t, "MergeMode(7)", MergeMode(7).String())
}

// TestMergeWithoutTimes merges traces in the reference's format: what counts is
// the order.
func TestMergeWithoutTimes(t *testing.T) {
	order := func(offs ...int64) *Trace {
		tr := &Trace{}
		for _, off := range offs {
			tr.Events = append(tr.Events, Event{Off: off * 100, Len: 10})
		}
		return tr
	}
	got, _, err := Merge([]*Trace{order(5, 1, 3, 2), order(5, 3, 1, 2), order(5, 1, 3, 2, 9)}, MergeUnion)
	require.NoError(t, err)
	var offs []int64
	for _, e := range got.Events {
		offs = append(offs, e.Off/100)
	}
	require.Equal(t, []int64{5, 1, 3, 2, 9}, offs)
}

func TestMergeHeaders(t *testing.T) {
	a, b := sample(), sample()
	b.Start = b.Start.Add(time.Hour)
	b.End.Ready, b.End.Duration = ms(41), ms(60)
	got, _, err := Merge([]*Trace{a, b}, MergeIntersection)
	require.NoError(t, err)
	want := a.Header
	want.Start, want.Runs = b.Start, 2
	require.Equal(t, want, got.Header)
	require.Equal(t, ms(36), got.End.Ready)
	require.Equal(t, ms(50), got.End.Duration)
	require.Equal(t, sample().Events, a.Events, "Merge changed its argument")

	b.Image, b.Workload, b.Args, b.Tool, b.ReadAhead, b.Manifest = "other", "w", []string{"x"}, "t", 1, digest.FromString("x")
	b.End, b.Platform = nil, ""
	got, _, err = Merge([]*Trace{a, b}, MergeUnion)
	require.NoError(t, err)
	require.Equal(t, Header{Version: 1, Platform: "linux/amd64", Layers: a.Layers, Start: b.Start, Space: LayerSpace, Runs: 2}, got.Header)
	require.Equal(t, ms(31), got.End.Ready)
}

// TestMergeRebuilt merges traces of two builds of an image, which share two
// layers.
func TestMergeRebuilt(t *testing.T) {
	base, lib, v1, v2 := layerNamed("base", 1000), layerNamed("lib", 1000), layerNamed("v1", 1000), layerNamed("v2", 1000)
	a := &Trace{Header: Header{Layers: []Layer{base, lib, v1}}, Events: []Event{
		{At: ms(10), Layer: 0, Len: 10}, {At: ms(20), Layer: 1, Len: 10}, {At: ms(30), Layer: 2, Len: 10},
	}}
	unknown := lib
	unknown.Size, unknown.Decoded = 0, 0
	b := &Trace{Header: Header{Layers: []Layer{base, v2, unknown}}, Events: []Event{
		{At: ms(110), Layer: 0, Len: 10}, {At: ms(120), Layer: 2, Len: 10}, {At: ms(130), Layer: 1, Len: 10},
	}}
	got, _, err := Merge([]*Trace{a, b}, MergeUnion)
	require.NoError(t, err)
	require.Equal(t, []Layer{base, lib, v1, v2}, got.Layers)
	require.Equal(t, []Event{
		{At: ms(30), Layer: 2, Len: 10, Hits: 1},
		{At: ms(60), Layer: 0, Len: 10, Hits: 2},
		{At: ms(70), Layer: 1, Len: 10, Hits: 2},
		{At: ms(130), Layer: 3, Len: 10, Hits: 1},
	}, got.Events)
}

// TestMergeNested counts the recordings of traces that were merged before.
func TestMergeNested(t *testing.T) {
	one := touch(Event{At: ms(10), Len: 100})
	two := touch(Event{At: ms(20), Len: 100})
	three := touch(Event{At: ms(60), Off: 50, Len: 100})
	inner, _, err := Merge([]*Trace{one, two}, MergeUnion)
	require.NoError(t, err)
	got, agreement, err := Merge([]*Trace{inner, three}, MergeMajority)
	require.NoError(t, err)
	require.Equal(t, []Event{
		{At: ms(15), Len: 50, Hits: 2},
		{At: ms(15), Off: 50, Len: 50, Hits: 3}, // the median of 15, 15 and 60
	}, got.Events)
	require.Equal(t, 3, got.Runs)
	require.Equal(t, "merge of 3 runs", got.End.Reason)
	require.Equal(t, &Agreement{Runs: 3, Bytes: 150, BytesAll: 50, Extents: 2, Unique: []int64{50, 50}}, agreement)
}

func TestMergeWho(t *testing.T) {
	a := touch(Event{Len: 100, BlobOff: 10, BlobLen: 90, Origin: 4, Process: "sh", Pid: 7, Container: "c"})
	b := touch(Event{Len: 200, BlobOff: 10, BlobLen: 190, Origin: 1, Process: "ls", Pid: 7, Container: "d", Path: "/f", FileOff: 1000})
	got, _, err := Merge([]*Trace{a, b}, MergeUnion)
	require.NoError(t, err)
	require.Equal(t, []Event{
		{Len: 100, BlobOff: 10, BlobLen: 90, Origin: 4, Process: "sh", Pid: 7, Path: "/f", FileOff: 1000, Hits: 2},
		{Off: 100, Len: 100, BlobOff: 10, BlobLen: 190, Origin: 1, Process: "ls", Pid: 7, Container: "d", Path: "/f", FileOff: 1100, Hits: 1},
	}, got.Events)
}

func TestMergeRefuses(t *testing.T) {
	with := func(change func(t *Trace)) *Trace {
		tr := sample()
		change(tr)
		return tr
	}
	device := func(name string) *Trace {
		return &Trace{Header: Header{Space: DeviceSpace, Layers: []Layer{layerNamed(name, 10)}}, Events: []Event{{Off: 1 << 30, Len: 1}}}
	}
	for name, c := range map[string]struct {
		traces []*Trace
		err    string
	}{
		"none":     {nil, "no traces"},
		"space":    {[]*Trace{sample(), device("a")}, `trace 2: it is in space "device"`},
		"platform": {[]*Trace{sample(), with(func(t *Trace) { t.Platform = "linux/arm64" })}, "platform linux/arm64"},
		"no list":  {[]*Trace{sample(), with(func(t *Trace) { t.Layers = nil })}, "list their layers"},
		"size":     {[]*Trace{sample(), with(func(t *Trace) { t.Layers[0].Size++ })}, "trace 2: layer sha256:"},
		"decoded":  {[]*Trace{sample(), with(func(t *Trace) { t.Layers[1].Decoded++ })}, "elsewhere 2000 (1048576 decoded)"},
		"device":   {[]*Trace{device("a"), device("b")}, "another image"},
		"event":    {[]*Trace{sample(), with(func(t *Trace) { t.Events[2].Off = 1 << 40 })}, "trace 2: event 2"},
		"hits":     {[]*Trace{with(func(t *Trace) { t.Events[0].Hits = 2 })}, "seen in 2 recordings of 1"},
		"runs":     {[]*Trace{with(func(t *Trace) { t.Runs = maxRuns }), sample()}, "merge of 1048577 recordings"},
	} {
		_, _, err := Merge(c.traces, MergeUnion)
		require.ErrorContains(t, err, c.err, name)
	}
	_, _, err := Merge([]*Trace{sample()}, 3)
	require.ErrorContains(t, err, "unknown mode 3")

	many := &Trace{}
	for i := range MaxLayers - 1 {
		many.Layers = append(many.Layers, layerNamed(fmt.Sprint("many", i), 1))
	}
	_, _, err = Merge([]*Trace{many, sample()}, MergeUnion)
	require.ErrorContains(t, err, "layers: at most 255")

	got, _, err := Merge([]*Trace{device("a"), device("a")}, MergeIntersection)
	require.NoError(t, err)
	require.Equal(t, []Event{{Off: 1 << 30, Len: 1, Hits: 2}}, got.Events)
}

// TestMergeTooMany merges traces that have more events together than one may.
func TestMergeTooMany(t *testing.T) {
	var traces []*Trace
	for k := range int64(2) {
		tr := &Trace{}
		for i := range int64(MaxEvents/2 + 1) {
			tr.Events = append(tr.Events, Event{Off: i*4 + k*2, Len: 1})
		}
		traces = append(traces, tr)
	}
	_, _, err := Merge(traces, MergeUnion)
	require.ErrorContains(t, err, "1048578 events: at most 1048576")
}

// A byteAt is one byte of a layer.
type byteAt struct {
	layer digest.Digest
	off   int64
}

// A seen byte is what one trace, or a merge, knows of it.
type seen struct {
	Event      // Off and Len are 0, FileOff is the byte's
	extent int // the first touch that has it
	tracen int // the trace
}

// naiveFirst gives what a trace knows of each byte, and how many first touches
// it has.
func naiveFirst(tr *Trace, n int) (map[byteAt]seen, int) {
	events := slices.Clone(tr.Events)
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
	all := make(map[byteAt]seen)
	extents := 0
	for _, e := range events {
		fresh := false
		for i := range e.Len {
			b := byteAt{tr.Layers[e.Layer].Digest, e.Off + i}
			if _, old := all[b]; old {
				fresh = false
				continue
			}
			if !fresh {
				extents++
			}
			fresh = true
			v := seen{Event: e, extent: extents - 1, tracen: n}
			if v.Off, v.Len, v.Layer = 0, 0, 0; v.Path != "" {
				v.FileOff += i
			}
			all[b] = v
		}
	}
	return all, extents
}

func naiveMedian(v []int64) int64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	a, b := v[(len(v)-1)/2], v[len(v)/2]
	return a + (b-a)/2
}

// naiveMerge merges byte by byte.
func naiveMerge(traces []*Trace, mode MergeMode) (map[byteAt]seen, *Agreement) {
	a := &Agreement{Unique: make([]int64, len(traces))}
	of := make(map[byteAt][]seen)
	for i, tr := range traces {
		a.Runs += max(tr.Runs, 1)
		first, extents := naiveFirst(tr, i)
		a.Extents += extents
		for b, v := range first {
			of[b] = append(of[b], v)
		}
	}
	partly := make(map[[2]int]bool)
	out := make(map[byteAt]seen)
	for b, list := range of {
		var at, wait, places []int64
		v := list[0]
		v.Hits = 0
		for _, s := range list {
			for range max(s.Hits, 1) {
				at, wait, places = append(at, int64(s.At)), append(wait, int64(s.Wait)), append(places, int64(s.extent))
				v.Hits++
			}
			if v.Pid != s.Pid {
				v.Pid = 0
			}
			if v.Container != s.Container {
				v.Container = ""
			}
			v.Process = cmp.Or(v.Process, s.Process)
			if v.Path == "" {
				v.Path, v.FileOff = s.Path, s.FileOff
			}
			if s.BlobLen > 0 && (v.BlobLen == 0 || s.BlobLen < v.BlobLen) {
				v.BlobOff, v.BlobLen = s.BlobOff, s.BlobLen
			}
		}
		a.Bytes++
		if v.Hits == a.Runs {
			a.BytesAll++
		}
		for _, s := range list {
			partly[[2]int{s.tracen, s.extent}] = partly[[2]int{s.tracen, s.extent}] || v.Hits < a.Runs
		}
		if len(list) == 1 {
			a.Unique[list[0].tracen]++
		}
		v.At, v.Wait = time.Duration(naiveMedian(at)).Truncate(time.Microsecond), time.Duration(naiveMedian(wait)).Truncate(time.Microsecond)
		v.extent, v.tracen = int(naiveMedian(places)), 0
		if mode == MergeUnion || mode == MergeMajority && 2*v.Hits > a.Runs || v.Hits == a.Runs {
			out[b] = v
		}
	}
	for _, p := range partly {
		if !p {
			a.ExtentsAll++
		}
	}
	return out, a
}

// randomTrace is a small trace of some of five layers, of one run or of several.
func randomTrace(rnd *rand.Rand) *Trace {
	const size = 60
	tr := &Trace{}
	for _, i := range rnd.Perm(5)[:1+rnd.IntN(4)] {
		tr.Layers = append(tr.Layers, Layer{Digest: digest.FromString(fmt.Sprint(i)), Decoded: size})
	}
	if rnd.IntN(4) == 0 {
		tr.Layers = append(tr.Layers, tr.Layers[0]) // the same layer twice
	}
	if rnd.IntN(3) == 0 {
		tr.Runs = 1 + rnd.IntN(4)
	}
	name := func(prefix string) string {
		if n := rnd.IntN(3); n > 0 {
			return fmt.Sprint(prefix, n)
		}
		return ""
	}
	for range rnd.IntN(25) {
		e := Event{
			At: time.Duration(rnd.IntN(30)) * 1500 * time.Microsecond, Wait: time.Duration(rnd.IntN(9)) * time.Microsecond,
			Layer: rnd.IntN(len(tr.Layers)), Off: rnd.Int64N(size), Origin: uint8(rnd.IntN(3)),
			Path: name("/"), Process: name("p"), Container: name("c"), Pid: rnd.IntN(3), Hits: rnd.IntN(max(tr.Runs, 1) + 1),
		}
		e.Len = 1 + rnd.Int64N(size-e.Off)
		if e.Path != "" {
			e.FileOff = rnd.Int64N(100)
		}
		if rnd.IntN(2) == 0 {
			e.BlobOff, e.BlobLen = rnd.Int64N(50), 1+rnd.Int64N(20)
		}
		tr.Events = append(tr.Events, e)
	}
	return tr
}

// flat are the bytes of a trace in its order. Times stay where they are those
// of the first byte of an event.
func flat(tr *Trace) (order []byteAt, known []seen) {
	for _, e := range tr.Events {
		for i := range e.Len {
			v := seen{Event: e}
			if v.Off, v.Len, v.Layer = 0, 0, 0; v.Path != "" {
				v.FileOff += i
			}
			order, known = append(order, byteAt{tr.Layers[e.Layer].Digest, e.Off + i}), append(known, v)
		}
	}
	return order, known
}

// TestMergeModel compares Merge with a merge that goes byte by byte.
func TestMergeModel(t *testing.T) {
	for seed := range uint64(1500) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var traces []*Trace
		for range 1 + rnd.IntN(5) {
			traces = append(traces, randomTrace(rnd))
		}
		mode := MergeMode(rnd.IntN(3))
		want, agreement := naiveMerge(traces, mode)
		m := &merger{mode: mode}
		require.NoError(t, m.enter(traces))
		events, err := m.events()
		require.NoError(t, err)
		parts := &Trace{Header: m.header, Events: events}
		order, known := flat(parts)
		require.Len(t, known, len(want), "seed %d", seed)
		last := seen{}
		for i, b := range order {
			w := want[b]
			if c := cmp.Or(cmp.Compare(last.At, w.At), cmp.Compare(last.extent, w.extent)); c > 0 {
				t.Fatalf("seed %d: %v is out of order", seed, b)
			}
			last = w
			w.extent = 0
			require.Equal(t, w, known[i], "seed %d: %v", seed, b)
		}
		got, a, err := Merge(traces, mode)
		require.NoError(t, err, "seed %d", seed)
		require.Equal(t, agreement, a, "seed %d", seed)
		joinedOrder, joinedKnown := flat(got)
		require.Equal(t, order, joinedOrder, "seed %d", seed)
		for i, v := range joinedKnown {
			require.Equal(t, want[order[i]].Hits, v.Hits)
			require.Equal(t, want[order[i]].Path, v.Path)
		}
		compact := *got
		compact.Compact()
		require.Equal(t, got, &compact, "seed %d: not compact", seed)
	}
}

// TestMergeNestedModel merges some of the traces first: it is the same bytes
// and hits.
func TestMergeNestedModel(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		var traces []*Trace
		for range 2 + rnd.IntN(4) {
			traces = append(traces, randomTrace(rnd))
		}
		cut := 1 + rnd.IntN(len(traces)-1)
		inner, _, err := Merge(traces[:cut], MergeUnion)
		require.NoError(t, err)
		mode := MergeMode(rnd.IntN(3))
		nested, _, err := Merge(append([]*Trace{inner}, traces[cut:]...), mode)
		require.NoError(t, err)
		atOnce, _, err := Merge(traces, mode)
		require.NoError(t, err)
		require.Equal(t, hitsOf(atOnce), hitsOf(nested), "seed %d", seed)
		require.Equal(t, atOnce.Runs, nested.Runs)
	}
}

func hitsOf(tr *Trace) map[byteAt]int {
	all := make(map[byteAt]int)
	order, known := flat(tr)
	for i, b := range order {
		all[b] = known[i].Hits
	}
	return all
}
