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

// TestPlan runs the scripts in testdata/plan. All numbers are KiB, of blob
// space but for the layers' sizes, and an image's layers are twice as long as
// their blobs.
//
//	plan [gap=N] [horizon=N] [requests=N] [chunk=N] [layers=N] [unopened] [trial]
//	    the reads of a trace, one a line as LAYER:OFF+LEN
//	next [link=DELAY,RATE] [throttled] [n=N]    what is fetched next, RATE in MB/s
//	around LAYER:OFF+LEN [link=…]    what a demand miss fetches
//	here LAYER:OFF+LEN …             what is on the node when the replay begins
func TestPlan(t *testing.T) {
	datadriven.Walk(t, "testdata/plan", func(t *testing.T, path string) {
		var s planScript
		datadriven.RunTest(t, path, s.run)
	})
}

type planScript struct {
	p    *Plan
	link backstore.Estimate
}

func (s *planScript) run(t *testing.T, d *datadriven.TestData) string {
	if d.HasArg("link") {
		s.link = parseLink(t, d)
	}
	var out strings.Builder
	switch d.Cmd {
	case "plan":
		s.link = backstore.Estimate{}
		return s.plan(t, d)
	case "next":
		s.link.Throttled = d.HasArg("throttled")
		n := -1
		d.MaybeScanArgs(t, "n", &n)
		for ; n != 0; n-- {
			w, ok := s.p.Next(s.link)
			if !ok {
				out.WriteString("end\n")
				break
			}
			out.WriteString(wantString(w))
		}
	case "around":
		return wantString(s.p.Around(parseWant(t, d.CmdArgs[0].Key), s.link))
	case "here":
		n := s.p.drop(func(w backstore.Want) bool {
			for _, a := range d.CmdArgs {
				h := parseWant(t, a.Key)
				if h.Layer == w.Layer && h.Off <= w.Off && w.Off+w.Len <= h.Off+h.Len {
					return true
				}
			}
			return false
		})
		return fmt.Sprintf("%s KiB are here\n", kib(n))
	default:
		d.Fatalf(t, "unknown command")
	}
	return out.String()
}

func (s *planScript) plan(t *testing.T, d *datadriven.TestData) string {
	o := Options{Chunk: 1, Requests: -1, Trial: d.HasArg("trial")}
	for key, p := range map[string]*int64{"gap": &o.Gap, "horizon": &o.Horizon, "chunk": &o.Chunk} {
		var n int64
		if d.MaybeScanArgs(t, key, &n) {
			*p = n << 10
		}
	}
	d.MaybeScanArgs(t, "requests", &o.Requests)
	layers := 2
	d.MaybeScanArgs(t, "layers", &layers)
	sizes := make([]int64, layers)
	for i := range sizes {
		sizes[i] = 32 << 20
	}
	infos := layerInfos(sizes...)
	tr := parseTrace(t, d.Input)
	var im Image = halved(infos)
	if d.HasArg("unopened") {
		for i := range infos {
			infos[i].Decoded = 0
		}
		im = Unopened(infos)
	}
	if !d.HasArg("unlocated") {
		for i, e := range tr.Events {
			tr.Events[i].BlobOff, tr.Events[i].BlobLen = halved(infos).BlobRange(e.Layer, e.Off, e.Len)
		}
	}
	p, err := NewPlan(tr, im, &o)
	if err != nil {
		return "error: " + err.Error() + "\n"
	}
	s.p = p
	return fmt.Sprintf("need %s KiB, with whole chunks %s, in %d ranges, coverage %.2f, layers missing %d, dropped %d\n",
		kib(p.Need), kib(p.Bytes), len(p.Wants), p.Coverage(), p.Missing, p.Dropped)
}

func kib(n int64) string { return strconv.FormatFloat(float64(n)/1024, 'f', -1, 64) }

func wantString(w backstore.Want) string {
	return fmt.Sprintf("%d:%s+%s\n", w.Layer, kib(w.Off), kib(w.Len))
}

func parseWant(t *testing.T, s string) (w backstore.Want) {
	_, err := fmt.Sscanf(s, "%d:%d+%d", &w.Layer, &w.Off, &w.Len)
	require.NoError(t, err, s)
	w.Off, w.Len = w.Off<<10, w.Len<<10
	return w
}

func parseLink(t *testing.T, d *datadriven.TestData) (e backstore.Estimate) {
	var delay, rate string
	d.ScanArgs(t, "link", &delay, &rate)
	var err error
	e.RTT, err = time.ParseDuration(delay)
	require.NoError(t, err)
	mb, err := strconv.ParseInt(rate, 10, 64)
	require.NoError(t, err)
	e.Bandwidth = mb * 1e6
	return e
}

// parseTrace reads events whose places are those in the blobs of halved.
func parseTrace(t *testing.T, script string) *tracefmt.Trace {
	tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.LayerSpace}}
	for i, line := range strings.Fields(script) {
		w := parseWant(t, line)
		e := tracefmt.Event{Layer: w.Layer, Off: 2 * w.Off, Len: 2 * w.Len, At: time.Duration(i) * time.Millisecond}
		tr.Events = append(tr.Events, e)
		for len(tr.Layers) <= e.Layer {
			tr.Layers = append(tr.Layers, tracefmt.Layer{Digest: digest.FromString(fmt.Sprint(len(tr.Layers)))})
		}
	}
	return tr
}

// randomTrace has reads all over layers of size bytes.
func randomTrace(r *rand.Rand, layers int, size int64, reads int) *tracefmt.Trace {
	tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.LayerSpace}}
	for i := range reads {
		e := tracefmt.Event{Layer: r.IntN(layers), Off: r.Int64N(size), At: time.Duration(i)}
		e.Len = min(1+r.Int64N(size/20), size-e.Off)
		e.BlobOff, e.BlobLen = halved(nil).BlobRange(e.Layer, e.Off, e.Len)
		tr.Events = append(tr.Events, e)
	}
	for i := range layers {
		tr.Layers = append(tr.Layers, tracefmt.Layer{Digest: digest.FromString(fmt.Sprint(i)), Size: size / 2})
	}
	return tr
}

func randomEstimate(r *rand.Rand) backstore.Estimate {
	return backstore.Estimate{RTT: time.Duration(r.IntN(100)) * time.Millisecond, Bandwidth: r.Int64N(300e6)}
}

// Whatever the trace, the link and the demand, each byte that is asked for is
// fetched once, nothing else but gaps is, all within the blobs, and what is
// fetched next begins with the first that is missing.
func TestPlanFetchesTheTraceOnce(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 9))
		size := int64(16<<10) << r.IntN(5)
		im := halved(layerInfos(size, size, size))
		tr := randomTrace(r, 3, size, r.IntN(200))
		o := Options{Chunk: 1 << r.IntN(13), Requests: r.IntN(40) - 1}
		exact := r.IntN(3) == 0
		if exact {
			o.Gap, o.Chunk = -1, 1
		}
		p, err := NewPlan(tr, im, &o)
		require.NoError(t, err)
		fetched := make([][]int8, 3)
		for i := range fetched {
			fetched[i] = make([]int8, size/2)
		}
		wanted := make([][]bool, 3)
		for i := range wanted {
			wanted[i] = make([]bool, size/2)
		}
		for _, w := range p.Wants {
			for i := w.Off; i < w.Off+w.Len; i++ {
				wanted[w.Layer][i] = true
			}
		}
		var sum int64
		fetch := func(w backstore.Want) {
			require.GreaterOrEqual(t, w.Off, int64(0))
			require.LessOrEqual(t, w.Off+w.Len, size/2)
			sum += w.Len
			for i := w.Off; i < w.Off+w.Len; i++ {
				if fetched[w.Layer][i]++; wanted[w.Layer][i] && fetched[w.Layer][i] > 1 {
					t.Fatalf("seed %d: byte %d of layer %d is fetched again by %v", seed, i, w.Layer, w)
				}
			}
		}
		for ended := false; !ended; {
			if !exact && r.IntN(4) == 0 { // a miss of something that nobody fetches
				w := backstore.Want{Layer: r.IntN(3), Off: r.Int64N(size / 2)}
				if fetched[w.Layer][w.Off] == 0 {
					w.Len = 1
					for w.Len < 4000 && w.Off+w.Len < size/2 && fetched[w.Layer][w.Off+w.Len] == 0 {
						w.Len++
					}
					got := p.Around(w, randomEstimate(r))
					require.Equal(t, w.Off, got.Off)
					require.GreaterOrEqual(t, got.Len, w.Len)
					fetch(got)
				}
				continue
			}
			first := backstore.Want{Layer: -1}
			for _, w := range p.Wants {
				for i := w.Off; i < w.Off+w.Len && first.Layer < 0; i++ {
					if fetched[w.Layer][i] == 0 {
						first = backstore.Want{Layer: w.Layer, Off: i}
					}
				}
			}
			e := randomEstimate(r)
			w, ok := p.Next(e)
			if ended = !ok; ended {
				require.Equal(t, -1, first.Layer, "seed %d", seed)
				break
			}
			if w.Layer != first.Layer || first.Off < w.Off || first.Off >= w.Off+w.Len {
				t.Fatalf("seed %d: %v does not have the first that is missing, %v", seed, w, first)
			}
			require.LessOrEqual(t, w.Len, e.Piece())
			fetch(w)
		}
		if exact {
			require.Equal(t, p.Need, sum, "without gaps all that is fetched is asked for")
		}
	}
}

// From the places in the trace comes the plan that an open image gives.
func TestPlanUnopened(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	infos := layerInfos(1<<20, 1<<20)
	tr := randomTrace(r, 2, 1<<20, 100)
	want, err := NewPlan(tr, halved(infos), nil)
	require.NoError(t, err)
	for i := range infos {
		infos[i].Decoded = 0
	}
	got, err := NewPlan(tr, Unopened(infos), nil)
	require.NoError(t, err)
	require.Equal(t, want.Need, got.Need)
	require.Equal(t, want.Bytes, got.Bytes)
	require.Equal(t, want.Coverage(), got.Coverage())

	tr.Events[50].BlobLen = 0
	_, err = NewPlan(tr, Unopened(infos), nil)
	require.ErrorIs(t, err, ErrNotLocated)
}

func TestPlanRefusesDeviceSpace(t *testing.T) {
	tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.DeviceSpace}}
	_, err := NewPlan(tr, halved(layerInfos(1<<20)), nil)
	require.ErrorContains(t, err, "device space")
}

func TestPlanIsBounded(t *testing.T) {
	const huge = 1 << 60
	infos := []backstore.LayerInfo{{Digest: digest.FromString("0"), Size: huge}}
	tr := &tracefmt.Trace{
		Header: tracefmt.Header{Layers: []tracefmt.Layer{{Digest: infos[0].Digest}}},
		Events: []tracefmt.Event{{Len: 4096, BlobLen: 4096}, {Off: 4096, Len: huge - 4096, BlobOff: 4096, BlobLen: huge - 4096}},
	}
	p, err := NewPlan(tr, Unopened(infos), nil)
	require.NoError(t, err)
	require.Equal(t, []int64{4096, 1}, []int64{p.Bytes, int64(p.Dropped)})
}

func FuzzPlan(f *testing.F) {
	f.Add(int64(0), int64(100), int64(50), int64(4096), int64(0), int64(60), int64(1<<19), 0, false)
	f.Add(int64(0), int64(100), int64(50), int64(4096), int64(-1), int64(1<<62), int64(1<<62), 1, true)
	f.Fuzz(func(t *testing.T, off, n, off2, n2, at, len, size int64, layer int, stored bool) {
		tr := &tracefmt.Trace{Events: []tracefmt.Event{
			{Layer: layer, Off: off, Len: n, BlobOff: at, BlobLen: len},
			{Off: off2, Len: n2, BlobOff: len, BlobLen: at},
		}}
		infos := layerInfos(1<<20, 1<<20)
		im := Image(halved(infos))
		if stored {
			infos[0].Size, infos[0].Decoded, infos[1].Decoded = size, 0, 0
			im = Unopened(infos)
		}
		p, err := NewPlan(tr, im, nil)
		if err != nil {
			return
		}
		check := func(w backstore.Want) {
			if w.Layer < 0 || w.Layer > 1 || w.Off < 0 || w.Len <= 0 || w.Len > infos[w.Layer].Size-w.Off {
				t.Fatalf("want %+v is outside of the image", w)
			}
		}
		if l := infos[0].Size; at >= 0 && at < l {
			check(p.Around(backstore.Want{Off: at, Len: min(l-at, 4096)}, backstore.Estimate{}))
		}
		for range 1000 {
			w, ok := p.Next(backstore.Estimate{})
			if !ok {
				return
			}
			check(w)
		}
	})
}
