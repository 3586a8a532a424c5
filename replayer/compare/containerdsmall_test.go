package compare

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// smallImage is one program that serves.
func smallImage(t *testing.T, dir string) *DemoImage {
	work := t.TempDir()
	layer := filepath.Join(work, "0")
	require.NoError(t, os.Mkdir(layer, 0o755))
	cmd := exec.Command("go", "build", "-o", filepath.Join(layer, "serve"), filepath.Join("testdata", "coldstart", "serve.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	entries, err := readLayer(layer)
	require.NoError(t, err)
	b := &pkgBuilder{dir: dir, say: func(string, ...any) {}}
	r := recipe{name: "small", config: ocispec.ImageConfig{Env: env(), Entrypoint: []string{"/serve"}}}
	layout := filepath.Join(dir, "small")
	require.NoError(t, b.writeLayout(t.Context(), r, work, layout, []demoLayer{{name: "COPY serve", entries: entries}}))
	im, err := openDemoImage(layout)
	require.NoError(t, err)
	return im
}

// TestThroughContainerd makes one comparison through a real containerd, of a small
// image and without a look at the clock.
func TestThroughContainerd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it starts containers")
	}
	bin := os.Getenv(envContainerd)
	if _, err := programs(bin); err != nil {
		t.Skipf("needs containerd and runc: %v", err)
	}
	dir := t.TempDir()
	site, err := openColdSite(t.Context(), dir, codec(t), program(t), t.Logf)
	require.NoError(t, err)
	defer func() { require.NoError(t, site.Close()) }()
	site.originals["small"] = smallImage(t, dir)
	_, err = site.convert(t.Context(), site.originals["small"], site.ref("small"))
	require.NoError(t, err)
	require.NoError(t, site.original(t.Context(), "small"))
	require.NoError(t, site.trace(t.Context(), "small"))

	s, err := newCtrdSite(t.Context(), site, "small", bin)
	require.NoError(t, err)
	r, err := s.compare(t.Context(), "1ms,unlimited", 2)
	require.NoError(t, err)
	require.NoError(t, s.close())
	require.Empty(t, mountsBelow(dir))

	for _, m := range []Mode{OverlayFS, Containerd, Local, Direct} {
		f := r.Modes[m]
		require.Len(t, f.Ready.Runs, 2, m)
		require.Positive(t, f.Process.Min, m)
		require.Positive(t, f.Ready.Min, m)
	}
	require.Positive(t, r.Modes[Containerd].Coverage.Min)
	require.Positive(t, r.Modes[Containerd].CPU.Min)
	for _, key := range []string{"reprise/run", ownStart, "overlayfs/reprise"} {
		require.Len(t, r.Paired[key].Runs, 2, key)
		require.Positive(t, r.Paired[key].Median, key)
	}
	require.Less(t, r.Paired[ownStart].Median, r.Paired["reprise/run"].Median)
	require.Contains(t, fmt.Sprint(r.Typical[Containerd]), "pulled ")
	var table strings.Builder
	require.NoError(t, writeContainerd(&table, []*ctrdResult{r}))
	require.Equal(t, 4, strings.Count(table.String(), "1ms,unlimited")-1) // a row a way, and one of ratios
}

func TestReadyLog(t *testing.T) {
	for _, tt := range []struct {
		name   string
		writes []string
		ready  bool
	}{
		{"nothing", nil, false},
		{"at once", []string{"ready on 8080\n"}, true},
		{"in pieces", []string{"starting\nrea", "dy on", " 8080", "\nmore\n"}, true},
		{"not a whole line", []string{"ready on 8080"}, false},
		{"not at the beginning of a line", []string{"I am ready on 8080\n"}, false},
		{"twice", []string{"ready on 1\nready on 2\n", "ready on 3\n"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newReadyLog()
			for _, p := range tt.writes {
				n, err := l.Write([]byte(p))
				require.NoError(t, err)
				require.Equal(t, len(p), n)
			}
			require.Equal(t, strings.Join(tt.writes, ""), l.String())
			var at time.Time
			select {
			case at = <-l.ready:
			default:
			}
			require.Equal(t, tt.ready, !at.IsZero())
			require.Empty(t, l.ready)
		})
	}
}

// What containerd takes by itself is added to what the starts are compared with.
func TestPairOwnStart(t *testing.T) {
	figures := func(ready, process []float64) *Figures {
		return &Figures{Ready: newSeries(ready), Process: newSeries(process)}
	}
	r := &ctrdResult{Result: &Result{Paired: map[string]*Ratio{}, Modes: map[Mode]*Figures{
		Containerd: figures([]float64{1.2, 2, 3}, []float64{0, 0, 0}),
		Direct:     figures([]float64{1, 1.5, 3}, []float64{0, 0, 0}),
		Local:      figures([]float64{9, 9, 9}, []float64{0.2, 0.5, 0}),
	}}}
	r.pairOwnStart()
	require.Equal(t, []float64{1, 1, 1}, r.Paired[ownStart].Runs)
	r.Modes[Local] = figures([]float64{9, 9, 9}, []float64{0.6, 0.1, 1})
	r.pairOwnStart()
	require.InDeltaSlice(t, []float64{0.75, 1.25, 0.75}, r.Paired[ownStart].Runs, 1e-9)
	require.InDelta(t, 0.75, r.Paired[ownStart].Median, 1e-9)
}

// Starts that were not what they claim to be are no result.
func TestContainerdCheck(t *testing.T) {
	for _, tt := range []struct {
		local, bytes float64
		want         string
	}{
		{0, 1000, ""},
		{1, 1000, "made 1 requests"},
		{0, 999, "fetched 999 of 1000 bytes"},
	} {
		r := &ctrdResult{Result: &Result{Modes: map[Mode]*Figures{
			Local:     {Requests: newSeries([]float64{0, tt.local})},
			OverlayFS: {Bytes: newSeries([]float64{5000, tt.bytes})},
		}}}
		if err := r.check(1000); tt.want == "" {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, tt.want)
		}
	}
}
