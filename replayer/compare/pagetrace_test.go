package compare

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

// startTrace is a start of n reads by a shell and what it starts: each process
// reads files of its own in one layer after another, and waits for each read.
func startTrace(n int) *tracefmt.Trace {
	r := rand.New(rand.NewPCG(1, 2))
	t := &tracefmt.Trace{Header: tracefmt.Header{
		Version: tracefmt.Version, Space: tracefmt.LayerSpace, Image: "registry.example.com/shop:7-lazy", Manifest: digest.FromString("m"),
		Platform: "linux/amd64", Workload: "python3-265fde16", Args: []string{"/bin/sh", "-c", "exec python3 '/srv/app.py'"},
		Tool: "reprise 1.0", Start: time.Date(2026, 4, 1, 12, 0, 0, 0, time.UTC), ReadAhead: 128 << 10,
	}}
	sizes := []int64{124 << 20, 20 << 20, 83 << 20, 429 << 20, 56 << 10}
	for i := range sizes {
		sizes[i] *= int64(1 + n/3000)
	}
	for i, size := range sizes {
		t.Layers = append(t.Layers, tracefmt.Layer{Digest: digest.FromString(fmt.Sprint(i)), Size: size / 3, Decoded: size})
	}
	dirs := []string{"/usr/lib/x86_64-linux-gnu", "/usr/lib/python3/dist-packages/numpy/core", "/usr/lib/python3.11/encodings", "/srv", "/etc"}
	processes := []string{"runc:[2:INIT]", "sh", "python3", "python3", "gunicorn"}
	next := make([]int64, len(sizes))
	at := 5 * time.Millisecond
	for i := range n {
		k := min(i*len(sizes)/n, len(sizes)-1)
		if r.IntN(4) == 0 {
			k = r.IntN(len(sizes))
		}
		e := tracefmt.Event{
			At: at, Wait: time.Duration(r.IntN(3000)) * time.Microsecond, Layer: k, Len: int64(1+r.IntN(16)) << 12, Origin: uint8(r.IntN(5)),
			Process: processes[k], Pid: 4000 + k, Container: "shop", Hits: 1,
		}
		if r.IntN(8) == 0 {
			next[k] = r.Int64N(sizes[k]) &^ 4095
		}
		e.Off = min(next[k], sizes[k]-e.Len)
		if e.Off < 0 {
			e.Off, e.Len = 0, 4096
		}
		next[k] = e.Off + e.Len
		if r.IntN(10) > 0 {
			e.Path = fmt.Sprintf("%s/file-%d.so", dirs[k], e.Off>>20)
			e.FileOff = e.Off & (1<<20 - 1)
		}
		t.Events = append(t.Events, e)
		at += e.Wait/2 + time.Duration(r.IntN(800))*time.Microsecond
	}
	t.End = &tracefmt.End{Reason: "ready: port 8080", Ready: at - at/20, Duration: at}
	return t
}

// seenPage is what a probe finds of a page of a trace.
type seenPage struct {
	Drawn    map[string]int    // of each chart, the pixels that are not of its background
	Marks    string            // of the reads
	Legend   map[string]string // of each chart
	Tables   map[string][]string
	Overflow []string // elements that reach beyond the window
	Dark     bool
}

const seePage = `(() => {
	const out = {drawn: {}, legend: {}, tables: {}, overflow: [], marks: document.querySelector("#reads .plot")?.dataset.drawn};
	for (const s of document.querySelectorAll("section.chart")) {
		const c = s.querySelector("canvas"), p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
		let n = 0;
		for (let i = 0; i < p.length; i += 4) n += p[i + 3] > 250 && Math.max(p[i], p[i + 1], p[i + 2]) - Math.min(p[i], p[i + 1], p[i + 2]) > 60;
		out.drawn[s.id] = n;
		out.legend[s.id] = [...s.querySelectorAll(".legend button")].map((b) => b.textContent).join(", ");
	}
	for (const s of document.querySelectorAll("section.table"))
		out.tables[s.id] = [...s.querySelectorAll("tbody tr:not([hidden])")].map((tr) => tr.cells[0].textContent);
	for (const e of document.querySelectorAll("body *"))
		if (!e.closest(".scroll, .plot") && e.getBoundingClientRect().right > innerWidth + 1) out.overflow.push(e.tagName + " " + e.className);
	out.dark = getComputedStyle(document.body).backgroundColor === "rgb(20, 24, 28)";
	return out;
})()`

func TestTracePage(t *testing.T) {
	for _, tt := range []struct {
		name  string
		width int
		dark  bool
	}{{"wide", 1400, false}, {"narrow", 500, true}} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := newTracePage(startTrace(3000))
			require.NoError(t, err)
			p.scripts = []string{probe(seePage)}
			var seen seenPage
			view(t, p, tt.width, 3000, tt.dark, &seen)
			require.Equal(t, tt.dark, seen.Dark)
			require.Empty(t, seen.Overflow)
			require.Greater(t, seen.Drawn["reads"], 1000)
			require.Greater(t, seen.Drawn["bytes"], 5000)
			require.Greater(t, seen.Drawn["waits"], 300)
			require.Contains(t, seen.Legend["reads"], "runc:[2:INIT]")
			require.Contains(t, seen.Legend["bytes"], "gunicorn")
			require.Len(t, seen.Tables[ByFile], 15)
			require.Contains(t, seen.Tables[ByDir], "/usr/lib/x86_64-linux-gnu")
			require.Contains(t, seen.Tables[ByProcess], "gunicorn (process 4004) in shop")
			require.Len(t, seen.Tables[ByLayer], 5)
		})
	}
}

// A reader can sort, filter, hide, choose and enlarge.
func TestTracePageUse(t *testing.T) {
	trace := startTrace(3000)
	p, err := newTracePage(trace)
	require.NoError(t, err)
	// What uPlot does next it does when a script has ended.
	p.scripts = []string{`
		const first = (id) => [...document.querySelectorAll("#" + id + " tbody tr:not([hidden])")].map((tr) => tr.cells[0].textContent);
		const ink = (id) => { const c = document.querySelector("#" + id + " canvas"); return c.toDataURL(); };
		const seen = {};
		const file = document.querySelector("#file");
		file.querySelector("th button").click();
		seen.byName = first("file");
		[...file.querySelectorAll("th button")].find((b) => b.textContent === "first read").click();
		[...file.querySelectorAll("th button")].find((b) => b.textContent === "first read").click();
		seen.byFirst = first("file");
		const filter = file.querySelector("input");
		filter.value = "ENCODINGS";
		filter.dispatchEvent(new Event("input"));
		seen.filtered = first("file");
		seen.status = file.querySelector("[aria-live]").textContent;
		[...file.querySelectorAll("button")].find((b) => b.textContent.startsWith("Show all")).click();
		seen.all = first("file").length;

		const reads = document.querySelector("#reads"), marks = () => Number(reads.querySelector(".plot").dataset.drawn);
		seen.marks = [marks()];
		const before = [ink("reads"), ink("bytes"), ink("waits")];
		reads.querySelector(".legend button").click();`, `
		seen.marks.push(marks());
		reads.querySelector(".legend button").click();
		const by = reads.querySelector("select");
		seen.choices = [...by.options].map((o) => o.textContent);
		by.selectedIndex = 1;
		by.dispatchEvent(new Event("change"));`, `
		seen.marks.push(marks());
		seen.legend = [...reads.querySelectorAll(".legend button")].map((b) => b.textContent);
		const find = reads.querySelector("input");
		find.value = "encodings";
		find.dispatchEvent(new Event("input"));`, `
		const over = reads.querySelector(".u-over"), box = over.getBoundingClientRect();
		const canvas = reads.querySelector("canvas"), origin = canvas.getBoundingClientRect(), scale = canvas.width / origin.width;
		const at = (() => { // of a mark: a pixel with a colour
			const p = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
			for (let y = canvas.height >> 1; y < canvas.height; y++) for (let x = 100; x < canvas.width >> 1; x++) {
				const i = 4 * (y * canvas.width + x);
				if (p[i + 3] > 250 && Math.max(p[i], p[i + 1], p[i + 2]) - Math.min(p[i], p[i + 1], p[i + 2]) > 60) return [x / scale + origin.left - box.left, y / scale + origin.top - box.top];
			}
		})();
		const mouse = (type, x, y) => over.dispatchEvent(new MouseEvent(type, { bubbles: true, clientX: box.left + x, clientY: box.top + y, view: window }));
		mouse("mouseenter", ...at); mouse("mousemove", ...at);`, `
		seen.tip = reads.querySelector(".tip").textContent;
		mouse("mousemove", 100, 100);
		mouse("mousedown", 100, 100);
		over.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX: box.left + 300, clientY: box.top + 102, movementX: 200 }));
		document.dispatchEvent(new MouseEvent("mouseup", { bubbles: true, clientX: box.left + 300, clientY: box.top + 102 }));`, `
		const after = [ink("reads"), ink("bytes"), ink("waits")];
		seen.zoomed = before.map((b, i) => b !== after[i]);
		seen.selected = [...document.querySelectorAll(".u-select")].map((s) => s.getBoundingClientRect().width);
		const select = reads.querySelectorAll("select")[1];
		select.selectedIndex = 1;
		select.dispatchEvent(new Event("change"));
		[...reads.querySelectorAll("button")].find((b) => b.textContent === "Show everything again").click();`, `
		const last = [ink("bytes"), ink("waits")];
		seen.back = [last[0] === before[1], last[1] === before[2]];
	`, probe("seen")}
	var seen struct {
		ByName, ByFirst, Filtered, Choices, Legend []string
		Status, Tip                                string
		All                                        int
		Marks                                      []int
		Zoomed, Back                               []bool
		Selected                                   []float64
	}
	view(t, p, 1400, 3000, false, &seen)
	byName, err := NewBreakdown(trace, BreakdownOptions{By: ByFile, Sort: SortName})
	require.NoError(t, err)
	require.Equal(t, notAFile, seen.ByName[0])
	require.Equal(t, byName.Rows[1].Name, seen.ByName[1])
	byFirst, err := NewBreakdown(trace, BreakdownOptions{By: ByFile, Sort: SortFirst})
	require.NoError(t, err)
	require.Equal(t, byFirst.Rows[0].Name, seen.ByFirst[0])
	encodings := 0
	for _, r := range byName.Rows {
		if strings.Contains(r.Name, "encodings") {
			encodings++
		}
	}
	require.Equal(t, fmt.Sprintf("%d of %d fit", encodings, len(byName.Rows)), seen.Status)
	require.Len(t, seen.Filtered, min(15, encodings))
	require.Equal(t, encodings, seen.All)
	require.Contains(t, seen.Filtered[0], "encodings")
	require.Equal(t, []string{"process", "layer", "directory", "where the bytes came from"}, seen.Choices)
	require.Equal(t, seen.Marks[0], seen.Marks[2])
	require.Less(t, seen.Marks[1], seen.Marks[0])
	require.Positive(t, seen.Marks[1])
	require.Equal(t, []string{"layer 0", "layer 1", "layer 2", "layer 3", "layer 4"}, sortedStrings(seen.Legend))
	require.Equal(t, []bool{true, true, true}, seen.Zoomed)
	require.Regexp(t, `^\d+ KiB at [0-9.]+ m?s, waited [0-9.]+ ms
/usr/lib/python3.11/encodings/file-\d+.so
process: python3
layer: layer 2
directory: /usr/lib
where the bytes came from: .*$`, seen.Tip)
	require.Equal(t, []float64{0, 0, 0}, seen.Selected)
	require.Equal(t, []bool{true, true}, seen.Back)
}

// The page of a large trace stays small, says what was joined, and draws.
func TestTracePageLarge(t *testing.T) {
	trace := startTrace(100_000)
	for i := range trace.Events {
		trace.Events[i].Path = fmt.Sprintf("/usr/share/%s/%d", strings.Repeat("long/", 20), i/3)
	}
	p, err := newTracePage(trace)
	require.NoError(t, err)
	var b bytes.Buffer
	require.NoError(t, p.write(&b))
	require.Less(t, b.Len(), 2<<20)
	joined := regexp.MustCompile(`the trace&#39;s \d+ reads are drawn as (\d+) marks: each joins what lies within .* ms and .* [KM]iB`).FindStringSubmatch(b.String())
	require.Len(t, joined, 2)
	files, err := NewBreakdown(trace, BreakdownOptions{By: ByFile})
	require.NoError(t, err)
	require.True(t, strings.Contains(b.String(), fmt.Sprintf("And %d more", len(files.Rows)-maxPageRows)))

	p.scripts = []string{probe(seePage)}
	var seen seenPage
	view(t, p, 1400, 3000, false, &seen)
	require.Equal(t, joined[1], seen.Marks)
	require.Greater(t, seen.Drawn["reads"], 5000)
}

// Nor can names make a page large.
func TestTracePageNames(t *testing.T) {
	trace := startTrace(2000)
	trace.Args = []string{strings.Repeat("\x01", 100_000)}
	for i := range trace.Events {
		e := &trace.Events[i]
		e.Path = "/" + strings.Repeat("\x02", 4000) + fmt.Sprint(i)
		e.Process, e.Pid, e.Container = strings.Repeat("\xff", 4000), i, strings.Repeat("\"", 4000)
	}
	var b bytes.Buffer
	require.NoError(t, WriteTracePage(&b, trace))
	require.Less(t, b.Len(), 8<<20)
}

// Joined or not, every byte is drawn once.
func TestTracePageMarks(t *testing.T) {
	for _, n := range []int{100, maxPageReads, 3 * maxPageReads} {
		trace := startTrace(n)
		v := &traceView{t: trace, first: trace.FirstTouch(), timed: true}
		v.x, v.dims = v.axis(), v.known()
		d := v.reads().Data.(*pageReads)
		require.LessOrEqual(t, len(d.T), maxPageReads)
		var reads, bytes int64
		for i := range d.T {
			reads += int64(d.N[i])
			bytes += d.B[i]
			require.LessOrEqual(t, d.B[i], d.H[i])
		}
		require.Equal(t, int64(len(v.first)), reads)
		require.Equal(t, trace.Bytes(), bytes)
		for _, dim := range d.Dims {
			require.Len(t, dim.Of, len(d.T), dim.Name)
			require.LessOrEqual(t, len(dim.Names), maxPageGroups)
		}
		a := v.bytes().Data.(*pageAreas)
		sum := 0.0
		for _, l := range a.Lines {
			sum += l.Values[len(l.Values)-1]
		}
		require.InDelta(t, trace.Bytes(), sum, 1)
	}
}

// Waits spread over the time that they took: their sum is what was waited.
func TestTracePageWaits(t *testing.T) {
	trace := &tracefmt.Trace{Header: tracefmt.Header{Start: time.Unix(1, 0)}, Events: []tracefmt.Event{
		{At: 0, Wait: time.Second, Len: 1},
		{At: 0, Wait: time.Second, Len: 1, Off: 1}, // of the same read
		{At: 500 * time.Millisecond, Wait: 2 * time.Second, Len: 1, Off: 2},
		{At: 2 * time.Second, Wait: time.Microsecond, Len: 1, Off: 3},
	}}
	v := &traceView{t: trace, first: trace.FirstTouch(), timed: true}
	v.x = v.axis()
	chart := v.waits()
	d := chart.Data.(*pageAreas)
	sum := 0.0
	for _, n := range d.Lines[0].Values {
		require.GreaterOrEqual(t, n, -1e-9)
		require.LessOrEqual(t, n, 2+1e-9)
		sum += n * v.x.Max / pageSteps
	}
	require.InDelta(t, 3_000_001, sum, 1)
	require.Contains(t, chart.About, "All waits together are 3.00 s")
}

// Traces without times, files, processes, layers, reads or an end have a page
// that says so.
func TestTracePageLittle(t *testing.T) {
	tests := []struct {
		name    string
		trace   *tracefmt.Trace
		says    []string
		browser bool
	}{
		{"empty", &tracefmt.Trace{}, []string{"cut off"}, false},
		{"reference", &tracefmt.Trace{End: &tracefmt.End{}, Events: []tracefmt.Event{{Off: 5, Len: 6}, {Layer: 1, Off: 7, Len: 8}}},
			[]string{"no times", "which files", "which processes", "number of the read"}, true},
		{"device", &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.DeviceSpace}, Events: []tracefmt.Event{{At: 1, Off: 1 << 40, Len: 6}}},
			[]string{"is of a device"}, false},
		{"extreme", &tracefmt.Trace{Events: []tracefmt.Event{
			{At: math.MaxInt64, Wait: math.MaxInt64, Layer: 254, Off: 1, Len: math.MaxInt64 - 1, Origin: 255, Pid: math.MaxInt, Hits: math.MaxInt, Path: "/"},
			{Layer: 1, Off: math.MaxInt64 - 1, Len: 1, Hits: -1}}}, []string{"layer 254"}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := newTracePage(tt.trace)
			require.NoError(t, err)
			var b bytes.Buffer
			require.NoError(t, p.write(&b))
			for _, s := range tt.says {
				require.True(t, strings.Contains(b.String(), s), s)
			}
			if tt.browser {
				p.scripts = []string{probe(`document.documentElement.dataset.drawn`)}
				var drawn string
				view(t, p, 800, 600, false, &drawn)
				require.Equal(t, fmt.Sprint(strings.Count(b.String(), `<section class="chart"`)), drawn)
			}
		})
	}
}

// FuzzTracePage: whatever a trace holds, its page has the elements that it
// should have, and no others.
func FuzzTracePage(f *testing.F) {
	for _, s := range hostile {
		f.Add(s, s, s, int64(1), int64(4096), int64(0), byte(0))
	}
	f.Add("/usr/lib/x", "python3", "w", int64(math.MaxInt64), int64(math.MaxInt64-9), int64(1), byte(200))
	own := strings.Count(strings.ToLower(pageJS+uplotJS+uplotLicence), "<script")
	f.Fuzz(func(t *testing.T, path, process, workload string, at, length, off int64, layer byte) {
		trace := &tracefmt.Trace{Header: tracefmt.Header{Workload: workload, Image: path, Args: []string{process}, Runs: int(layer)}, End: &tracefmt.End{Reason: process}}
		for i := range 3 {
			e := tracefmt.Event{At: time.Duration(at), Wait: time.Duration(at / 2), Layer: int(layer), Off: off, Len: length, Path: path, Process: process, Hits: i}
			if e.At < 0 || e.Wait < 0 || e.Off < 0 || e.Len <= 0 || e.Off+e.Len < 0 || layer == 255 {
				t.Skip("no trace that could be read")
			}
			trace.Events = append(trace.Events, e)
			off, path = off+length+int64(i), path+"/"+process
			if off < 0 {
				break
			}
		}
		var b bytes.Buffer
		require.NoError(t, WriteTracePage(&b, trace))
		require.True(t, utf8.Valid(b.Bytes()))
		lower := strings.ToLower(b.String())
		require.Equal(t, strings.Count(b.String(), `<script type="application/json">`)+2+own, strings.Count(lower, "<script"))
		require.Equal(t, strings.Count(lower, "<script"), strings.Count(lower, "</script>")+own)
		require.False(t, strings.Contains(lower, "<img") || strings.Contains(lower, "<svg"))
		require.False(t, strings.ContainsFunc(b.String(), func(r rune) bool {
			return r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r >= 0x202a && r <= 0x202e
		}))
	})
}

func sortedStrings(s []string) []string { return slices.Sorted(slices.Values(s)) }
