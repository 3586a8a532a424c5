package lsmt

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

const modelSectors = 512

var modelSteps = flag.Int("model-steps", 150, "steps of each run of the model test")

// A model is what a writable layer should be.
type model struct {
	kind []Kind // of each sector
	data []byte
}

func newModel(sectors int64) *model {
	return &model{kind: make([]Kind, sectors), data: make([]byte, sectors*SectorSize)}
}

func (m *model) clone() *model {
	return &model{slices.Clone(m.kind), slices.Clone(m.data)}
}

// A change is a write, or a discard if fill is 0. Numbers are sectors.
type change struct {
	off, n int64
	fill   byte
	// How long the files were when it was done, in bytes.
	logEnd, dataEnd int64
}

func (m *model) apply(c change) {
	k := Data
	if c.fill == 0 {
		k = Zero
	}
	for s := c.off; s < c.off+c.n; s++ {
		m.kind[s] = k
	}
	copy(m.data[c.off*SectorSize:], bytes.Repeat([]byte{c.fill}, int(c.n*SectorSize)))
}

// check compares w with the model, through Lookup, ReadAt and Commit.
func (m *model) check(t *testing.T, w *Writable, r *rand.Rand) {
	t.Helper()
	size := int64(len(m.data))
	m.checkSegments(t, w.Lookup(nil, 0, size))
	sameBytes(t, m.data, content(t, w), "content")
	for range 4 {
		off := r.Int64N(size/SectorSize) * SectorSize
		p := make([]byte, r.Int64N((size-off)/SectorSize+1)*SectorSize)
		n, err := w.ReadAt(p, off)
		require.NoError(t, err)
		sameBytes(t, m.data[off:][:len(p)], p[:n], "part")
	}
	m.checkLayer(t, openLayer(t, commit(t, w, CommitOptions{})))
}

func (m *model) checkLayer(t *testing.T, l *Layer) {
	t.Helper()
	m.checkSegments(t, l.Index().Lookup(nil, 0, int64(len(m.data))))
	sameBytes(t, m.data, device(t, l), "committed")
}

func (m *model) checkSegments(t *testing.T, segs []Segment) {
	t.Helper()
	got := make([]Kind, 0, len(m.kind))
	for _, s := range segs {
		require.EqualValues(t, len(got), s.Off/SectorSize)
		got = append(got, slices.Repeat([]Kind{s.Kind}, int(s.Len/SectorSize))...)
	}
	require.True(t, slices.Equal(m.kind, got), "kinds\nwant %v\ngot  %v", m.kind, got)
}

// TestModel does random things to a layer and compares it with a slice. The
// unit of a sparse layer is 4 KiB: a reopening knows no smaller holes.
func TestModel(t *testing.T) {
	for _, kind := range []string{"append", "sparse", "logged"} {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("%s/seed=%d", kind, seed), func(t *testing.T) {
				newModelRun(t, kind, seed).run()
			})
		}
	}
}

type modelRun struct {
	t      *testing.T
	r      *rand.Rand
	w      *Writable
	unit   int64 // sectors
	now    *model
	synced *model   // at the last sync; what came after is in since
	since  []change // append-only layers only
	// How long the files were at the last sync.
	logSynced, dataSynced int64
}

// newModelRun makes a layer: append-only, sparse, or sparse with a discard log.
func newModelRun(t *testing.T, kind string, seed uint64) *modelRun {
	const sectors = modelSectors
	m := &modelRun{t: t, r: rand.New(rand.NewPCG(seed, 7)), unit: 1, now: newModel(sectors)}
	o := &WritableOptions{VirtualSize: sectors * SectorSize}
	var err error
	switch kind {
	case "append":
		m.w, err = CreateAppend(newFile(t), newFile(t), o)
	case "logged":
		o.Discards = newFile(t)
		fallthrough
	default:
		m.unit = 8
		m.w, err = CreateSparse(newFile(t), o)
	}
	require.NoError(t, err)
	m.sync()
	return m
}

func (m *modelRun) run() {
	for range *modelSteps {
		switch p := m.r.IntN(100); {
		case p < 60:
			m.change(byte(1 + m.r.IntN(255)))
		case p < 80:
			m.change(0)
		case p < 88:
			m.sync()
		case p < 93:
			m.reopen()
		case p < 97 && m.w.log != nil:
			m.crash()
		default:
			m.now.check(m.t, m.w, m.r)
		}
	}
	m.now.check(m.t, m.w, m.r)
	m.seal()
}

func (m *modelRun) change(fill byte) { m.do(m.pick(fill)) }

func (m *modelRun) pick(fill byte) change {
	units := int64(len(m.now.kind)) / m.unit
	off := m.r.Int64N(units)
	n := min(1+m.r.Int64N(1+m.r.Int64N(64)), units-off)
	return change{off: off * m.unit, n: n * m.unit, fill: fill}
}

func (m *modelRun) do(c change) {
	if c.fill == 0 {
		require.NoError(m.t, m.w.Discard(c.off*SectorSize, c.n*SectorSize))
	} else {
		p := bytes.Repeat([]byte{c.fill}, int(c.n*SectorSize))
		_, err := m.w.WriteAt(p, c.off*SectorSize)
		require.NoError(m.t, err)
	}
	c.logEnd, c.dataEnd = m.w.logEnd, m.w.dataEnd.Load()*SectorSize
	m.now.apply(c)
	m.since = append(m.since, c)
}

func (m *modelRun) sync() {
	require.NoError(m.t, m.w.Sync())
	m.keep()
}

// keep lets the next crash lose nothing of what there is now.
func (m *modelRun) keep() {
	m.synced, m.since = m.now.clone(), nil
	m.logSynced, m.dataSynced = m.w.logEnd, m.w.dataEnd.Load()*SectorSize
}

// reopen closes and opens; a sparse layer without a log forgets what was
// discarded.
func (m *modelRun) reopen() {
	require.NoError(m.t, m.w.Close())
	var err error
	if l := m.w.discards; l != nil {
		m.w, err = OpenSparse(reopen(m.t, m.w.data), reopen(m.t, l.f))
	} else if m.w.log == nil {
		m.w, err = OpenSparse(reopen(m.t, m.w.data), nil)
		for i, k := range m.now.kind {
			if k == Zero {
				m.now.kind[i] = Hole
			}
		}
	} else {
		m.w, err = OpenAppend(reopen(m.t, m.w.data), reopen(m.t, m.w.log))
	}
	require.NoError(m.t, err)
	require.Zero(m.t, m.w.Dropped())
	m.now.check(m.t, m.w, m.r)
}

// crash loses an arbitrary part of what came after the last sync, from the end
// of either file.
func (m *modelRun) crash() {
	logEnd, dataEnd := m.w.logEnd, m.w.dataEnd.Load()*SectorSize
	require.NoError(m.t, m.w.Close())
	data, log := reopen(m.t, m.w.data), reopen(m.t, m.w.log)
	logEnd = m.logSynced + m.r.Int64N(logEnd-m.logSynced+1)
	require.NoError(m.t, log.Truncate(logEnd))
	if m.r.IntN(2) == 0 {
		dataEnd = m.dataSynced + m.r.Int64N(dataEnd-m.dataSynced+1)
		require.NoError(m.t, data.Truncate(dataEnd))
	}
	m.now = m.synced.clone()
	for _, c := range m.since {
		if c.logEnd > logEnd || c.fill != 0 && c.dataEnd > dataEnd {
			break
		}
		m.now.apply(c)
	}
	var err error
	m.w, err = OpenAppend(data, log)
	require.NoError(m.t, err)
	m.now.check(m.t, m.w, m.r)
	m.keep()
}

func (m *modelRun) seal() {
	require.NoError(m.t, m.w.Seal())
	m.now.check(m.t, m.w, m.r)
	b, err := os.ReadFile(m.w.data.Name())
	require.NoError(m.t, err)
	m.now.checkLayer(m.t, openLayer(m.t, b))
	_, err = m.w.WriteAt(make([]byte, SectorSize), 0)
	require.ErrorIs(m.t, err, os.ErrPermission)
	require.NoError(m.t, m.w.Close())
}

// TestKindsCommitAlike does the same to all kinds of layer: they must commit to
// the same bytes, also after those were reopened that remember discards, and so
// must a layer made from that.
func TestKindsCommitAlike(t *testing.T) {
	for seed := range uint64(4) {
		a, s, l := newModelRun(t, "append", seed), newModelRun(t, "sparse", seed), newModelRun(t, "logged", seed)
		for range 200 {
			c := s.pick(byte(max(0, s.r.IntN(280)-24)))
			a.do(c)
			s.do(c)
			l.do(c)
		}
		want := commit(t, s.w, CommitOptions{})
		sameBytes(t, want, commit(t, a.w, CommitOptions{}), "append-only")
		a.reopen()
		sameBytes(t, want, commit(t, a.w, CommitOptions{}), "append-only, reopened")
		sameBytes(t, want, commit(t, l.w, CommitOptions{}), "with a discard log")
		l.reopen()
		sameBytes(t, want, commit(t, l.w, CommitOptions{}), "with a discard log, reopened")
		require.NoError(t, l.w.Close())
		sameBytes(t, want, recommit(t, want), "recommitted")
		require.NoError(t, a.w.Close())
		require.NoError(t, s.w.Close())
	}
}

// recommit writes what a layer has to a new layer and commits that.
func recommit(t *testing.T, b []byte) []byte {
	t.Helper()
	l := openLayer(t, b)
	w, err := CreateAppend(newFile(t), newFile(t), &WritableOptions{
		VirtualSize: l.VirtualSize(), UUID: l.UUID(), ParentUUID: l.ParentUUID(),
	})
	require.NoError(t, err)
	for s := range l.Index().All() {
		if s.Kind == Zero {
			require.NoError(t, w.Discard(s.Off, s.Len))
			continue
		}
		_, err := w.WriteAt(b[s.LayerOff:][:s.Len], s.Off)
		require.NoError(t, err)
	}
	got := commit(t, w, CommitOptions{UUID: l.UUID(), Message: l.Message()})
	require.NoError(t, w.Close())
	return got
}

// TestStackModel writes three layers on top of each other and compares the
// merged stack with a slice.
func TestStackModel(t *testing.T) {
	for seed := range uint64(10) {
		var layers []*Layer
		all := newModel(modelSectors)
		for i := range uint64(5) {
			m := newModelRun(t, []string{"append", "sparse"}[i%2], seed*10+i)
			for range 60 {
				m.change(byte(max(0, m.r.IntN(320)-64)))
				all.apply(m.since[len(m.since)-1])
			}
			layers = append(layers, openLayer(t, commit(t, m.w, CommitOptions{})))
			require.NoError(t, m.w.Close())
		}
		sameBytes(t, all.data, device(t, layers...), "stack")
		x, err := Merge(layers)
		require.NoError(t, err)
		all.checkSegments(t, x.Lookup(nil, 0, int64(len(all.data))))
	}
}
