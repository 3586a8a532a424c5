package replayer

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// halved is an image whose blobs are half as long as what they decode to.
type halved []backstore.LayerInfo

func (h halved) Layers() []backstore.LayerInfo { return h }

func (h halved) BlobRange(_ int, off, n int64) (int64, int64) {
	return off / 2, (off+n+1)/2 - off/2
}

func layerInfos(sizes ...int64) (ls []backstore.LayerInfo) {
	for i, n := range sizes {
		ls = append(ls, backstore.LayerInfo{Digest: digest.FromString(fmt.Sprint(i)), Size: n / 2, Decoded: n})
	}
	return ls
}

// TestPlan runs the scripts in testdata/plan: the reads of a trace, one a line
// as LAYER:OFF+LEN in KiB of layer space, give the plan, in KiB of blob space.
func TestPlan(t *testing.T) {
	datadriven.RunTest(t, "testdata/plan", func(t *testing.T, d *datadriven.TestData) string {
		o := Options{Gap: -1}
		layers := []int64{1 << 20, 1 << 20}
		for _, a := range d.CmdArgs {
			v, err := strconv.ParseInt(a.FirstVal(t), 10, 64)
			require.NoError(t, err)
			switch a.Key {
			case "gap":
				o.Gap = v << 10
			case "horizon":
				o.Horizon = v << 10
			case "layers":
				layers = make([]int64, v)
				for i := range layers {
					layers[i] = 1 << 20
				}
			}
		}
		tr := parseTrace(t, d.Input)
		p, err := NewPlan(tr, halved(layerInfos(layers...)), &o)
		if err != nil {
			return "error: " + err.Error() + "\n"
		}
		var b strings.Builder
		for _, w := range p.Wants {
			fmt.Fprintf(&b, "%d:%s+%s\n", w.Layer, kib(w.Off), kib(w.Len))
		}
		fmt.Fprintf(&b, "need %s KiB, fetch %s KiB, coverage %.2f, layers missing %d\n",
			kib(p.Need), kib(p.Bytes), p.Coverage(), p.Missing)
		return b.String()
	})
}

func kib(n int64) string { return strconv.FormatFloat(float64(n)/1024, 'f', -1, 64) }

func parseTrace(t *testing.T, script string) *tracefmt.Trace {
	tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.LayerSpace}}
	for i, line := range strings.Fields(script) {
		var e tracefmt.Event
		_, err := fmt.Sscanf(line, "%d:%d+%d", &e.Layer, &e.Off, &e.Len)
		require.NoError(t, err, line)
		e.Off, e.Len, e.At = e.Off<<10, e.Len<<10, time.Duration(i)*time.Millisecond
		tr.Events = append(tr.Events, e)
		for len(tr.Layers) <= e.Layer {
			tr.Layers = append(tr.Layers, tracefmt.Layer{Digest: digest.FromString(fmt.Sprint(len(tr.Layers)))})
		}
	}
	return tr
}

// Whatever the trace, a plan covers all of its bytes, once, within the layers.
func TestPlanCoversTheTrace(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 9))
	for range 200 {
		const size = 64 << 10
		im := halved(layerInfos(size, size, size))
		tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.LayerSpace}}
		for i := range r.IntN(200) {
			e := tracefmt.Event{Layer: r.IntN(3), Off: r.Int64N(size), At: time.Duration(i)}
			e.Len = min(1+r.Int64N(3000), size-e.Off)
			tr.Events = append(tr.Events, e)
		}
		o := Options{Gap: r.Int64N(3000) - 500, Horizon: 1 + r.Int64N(40_000)}
		p, err := NewPlan(tr, im, &o)
		require.NoError(t, err)
		var planned [3][size / 2]int
		for _, w := range p.Wants {
			for i := w.Off; i < w.Off+w.Len; i++ {
				planned[w.Layer][i]++
			}
		}
		for _, e := range tr.Events {
			off, n := im.BlobRange(e.Layer, e.Off, e.Len)
			for i := off; i < off+n; i++ {
				if planned[e.Layer][i] != 1 {
					t.Fatalf("byte %d of layer %d is planned %d times", i, e.Layer, planned[e.Layer][i])
				}
			}
		}
		require.LessOrEqual(t, p.Need, p.Bytes)
	}
}

func TestPlanRefusesDeviceSpace(t *testing.T) {
	tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.DeviceSpace}}
	_, err := NewPlan(tr, halved(layerInfos(1<<20)), nil)
	require.ErrorContains(t, err, "device space")
}

func TestUseless(t *testing.T) {
	for name, tc := range map[string]struct {
		now  backstore.Stats
		want bool
	}{
		"too early":    {backstore.Stats{BackgroundBytes: 1 << 20, DemandRequests: 100}, false},
		"no misses":    {backstore.Stats{BackgroundBytes: 20 << 20, DemandRequests: 3}, false},
		"nothing used": {backstore.Stats{BackgroundBytes: 20 << 20, DemandRequests: 100}, true},
		"well used":    {backstore.Stats{BackgroundBytes: 20 << 20, DemandRequests: 100, Used: 10 << 20}, false},
	} {
		require.Equal(t, tc.want, useless(backstore.Stats{}, tc.now), name)
	}
}

func FuzzPlan(f *testing.F) {
	f.Add(int64(0), int64(100), int64(50), int64(4096), 0)
	f.Fuzz(func(t *testing.T, off, n, off2, n2 int64, layer int) {
		tr := &tracefmt.Trace{Events: []tracefmt.Event{{Layer: layer, Off: off, Len: n}, {Off: off2, Len: n2}}}
		p, err := NewPlan(tr, halved(layerInfos(1<<20, 1<<20)), nil)
		if err != nil {
			return
		}
		for _, w := range p.Wants {
			if w.Layer < 0 || w.Layer > 1 || w.Off < 0 || w.Len <= 0 || w.Off+w.Len > 1<<19 {
				t.Fatalf("want %+v is outside of the image", w)
			}
		}
	})
}
