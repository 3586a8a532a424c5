package tracefmt

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

func TestDiff(t *testing.T) {
	base, v1, v2 := layerNamed("base", 1000), layerNamed("v1", 1000), layerNamed("v2", 1000)
	a := &Trace{Header: Header{Layers: []Layer{base, v1}}, Events: []Event{
		{At: ms(1), Layer: 0, Len: 100, Path: "/bin/sh"},
		{At: ms(2), Layer: 0, Off: 200, Len: 100, Path: "/lib/c"},
		{At: ms(3), Layer: 1, Len: 10, Path: "/app"},
		{At: ms(4), Layer: 0, Len: 300, Path: "/again"},
	}}
	b := &Trace{Header: Header{Layers: []Layer{v2, base}}, Events: []Event{
		{At: ms(1), Layer: 1, Off: 250, Len: 100, Path: "/lib/c"},
		{At: ms(2), Layer: 1, Len: 50},
		{At: ms(3), Layer: 0, Len: 1000, Path: "/app"},
	}}
	require.Equal(t, &Difference{
		Shares: Shares{OnlyA: 210, OnlyB: 1050, Both: 100},
		Layers: []LayerDifference{
			{Digest: base.Digest, A: 0, B: 1, Shares: Shares{OnlyA: 200, OnlyB: 50, Both: 100}},
			{Digest: v1.Digest, A: 1, B: -1, Shares: Shares{OnlyA: 10}},
			{Digest: v2.Digest, A: -1, B: 0, Shares: Shares{OnlyB: 1000}},
		},
		Paths: []PathDifference{
			{"/app", Shares{OnlyA: 10, OnlyB: 1000}},
			{"/again", Shares{OnlyA: 100}},
			{"/lib/c", Shares{OnlyA: 50, OnlyB: 50, Both: 50}},
			{"/bin/sh", Shares{OnlyA: 50, Both: 50}},
		},
		Order: -1, Displacement: 50,
	}, Diff(a, b))
}

func TestDiffOrder(t *testing.T) {
	inOrder := func(offs ...int64) *Trace {
		tr := &Trace{}
		for i, off := range offs {
			tr.Events = append(tr.Events, Event{At: ms(int64(i)), Off: off * 10, Len: 10})
		}
		return tr
	}
	for name, c := range map[string]struct {
		a, b  *Trace
		order float64
		moved int64
	}{
		"same":            {inOrder(1, 2, 3, 4), inOrder(1, 2, 3, 4), 1, 0},
		"reversed":        {inOrder(1, 2, 3, 4), inOrder(4, 3, 2, 1), -1, 10},
		"one moved":       {inOrder(1, 2, 3, 4, 5), inOrder(2, 3, 4, 5, 1), 0.2, 10},
		"others between":  {inOrder(1, 2, 3), inOrder(9, 1, 8, 2, 7, 3), 1, 0},
		"nothing in both": {inOrder(1, 2), inOrder(3, 4), 1, 0},
		"one in both":     {inOrder(1, 2), inOrder(3, 2), 1, 0},
		"empty":           {inOrder(), inOrder(), 1, 0},
		"two of three":    {inOrder(1, 2, 3), inOrder(1, 3, 2), 1.0 / 3, 10},
	} {
		d := Diff(c.a, c.b)
		require.InDelta(t, c.order, d.Order, 1e-12, name)
		require.Equal(t, c.moved, d.Displacement, name)
	}
}

func TestDiffLayers(t *testing.T) {
	a := touch(Event{Len: 10})
	unlisted := &Trace{Events: []Event{{Len: 10}, {Layer: 3, Len: 5}}}
	device := &Trace{Header: Header{Space: DeviceSpace}, Events: a.Events}
	other := &Trace{Header: Header{Space: DeviceSpace, Layers: []Layer{layerNamed("other", 1)}}, Events: a.Events}
	own := &Trace{Header: Header{Space: DeviceSpace, Layers: a.Layers}, Events: a.Events}
	key := a.Layers[0].Digest
	for name, c := range map[string]struct {
		a, b   *Trace
		all    Shares
		layers []LayerDifference
	}{
		"b lists no layers": {a, unlisted, Shares{Both: 10, OnlyB: 5}, []LayerDifference{{key, 0, 0, Shares{Both: 10}}, {"", -1, 3, Shares{OnlyB: 5}}}},
		"a lists no layers": {unlisted, a, Shares{Both: 10, OnlyA: 5}, []LayerDifference{{key, 0, 0, Shares{Both: 10}}, {"", 3, -1, Shares{OnlyA: 5}}}},
		"other space":       {a, own, Shares{OnlyA: 10, OnlyB: 10}, []LayerDifference{{key, 0, -1, Shares{OnlyA: 10}}, {"", -1, 0, Shares{OnlyB: 10}}}},
		"same device":       {own, own, Shares{Both: 10}, []LayerDifference{{"", 0, 0, Shares{Both: 10}}}},
		"unknown device":    {own, device, Shares{Both: 10}, []LayerDifference{{"", 0, 0, Shares{Both: 10}}}},
		"other device":      {own, other, Shares{OnlyA: 10, OnlyB: 10}, []LayerDifference{{"", 0, -1, Shares{OnlyA: 10}}, {"", -1, 0, Shares{OnlyB: 10}}}},
	} {
		d := Diff(c.a, c.b)
		require.Equal(t, c.all, d.Shares, name)
		require.Equal(t, c.layers, d.Layers, name)
	}
}

// TestDiffHuge sums lengths that do not fit.
func TestDiffHuge(t *testing.T) {
	tr := &Trace{Events: []Event{{Len: math.MaxInt64}, {Layer: 1, Len: math.MaxInt64}, {Layer: 2, Len: 1}, {Layer: -1, Len: 7}, {Layer: MaxLayers, Len: 7}}}
	d := Diff(tr, tr)
	require.Equal(t, Shares{Both: math.MaxInt64}, d.Shares)
	require.Equal(t, 1.0, d.Order)
	require.Len(t, d.Layers, 3)
	have, all := tr.Covers(nil)
	require.EqualValues(t, 0, have)
	require.EqualValues(t, math.MaxInt64, all)
}

func TestDiffJSON(t *testing.T) {
	b, err := json.Marshal(Diff(touch(Event{Len: 3}), touch(Event{Off: 1, Len: 4, Path: "/f"})))
	require.NoError(t, err)
	require.JSONEq(t, fmt.Sprintf(`{"only_a": 1, "only_b": 2, "both": 2, "order": 1, "displacement": 0,
		"layers": [{"digest": %q, "a": 0, "b": 0, "only_a": 1, "only_b": 2, "both": 2}],
		"paths": [{"path": "/f", "only_a": 0, "only_b": 2, "both": 2}, {"path": "", "only_a": 1, "only_b": 0, "both": 0}]}`,
		digest.FromString("l")), string(b))
	b, err = json.Marshal(Diff(&Trace{}, &Trace{}))
	require.NoError(t, err)
	require.JSONEq(t, `{"only_a": 0, "only_b": 0, "both": 0, "order": 1, "displacement": 0, "layers": [], "paths": []}`, string(b))
}

// naiveDiff compares byte by byte.
func naiveDiff(a, b *Trace) (all Shares, paths map[string]Shares, order float64, displacement int64) {
	inA, _ := naiveFirst(a, 0)
	inB, _ := naiveFirst(b, 1)
	paths = make(map[string]Shares)
	both := []byteAt{}
	for at, v := range inA {
		s := paths[v.Path]
		w, ok := inB[at]
		if v.Path == "" && ok {
			s = paths[w.Path]
			v.Path = w.Path
		}
		if ok {
			all.Both++
			s.Both++
			both = append(both, at)
		} else {
			all.OnlyA++
			s.OnlyA++
		}
		paths[v.Path] = s
	}
	for at, w := range inB {
		if _, ok := inA[at]; !ok {
			s := paths[w.Path]
			all.OnlyB++
			s.OnlyB++
			paths[w.Path] = s
		}
	}
	before := func(in map[byteAt]seen, x, y byteAt) int {
		return cmp.Or(cmp.Compare(in[x].extent, in[y].extent), cmp.Compare(x.off, y.off))
	}
	agree, pairs := 0, 0
	for i, x := range both {
		for _, y := range both[:i] {
			if inA[x].extent == inA[y].extent && inB[x].extent == inB[y].extent {
				continue
			}
			pairs++
			agree += before(inA, x, y) * before(inB, x, y)
		}
	}
	if order = 1; pairs > 0 {
		order = float64(agree) / float64(pairs)
	}
	place := make(map[byteAt]int)
	slices.SortFunc(both, func(x, y byteAt) int { return before(inA, x, y) })
	for i, x := range both {
		place[x] = i
	}
	slices.SortFunc(both, func(x, y byteAt) int { return before(inB, x, y) })
	var moved []int64
	for i, x := range both {
		moved = append(moved, int64(max(i-place[x], place[x]-i)))
	}
	if slices.Sort(moved); len(moved) > 0 {
		displacement = moved[(len(moved)-1)/2]
	}
	return all, paths, order, displacement
}

// TestDiffModel compares Diff with a comparison that goes byte by byte.
func TestDiffModel(t *testing.T) {
	for seed := range uint64(600) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		a, b := randomTrace(rnd), randomTrace(rnd)
		d := Diff(a, b)
		all, paths, order, displacement := naiveDiff(a, b)
		require.Equal(t, all, d.Shares, "seed %d", seed)
		got := make(map[string]Shares)
		for _, p := range d.Paths {
			got[p.Path] = p.Shares
		}
		require.Equal(t, paths, got, "seed %d", seed)
		var sum Shares
		for _, l := range d.Layers {
			sum.OnlyA, sum.OnlyB, sum.Both = sum.OnlyA+l.OnlyA, sum.OnlyB+l.OnlyB, sum.Both+l.Both
		}
		require.Equal(t, all, sum, "seed %d", seed)
		require.InDelta(t, order, d.Order, 1e-9, "seed %d", seed)
		require.Equal(t, displacement, d.Displacement, "seed %d", seed)
		back := Diff(b, a)
		require.Equal(t, Shares{all.OnlyB, all.OnlyA, all.Both}, back.Shares, "seed %d", seed)
		require.InDelta(t, order, back.Order, 1e-9, "seed %d", seed)
	}
}

func TestCovers(t *testing.T) {
	base, lib, app := layerNamed("base", 1000), layerNamed("lib", 1000), layerNamed("app", 1000)
	tr := &Trace{Header: Header{Layers: []Layer{base, lib, {}, base}}, Events: []Event{
		{Layer: 0, Len: 100}, {Layer: 1, Len: 10}, {Layer: 2, Len: 5}, {Layer: 3, Off: 50, Len: 100}, {Layer: 1, Len: 10},
	}}
	device := &Trace{Header: Header{Layers: []Layer{base, lib}, Space: DeviceSpace}, Events: tr.Events[:1]}
	for name, c := range map[string]struct {
		tr        *Trace
		layers    []Layer
		have, all int64
	}{
		"all":                {tr, []Layer{base, lib}, 160, 165},
		"some":               {tr, []Layer{lib, app, {}}, 10, 165},
		"none":               {tr, nil, 0, 165},
		"by digest alone":    {tr, []Layer{{Digest: base.Digest}}, 150, 165},
		"empty":              {&Trace{}, []Layer{base}, 0, 0},
		"unknown layers":     {&Trace{Events: tr.Events[:1]}, []Layer{base}, 0, 100},
		"device":             {device, []Layer{base, lib}, 100, 100},
		"device, other":      {device, []Layer{base, lib, app}, 0, 100},
		"device, none":       {device, nil, 0, 100},
		"device, not listed": {&Trace{Header: Header{Space: DeviceSpace}, Events: tr.Events[:1]}, []Layer{base}, 0, 100},
	} {
		have, all := c.tr.Covers(c.layers)
		require.Equal(t, []int64{c.have, c.all}, []int64{have, all}, name)
	}
}
