package replayer

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// TestGapTable prints what gaps cost and save with real traces, without any
// image: REPRISE_TRACES names them (a glob), which have to say where their bytes
// are in the blobs; REPRISE_CHUNK the cache's chunk size. Of each gap it gives
// the requests and the accuracy, which is the share of the fetched bytes that is
// in compressed blocks that the trace asks for: with every range joined that
// the gap allows, and on three links, where the order of first demand counts.
//
//	REPRISE_TRACES='/tmp/traces/*.trace' go test ./replayer -run TestGapTable -v
func TestGapTable(t *testing.T) {
	glob := os.Getenv("REPRISE_TRACES")
	if glob == "" {
		t.Skip("REPRISE_TRACES names no traces")
	}
	files, err := filepath.Glob(glob)
	require.NoError(t, err)
	var chunk int64
	if s := os.Getenv("REPRISE_CHUNK"); s != "" {
		chunk, err = strconv.ParseInt(s, 10, 64)
		require.NoError(t, err)
	}
	sum := newGapTable()
	for _, file := range files {
		tr, err := tracefmt.Open(file)
		require.NoError(t, err)
		one := newGapTable()
		one.add(t, tr, chunk)
		t.Logf("%s\n%s", filepath.Base(file), one)
		sum.add(t, tr, chunk)
	}
	t.Logf("all %d\n%s", len(files), sum)
}

// tableLinks are the columns of a table; the first has no order.
var tableLinks = []struct {
	name string
	e    backstore.Estimate
	o    Options
}{
	{"any order", backstore.Estimate{}, Options{Horizon: 1 << 60}},
	{"10ms,200mbit", backstore.Estimate{RTT: 10 * time.Millisecond, Bandwidth: 25e6}, Options{}},
	{"30ms,1gbit", backstore.Estimate{RTT: 30 * time.Millisecond, Bandwidth: 125e6}, Options{}},
	{"2ms,2gbit", backstore.Estimate{RTT: 2 * time.Millisecond, Bandwidth: 250e6}, Options{}},
}

// tableGaps are the rows, 0 for what the link makes a gap worth.
var tableGaps = []int64{-1, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 192 << 10, 256 << 10, 0}

type fetches struct {
	requests    int
	need, bytes int64
}

func (f fetches) String() string {
	return fmt.Sprintf("%d\t%.1f %%", f.requests, 100*float64(f.need)/float64(max(f.bytes, 1)))
}

type gapTable struct {
	need   int64
	pieces fetches
	least  int // requests, of any plan with an accuracy of tableAccuracy
	cells  [][]fetches
}

const tableAccuracy = 0.75

func newGapTable() *gapTable {
	g := &gapTable{cells: make([][]fetches, len(tableGaps))}
	for i := range g.cells {
		g.cells[i] = make([]fetches, len(tableLinks))
	}
	return g
}

// storedImage is what the header of a trace knows of its image.
func storedImage(tr *tracefmt.Trace) Image {
	layers := make([]backstore.LayerInfo, len(tr.Layers))
	for i, l := range tr.Layers {
		layers[i] = backstore.LayerInfo{Digest: l.Digest, Size: l.Size}
	}
	return Unopened(layers)
}

func (g *gapTable) add(t *testing.T, tr *tracefmt.Trace, chunk int64) {
	for i, gap := range tableGaps {
		for j, l := range tableLinks {
			o := l.o
			o.Gap, o.Chunk = gap, chunk
			p, err := NewPlan(tr, storedImage(tr), &o)
			require.NoError(t, err)
			if i+j == 0 {
				g.addPieces(p, tr)
				g.least += least(p)
			}
			c := &g.cells[i][j]
			c.need += p.Need
			for w, ok := p.Next(l.e); ok; w, ok = p.Next(l.e) {
				c.requests++
				c.bytes += w.Len
			}
		}
	}
}

// least is how few requests there can be, of any length and in any order.
func least(p *Plan) int {
	n, bytes := p.runs, p.Bytes
	for _, gap := range p.gaps {
		if bytes += gap; float64(p.Need) < tableAccuracy*float64(bytes) {
			break
		}
		n--
	}
	return n
}

// addPieces counts what fetching in aligned pieces of 256 KiB takes.
func (g *gapTable) addPieces(p *Plan, tr *tracefmt.Trace) {
	const piece = 256 << 10
	seen := map[backstore.Want]bool{}
	for _, w := range p.Wants {
		for off := w.Off / piece * piece; off < w.Off+w.Len; off += piece {
			seen[backstore.Want{Layer: w.Layer, Off: off, Len: min(piece, tr.Layers[w.Layer].Size-off)}] = true
		}
	}
	g.need += p.Need
	g.pieces.need += p.Need
	g.pieces.requests += len(seen)
	for w := range seen {
		g.pieces.bytes += w.Len
	}
}

func (g *gapTable) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "the trace asks for %.1f MB; in pieces of 256 KiB: %s\n", float64(g.need)/1e6, strings.Replace(g.pieces.String(), "\t", " requests, ", 1))
	fmt.Fprintf(&b, "with an accuracy of %.0f %%, in any order and length: %d requests at the least\n", 100*tableAccuracy, g.least)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "gap\t")
	for _, l := range tableLinks {
		fmt.Fprintf(w, "%s\t\t", l.name)
	}
	for i, gap := range tableGaps {
		name := fmt.Sprintf("%d KiB", max(gap, 0)>>10)
		if gap == 0 {
			name = "by link"
		}
		fmt.Fprintf(w, "\n%s\t", name)
		for _, c := range g.cells[i] {
			fmt.Fprintf(w, "%v\t", c)
		}
	}
	fmt.Fprintln(w)
	w.Flush()
	return b.String()
}
