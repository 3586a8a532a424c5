package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/tracefmt"
)

// A pagesImage is an image whose container reads one file after the other and
// says so of each. Where their bytes are in the layers is known without the
// recorder: they are random, and looked for in the unpacked layer.
type pagesImage struct {
	*site
	pages  [][]byte
	layers []string           // digests, bottom first
	blocks [][]tracefmt.Event // of each page: where its blocks are
}

const (
	pageCount = 80
	pageBytes = 10_000
	pageBlock = 4096 // of the file system
)

// pagesScript reads each page and says so; it takes three to four seconds.
var pagesScript = fmt.Sprintf(`i=0
while [ $i -lt %d ]; do
	cat /pages/$i > /dev/null
	echo "page $i"
	sleep 0.03
	i=$((i+1))
done
`, pageCount)

// lost is how much of a recording a kill may cost.
const lost = time.Second

// newPagesImage makes the image, of some programs and the pages, with a registry
// of its own.
func newPagesImage(b *bench, tools ...string) *pagesImage {
	base := append(programs(b.t, tools...), dirs("tmp", "proc", "dev", "sys", "etc")...)
	im := &pagesImage{}
	pages := append(dirs("pages"), testFile{name: "pages/script", body: []byte(pagesScript)})
	for i := range pageCount {
		im.pages = append(im.pages, randomBytes(uint64(5000+i), pageBytes))
		pages = append(pages, testFile{name: fmt.Sprintf("pages/%d", i), body: im.pages[i]})
	}
	writeLayout(b.t, b.mkdir("source"), []testLayer{base, pages}, v1.ImageConfig{Cmd: []string{"/bin/sh", "/pages/script"}, Env: []string{"PATH=/bin"}})
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(b.t, err)
	im.site = b.site("2ms,400mbit", g)
	im.ref = im.addr + "/tests/pages:obd"
	b.ok("convert", "--device-size", "67108864", "oci:"+b.path("source"), im.ref)
	im.layers = b.layers(im.ref)
	im.find(b)
	return im
}

// find looks for the pages in the image's upper layer.
func (im *pagesImage) find(b *bench) {
	last := len(im.layers) - 1
	r, err := http.Get("http://" + im.addr + "/v2/tests/pages/blobs/" + im.layers[last])
	require.NoError(b.t, err)
	defer r.Body.Close()
	blob, err := io.ReadAll(r.Body)
	require.NoError(b.t, err)
	b.ok("blob", "unpack", b.write("blob", string(blob)), b.path("unpacked"))
	layer, err := os.ReadFile(b.path("unpacked"))
	require.NoError(b.t, err)
	for i, page := range im.pages {
		var blocks []tracefmt.Event
		for at := 0; at < len(page); at += pageBlock {
			p := page[at:min(at+pageBlock, len(page))]
			off := bytes.Index(layer, p)
			require.GreaterOrEqual(b.t, off, 0, "page %d", i)
			blocks = append(blocks, tracefmt.Event{Layer: last, Off: int64(off), Len: int64(len(p))})
		}
		im.blocks = append(im.blocks, blocks)
	}
}

// misses lists which of the pages are not wholly in the trace.
func (im *pagesImage) misses(t *tracefmt.Trace, pages int) (missing []int) {
	var has tracefmt.Touched
	for _, e := range t.Events {
		has.Add(nil, e)
	}
	for i, blocks := range im.blocks[:pages] {
		for _, e := range blocks {
			if len(has.Add(nil, e)) > 0 {
				missing = append(missing, i)
				break
			}
		}
	}
	return missing
}

// A recordingProcess is a `reprise record` of the pages.
type recordingProcess struct {
	cmd   *exec.Cmd
	file  string
	begun time.Time

	mu    sync.Mutex  // guards what follows
	read  []time.Time // when page i was known to have been read
	other strings.Builder
	done  chan struct{} // closed: all that it and its container have said is there
}

func (b *bench) recordPages(im *pagesImage) *recordingProcess {
	b.t.Helper()
	p := &recordingProcess{file: filepath.Join(b.mkdir("traces"), "trace"), done: make(chan struct{})}
	p.cmd = b.command("record", "-o", p.file, im.ref)
	r, w, err := os.Pipe()
	require.NoError(b.t, err)
	p.cmd.Stdout, p.cmd.Stderr = w, w
	p.begun = time.Now()
	require.NoError(b.t, p.cmd.Start())
	require.NoError(b.t, w.Close())
	go func() {
		defer close(p.done)
		defer r.Close()
		for lines := bufio.NewScanner(r); lines.Scan(); {
			p.line(lines.Text())
		}
	}()
	return p
}

func (p *recordingProcess) line(text string) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if text == fmt.Sprintf("page %d", len(p.read)) {
		p.read = append(p.read, now)
		return
	}
	p.other.WriteString(text + "\n")
}

// readBefore is how many pages had been read at a moment.
func (p *recordingProcess) readBefore(at time.Time) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n < len(p.read) && p.read[n].Before(at) {
		n++
	}
	return n
}

// wait waits for the end, and for what was said until then.
func (p *recordingProcess) wait() (said string, err error) {
	err = p.cmd.Wait()
	<-p.done
	return p.other.String(), err
}

// ended tells whether the trace that is being written has its end.
func (p *recordingProcess) ended() bool {
	t, err := tracefmt.Open(p.file)
	return err == nil && t.End != nil
}

// A moment is one of a recording, however fast the machine is: when so many
// pages have been read, or when all is over, and some time after that.
type moment struct {
	pages int // or over
	after time.Duration
}

const over = -1

func (m moment) String() string {
	at := fmt.Sprintf("page %d", m.pages)
	if m.pages == over {
		at = "over"
	}
	return fmt.Sprintf("%s and %v", at, m.after)
}

// randomMoment is one between the start and the last page. A tenth are before
// the first.
func randomMoment() moment {
	if n := rand.IntN(pageCount * 10 / 9); n < pageCount {
		return moment{n, rand.N(50 * time.Millisecond)}
	}
	return moment{0, rand.N(500 * time.Millisecond)}
}

// TestRecordKills kills the recorder at random moments, while it records and
// when the recording is over and its trace is being finished. Each trace reads
// and holds all that was read more than a second before, and nothing is left
// behind.
func TestRecordKills(t *testing.T) {
	skipWithoutRunc(t)
	im := newPagesImage(newBench(t), "bin/sh", "bin/cat", "bin/sleep")
	im.letAlone(newBench(t))
	n := kills(20)
	var proofs atomic.Int64 // of kills amid the recording
	t.Run("kills", func(t *testing.T) {
		for i := range n + n/4 {
			at := randomMoment()
			if i >= n { // to find the files of this image takes some 30 ms
				at = moment{over, rand.N(30 * time.Millisecond)}
			}
			t.Run(at.String(), func(t *testing.T) {
				t.Parallel()
				if pages := im.kill(t, at); at.pages != over {
					proofs.Add(int64(pages))
				}
			})
		}
	})
	require.GreaterOrEqual(t, proofs.Load(), int64(n), "pages that were read long enough before a kill")
	t.Logf("%d pages had been read more than %v before the %d kills amid a recording; all are in the traces", proofs.Load(), lost, n)
}

// letAlone records without a kill.
func (im *pagesImage) letAlone(b *bench) {
	p := b.recordPages(im)
	said, err := p.wait()
	require.NoError(b.t, err, said)
	tr, err := tracefmt.Open(p.file)
	require.NoError(b.t, err)
	require.Empty(b.t, im.misses(tr, pageCount), "pages that a recording lacks that was let alone")
	b.t.Logf("let alone: %s in %v: %s", named(tr), time.Since(p.begun), said)
}

// kill kills a recorder. It returns how many pages the trace had to hold.
func (im *pagesImage) kill(t *testing.T, at moment) (proofs int) {
	b := newBench(t)
	b.loop = append(b.loop, im.addr)
	p := b.recordPages(im)
	after := at.pages == over
	eventually(t, at.String(), func() bool {
		if after {
			return p.ended()
		}
		return p.readBefore(time.Now()) >= at.pages
	})
	time.Sleep(at.after) // it is what the test is about
	killed := time.Now()
	_ = p.cmd.Process.Kill()
	said, err := p.wait()
	how := "killed"
	if err == nil { // on a busy machine moments are not where they were
		how = "ended before it was killed"
	}
	eventually(t, "all goes but files", func() bool {
		return len(b.processes())+len(b.mounts())+len(b.loops()) == 0
	})
	b.reaped(im.ref)
	proofs = p.readBefore(killed.Add(-lost))
	if after || err == nil {
		proofs = pageCount
	}
	what := im.checkKilled(t, p, proofs)
	t.Logf("%s; %d pages had been read, %d of them long enough before; %s: %s", how, len(p.read), proofs, what, said)
	for _, f := range b.files("traces") {
		require.Contains(t, []string{p.file, filepath.Join(filepath.Dir(p.file), ".trace.new")}, f)
	}
	return proofs
}

// reaped makes sure that the next command takes away what is left below the
// state directory, when that is older than what somebody may be writing.
func (b *bench) reaped(ref string) {
	old := time.Now().Add(-time.Hour)
	for _, f := range b.files("state/devices") {
		require.NoError(b.t, os.Chtimes(f, old, old))
	}
	b.ok("run", ref, "--", "/bin/sh", "-c", ":")
	b.settled()
}

// checkKilled reads what is left of a recording, which holds the first pages,
// and says what it is.
func (im *pagesImage) checkKilled(t *testing.T, p *recordingProcess, pages int) (what string) {
	if _, err := os.Stat(p.file); pages == 0 && err != nil {
		return "no trace"
	}
	tr, err := tracefmt.Open(p.file)
	require.NoError(t, err)
	require.Len(t, tr.Layers, len(im.layers))
	require.Empty(t, im.misses(tr, pages), "pages that are not in the trace")
	if pages == pageCount {
		require.NotNil(t, tr.End)
	}
	return named(tr)
}

// named says how much of a trace has names.
func named(t *tracefmt.Trace) string {
	paths, processes := 0, 0
	for _, e := range t.Events {
		if e.Path != "" {
			paths++
		}
		if e.Process != "" {
			processes++
		}
	}
	return fmt.Sprintf("%d events, %d of them with a path, %d with a process", len(t.Events), paths, processes)
}
