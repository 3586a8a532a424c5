package compare

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

// breakdownTrace has two processes that read three files and what is none.
func breakdownTrace() *tracefmt.Trace {
	const ms = time.Millisecond
	return &tracefmt.Trace{
		Header: tracefmt.Header{Start: time.Unix(1, 0), Space: tracefmt.LayerSpace, Layers: []tracefmt.Layer{
			{Digest: digest.FromString("0"), Decoded: 1 << 20}, {}, {Digest: digest.FromString("2"), Decoded: 1 << 30},
		}},
		Events: []tracefmt.Event{
			{At: 1 * ms, Wait: 5 * ms, Off: 0, Len: 4096, Process: "init", Pid: 1},
			{At: 2 * ms, Wait: 10 * ms, Off: 8192, Len: 4096, Path: "/usr/lib/a", Process: "sh", Pid: 2, Container: "c"},
			// A read over two files, one behind the other:
			{At: 3 * ms, Wait: 20 * ms, Off: 4096, Len: 4096, Path: "/usr/lib/b", FileOff: 4096, Process: "sh", Pid: 2, Container: "c"},
			{At: 3 * ms, Wait: 20 * ms, Off: 12288, Len: 100, Path: "/usr/lib/a", FileOff: 4096, Process: "sh", Pid: 2, Container: "c"},
			// Again, and more:
			{At: 70 * ms, Wait: 1 * ms, Off: 8192, Len: 8192, Path: "/usr/lib/a", Process: "init", Pid: 1},
			{At: 100 * ms, Layer: 2, Off: 1 << 20, Len: 1000, Path: "/etc/x\n", Process: "sh", Pid: 3, Container: "c"},
		},
	}
}

// table is a breakdown as text, for tests.
func (d *Breakdown) table() string {
	var b strings.Builder
	for _, s := range append(d.Rows, d.Total) {
		fmt.Fprintf(&b, "%q %d bytes, %d pieces, %d reads, %d files, %v to %v, wait %v, seen %.2f", s.Name, s.Bytes, s.Extents, s.Reads, s.Files, s.First, s.Last, s.Wait, s.Seen)
		if s.Pid != 0 || s.Container != "" {
			fmt.Fprintf(&b, ", pid %d in %q", s.Pid, s.Container)
		}
		if s.Of != 0 {
			fmt.Fprintf(&b, ", of %d", s.Of)
		}
		b.WriteString("\n")
	}
	return strings.TrimSpace(b.String())
}

func TestBreakdown(t *testing.T) {
	const total = `"" 17384 bytes, 2 pieces, 5 reads, 3 files, 1ms to 100ms, wait 36ms, seen 1.00`
	tests := []struct {
		o    BreakdownOptions
		want string
	}{
		{BreakdownOptions{By: ByFile}, `
"/usr/lib/a" 8192 bytes, 1 pieces, 3 reads, 1 files, 2ms to 70ms, wait 31ms, seen 1.00
"" 4096 bytes, 1 pieces, 1 reads, 0 files, 1ms to 1ms, wait 5ms, seen 1.00
"/usr/lib/b" 4096 bytes, 1 pieces, 1 reads, 1 files, 3ms to 3ms, wait 20ms, seen 1.00
"/etc/x\n" 1000 bytes, 1 pieces, 1 reads, 1 files, 100ms to 100ms, wait 0s, seen 1.00`},
		{BreakdownOptions{By: ByDir, Sort: SortFirst}, `
"" 4096 bytes, 1 pieces, 1 reads, 0 files, 1ms to 1ms, wait 5ms, seen 1.00
"/usr/lib" 12288 bytes, 1 pieces, 3 reads, 2 files, 2ms to 70ms, wait 31ms, seen 1.00
"/etc" 1000 bytes, 1 pieces, 1 reads, 1 files, 100ms to 100ms, wait 0s, seen 1.00`},
		{BreakdownOptions{By: ByDir, Depth: 1, Sort: SortName}, `
"" 4096 bytes, 1 pieces, 1 reads, 0 files, 1ms to 1ms, wait 5ms, seen 1.00
"/etc" 1000 bytes, 1 pieces, 1 reads, 1 files, 100ms to 100ms, wait 0s, seen 1.00
"/usr" 12288 bytes, 1 pieces, 3 reads, 2 files, 2ms to 70ms, wait 31ms, seen 1.00`},
		{BreakdownOptions{By: ByProcess, Sort: SortWait}, `
"sh" 8292 bytes, 1 pieces, 2 reads, 2 files, 2ms to 3ms, wait 30ms, seen 1.00, pid 2 in "c"
"init" 8092 bytes, 2 pieces, 2 reads, 1 files, 1ms to 70ms, wait 6ms, seen 1.00, pid 1 in ""
"sh" 1000 bytes, 1 pieces, 1 reads, 1 files, 100ms to 100ms, wait 0s, seen 1.00, pid 3 in "c"`},
		{BreakdownOptions{By: ByLayer}, `
"0" 16384 bytes, 1 pieces, 4 reads, 2 files, 1ms to 70ms, wait 36ms, seen 1.00, of 1048576
"1" 0 bytes, 0 pieces, 0 reads, 0 files, 0s to 0s, wait 0s, seen 0.00
"2" 1000 bytes, 1 pieces, 1 reads, 1 files, 100ms to 100ms, wait 0s, seen 1.00, of 1073741824`},
		{BreakdownOptions{By: ByLayer, Sort: SortReads}, `
"0" 16384 bytes, 1 pieces, 4 reads, 2 files, 1ms to 70ms, wait 36ms, seen 1.00, of 1048576
"2" 1000 bytes, 1 pieces, 1 reads, 1 files, 100ms to 100ms, wait 0s, seen 1.00, of 1073741824
"1" 0 bytes, 0 pieces, 0 reads, 0 files, 0s to 0s, wait 0s, seen 0.00`},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s by %s depth %d", tt.o.By, tt.o.Sort, tt.o.Depth), func(t *testing.T) {
			b, err := NewBreakdown(breakdownTrace(), tt.o)
			require.NoError(t, err)
			require.Empty(t, b.Missing)
			require.Equal(t, strings.TrimSpace(tt.want)+"\n"+total, b.table())
		})
	}
}

// Parts of the time follow each other without a gap, to the last read.
func TestBreakdownTime(t *testing.T) {
	b, err := NewBreakdown(breakdownTrace(), BreakdownOptions{By: ByTime})
	require.NoError(t, err)
	require.Len(t, b.Rows, 21)
	var at time.Duration
	var bytes int64
	for _, r := range b.Rows {
		require.Equal(t, at, r.From)
		require.Equal(t, at+5*time.Millisecond, r.To)
		at, bytes = r.To, bytes+r.Bytes
	}
	require.Equal(t, b.Total.Bytes, bytes)
	require.Equal(t, int64(1000), b.Rows[20].Bytes)

	trace := breakdownTrace()
	trace.Events[5].At = math.MaxInt64
	b, err = NewBreakdown(trace, BreakdownOptions{By: ByTime})
	require.NoError(t, err)
	require.LessOrEqual(t, len(b.Rows), 41)
}

// Of a merged trace, the share of the runs counts by bytes, and processes are
// told by their names alone.
func TestBreakdownRuns(t *testing.T) {
	trace := breakdownTrace()
	trace.Runs = 4
	for i := range trace.Events {
		trace.Events[i].Hits = 4
	}
	trace.Events[2].Hits = 1 // /usr/lib/b
	trace.Events[0].Hits = 0 // is one
	b, err := NewBreakdown(trace, BreakdownOptions{By: ByFile, Sort: SortName})
	require.NoError(t, err)
	require.Equal(t, 4, b.Runs)
	require.Equal(t, []float64{0.25, 1, 1, 0.25}, []float64{b.Rows[0].Seen, b.Rows[1].Seen, b.Rows[2].Seen, b.Rows[3].Seen})
	b, err = NewBreakdown(trace, BreakdownOptions{By: ByProcess, Sort: SortName})
	require.NoError(t, err)
	require.Len(t, b.Rows, 2)
	require.Equal(t, "sh", b.Rows[1].Name)
	require.Zero(t, b.Rows[1].Pid)
}

// What a trace lacks is said.
func TestBreakdownMissing(t *testing.T) {
	reference := &tracefmt.Trace{Events: []tracefmt.Event{{Off: 5, Len: 6}, {Layer: 1, Off: 7, Len: 8}}}
	device := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.DeviceSpace}, Events: []tracefmt.Event{{At: 1, Len: 6}}}
	for _, tt := range []struct {
		trace *tracefmt.Trace
		by    string
		want  string
		rows  int
	}{
		{reference, ByFile, missingPaths, 1},
		{reference, ByDir, missingPaths, 1},
		{reference, ByProcess, missingProcesses, 1},
		{reference, ByTime, missingTimes, 1},
		{reference, ByLayer, "", 2},
		{device, ByLayer, missingLayers, 1},
		{device, ByTime, "", 1},
		{&tracefmt.Trace{}, ByTime, "", 1},
	} {
		b, err := NewBreakdown(tt.trace, BreakdownOptions{By: tt.by})
		require.NoError(t, err)
		require.Equal(t, tt.want, b.Missing, tt.by)
		require.Len(t, b.Rows, tt.rows, tt.by)
	}
}

func TestBreakdownOptions(t *testing.T) {
	_, err := NewBreakdown(&tracefmt.Trace{}, BreakdownOptions{By: "colour"})
	require.EqualError(t, err, `by "colour": not one of layer, dir, file, process, time`)
	_, err = NewBreakdown(&tracefmt.Trace{}, BreakdownOptions{By: ByFile, Sort: "size"})
	require.EqualError(t, err, `sort "size": not one of bytes, first, wait, reads, name`)
}

// Whatever a trace is broken down by, no byte is lost or counted twice.
func TestBreakdownSums(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		trace := &tracefmt.Trace{Header: tracefmt.Header{Runs: r.IntN(3)}}
		for range r.IntN(300) {
			e := tracefmt.Event{At: time.Duration(r.IntN(1e6)) * time.Microsecond, Wait: time.Duration(r.IntN(1000)), Layer: r.IntN(3), Off: r.Int64N(50), Len: 1 + r.Int64N(9), Hits: r.IntN(4)}
			e.Path, e.Process, e.Pid = []string{"", "a", "/b/c", "/b/d/e"}[r.IntN(4)], []string{"", "p", "q"}[r.IntN(3)], r.IntN(2)
			trace.Events = append(trace.Events, e)
		}
		slices.SortStableFunc(trace.Events, func(a, b tracefmt.Event) int { return int(a.At - b.At) })
		for _, by := range []string{ByLayer, ByDir, ByFile, ByProcess, ByTime} {
			b, err := NewBreakdown(trace, BreakdownOptions{By: by})
			require.NoError(t, err)
			var sum int64
			for _, s := range b.Rows {
				sum += s.Bytes
				require.LessOrEqual(t, s.Extents, int(s.Bytes))
				require.True(t, s.Seen >= 0 && s.Seen <= 1)
			}
			require.Equal(t, trace.Bytes(), sum, by)
			require.Equal(t, trace.Bytes(), b.Total.Bytes, by)
		}
	}
}

func TestDirectory(t *testing.T) {
	for _, tt := range []struct {
		path  string
		depth int
		want  string
	}{
		{"", 0, ""}, {"", 2, ""}, {"/a", 0, "/"}, {"/a", 1, "/"}, {"a", 0, "."}, {"/a/b", 1, "/a"}, {"/a/b/c", 1, "/a"}, {"/a/b/c", 2, "/a/b"},
		{"/a/b/c", 9, "/a/b"}, {"a/b/c", 1, "a"}, {"//a//b/../c/d", 1, "/a"}, {"../../x/y", 2, "../.."},
	} {
		require.Equal(t, tt.want, directory(tt.path, tt.depth), "%q %d", tt.path, tt.depth)
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"":                     "",
		"/usr/lib/é 日本.so":     "/usr/lib/é 日本.so",
		"a\\b":                 `a\\b`,
		"\x1b[31m\r\n\x00":     `\x1b[31m\r\n\x00`,
		"\xff\xfe":             `\xff\xfe`,
		"\ufffd":               "\ufffd",
		"a\u202eb\u2028\u00a0": `a\u202eb\u2028\u00a0`,
		"'\"":                  `'"`,
	} {
		require.Equal(t, want, Printable(in))
	}
}
