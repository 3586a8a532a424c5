package compare

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The chart library is the one that its README names.
func TestPageLibrary(t *testing.T) {
	sums := map[string]string{
		"uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
		"uPlot.min.css":     "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
		"LICENSE":           "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
	}
	for name, want := range sums {
		b, err := os.ReadFile(filepath.Join("page/uplot", name))
		require.NoError(t, err)
		sum := sha256.Sum256(b)
		require.Equal(t, want, hex.EncodeToString(sum[:]), name)
	}
	readme, err := os.ReadFile("page/uplot/README.md")
	require.NoError(t, err)
	version := regexp.MustCompile(`\(v([0-9.]+)\)`).FindStringSubmatch(uplotJS[:100])
	require.Len(t, version, 2)
	require.Contains(t, string(readme), version[1])
}

// What a page has of its own must not end its elements early, or ask for
// anything from elsewhere.
func TestPageAssets(t *testing.T) {
	for _, s := range []string{pageJS, uplotJS, uplotLicence, pageCSS, uplotCSS} {
		require.NotContains(t, strings.ToLower(s), "</s")
		require.NotContains(t, s, "<!--")
		require.NotContains(t, s, "url(")
		require.NotContains(t, s, "@import")
	}
	require.NotContains(t, pageJS, "innerHTML")
	require.NotContains(t, uplotLicence, "*/")
}

// hostile are strings that a page must show and never obey.
var hostile = []string{
	`</script><script>document.title="broken out"</script>`,
	`<img src=x onerror="document.title='broken out'">`,
	`"><svg onload=alert(1)>`,
	"quote ' double \" back ` slash \\",
	"control \x1b[31m\r\n\x00\x7f",
	"invalid \xff\xfe utf-8",
	"direction \u202etxt.exe",
	"\u2028 line \u2029 paragraph",
	"{{.Page}} ${x} <!-- -->",
	"javascript:alert(1)",
}

// Whatever is in a page's strings, it has the elements that it should have,
// runs no script but its own, and shows what it was given.
func TestPageHostile(t *testing.T) {
	p := &page{Title: "page", Footer: hostile[0]}
	table := &pageTable{ID: "table", Title: hostile[0], About: hostile[1], Missing: hostile[2], More: hostile[3], Columns: []pageColumn{{hostile[2], hostile[1], pageText}}}
	areas := &pageAreas{X: pageAxis{hostile[0], pageMicros, 0, 9}, Y: pageAxis{Name: hostile[1], Unit: pageBytes}, At: []float64{0, 5, 9}, Marks: []pageMark{{5, hostile[0]}}}
	want := []string{}
	for _, s := range hostile {
		p.Facts = append(p.Facts, pageFact{s, s})
		p.Notes = append(p.Notes, s)
		table.Rows = append(table.Rows, []pageCell{{Text: Printable(s)}})
		want = append(want, Printable(s))
		areas.Lines = append(areas.Lines, pageLine{Printable(s), []float64{1, 2, 3}})
	}
	p.Parts = []any{table, &pageChart{ID: "chart", Kind: "areas", Title: hostile[0], About: hostile[1], Label: hostile[2], Group: hostile[0], Data: areas}}
	p.scripts = []string{probe(`{
		title: document.title,
		scripts: document.scripts.length,
		handlers: document.querySelectorAll("img, svg, [onerror], [onload], [href], [src]").length,
		cells: [...document.querySelectorAll("td")].map((td) => td.textContent),
		names: [...document.querySelectorAll("#chart .legend button")].map((b) => b.textContent),
	}`)}
	seen := struct {
		Title             string
		Scripts, Handlers int
		Cells, Names      []string
	}{}
	view(t, p, 1000, 800, false, &seen)
	require.Equal(t, "page", seen.Title)
	require.Equal(t, 4, seen.Scripts, "the library, the page's own, a chart's data, and the test's")
	require.Zero(t, seen.Handlers)
	require.Equal(t, want, seen.Cells)
	require.Equal(t, want, seen.Names)
}

// A browser tells of what is wrong with a page: otherwise the other tests
// would not see it.
func TestPageComplaints(t *testing.T) {
	p := &page{Title: "x", scripts: []string{`
		fetch("http://127.0.0.1:9/by-fetch").catch(() => {});
		new Image().src = "http://127.0.0.1:9/by-image";
		document.body.append(Object.assign(document.createElement("script"), {textContent: "by element"}));
		document.body.append(Object.assign(document.createElement("p"), {innerHTML: "<b onclick='by handler'>"}));
		throw new Error("by exception");`}}
	_, console := browse(t, p, 800, 600, false)
	all := strings.Join(console, "\n")
	for _, want := range []string{"by-fetch", "by-image", "Executing inline script violates", "Executing inline event handler violates", "by exception"} {
		require.Contains(t, all, want)
	}
}

func TestPageUnknownPart(t *testing.T) {
	require.ErrorContains(t, (&page{Parts: []any{1}}).write(&bytes.Buffer{}), "a part is a int")
}

// probe is a script that leaves the value of an expression in the document. It
// runs when all charts have been drawn.
func probe(expression string) string {
	return `document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(` + expression + `)}));`
}

var probed = regexp.MustCompile(`(?s)<pre id="probe">(.*?)</pre>`)

// view opens a page, decodes what its probe has left into v, and fails if the
// browser has complained.
func view(t *testing.T, p *page, width, height int, dark bool, v any) {
	t.Helper()
	dom, console := browse(t, p, width, height, dark)
	require.Empty(t, console)
	found := probed.FindStringSubmatch(dom)
	require.Len(t, found, 2, "the probe has not run")
	require.NoError(t, json.Unmarshal([]byte(html.UnescapeString(found[1])), v))
}

// browse opens a page in a browser of the given width and height, and returns
// the document as it is then and the lines of the browser's console.
// REPRISE_SCREENSHOTS names a directory for pictures of all pages.
func browse(t *testing.T, p *page, width, height int, dark bool) (dom string, console []string) {
	t.Helper()
	dir := browserDir(t)
	var b bytes.Buffer
	require.NoError(t, p.write(&b))
	file := filepath.Join(dir, "page.html")
	require.NoError(t, os.WriteFile(file, b.Bytes(), 0o644))
	flags := []string{fmt.Sprintf("--window-size=%d,%d", width, height), fmt.Sprintf("--blink-settings=preferredColorScheme=%d", map[bool]int{true: 0, false: 1}[dark])}
	if shots := os.Getenv("REPRISE_SCREENSHOTS"); shots != "" {
		name := fmt.Sprintf("%s-%d-%v.png", strings.ReplaceAll(t.Name(), "/", "-"), width, dark)
		chromium(t, dir, append(flags, "--hide-scrollbars", "--screenshot="+filepath.Join(shots, name), "file://"+file)...)
	}
	return chromium(t, dir, append(flags, "--dump-dom", "file://"+file)...)
}

// browserDir is a directory that a browser can use, which may leave files there
// when it has ended.
func browserDir(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("chromium is missing, see .ci/deps")
		}
		t.Skip("needs chromium: make deps WHAT=browser")
	}
	return t.TempDir()
}

// chromium runs the browser without a window, a network or a state.
func chromium(t *testing.T, dir string, args ...string) (stdout string, console []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "chromium", append([]string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-breakpad", "--disable-dev-shm-usage", "--enable-logging=stderr",
		"--user-data-dir=" + filepath.Join(dir, "profile"),
	}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir, "XDG_RUNTIME_DIR="+dir)
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	if e := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); e != nil { // what it may have left behind
		require.ErrorIs(t, e, syscall.ESRCH)
	}
	require.False(t, errors.Is(ctx.Err(), context.DeadlineExceeded), "chromium hangs: %s", log.String())
	require.NoError(t, err, log.String())
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, ":CONSOLE") {
			console = append(console, strings.TrimSpace(line))
		}
	}
	return out.String(), console
}
