package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/recorder/probe"
	"github.com/reprise-project/reprise/tracefmt"
)

// readTrace reads a trace file.
func readTrace(t testing.TB, path string) *tracefmt.Trace {
	t.Helper()
	tr, err := tracefmt.Open(path)
	require.NoError(t, err)
	return tr
}

// bytesOf adds up the trace's bytes of each file, or by another key.
func bytesOf(tr *tracefmt.Trace, key func(*tracefmt.Event) string) map[string]int64 {
	sums := map[string]int64{}
	for i := range tr.Events {
		sums[key(&tr.Events[i])] += tr.Events[i].Len
	}
	return sums
}

func pathOf(e *tracefmt.Event) string    { return e.Path }
func processOf(e *tracefmt.Event) string { return e.Process }

// record records the small image and returns the trace.
func (b *bench) record(args ...string) (*tracefmt.Trace, string) {
	b.t.Helper()
	file := b.path(fmt.Sprintf("trace-%d", time.Now().UnixNano()))
	r := b.run(append([]string{"record", "-o", file}, args...)...)
	require.Zero(b.t, r.code, r.stderr)
	require.NotContains(b.t, r.stderr, "files are not named")
	require.NotContains(b.t, r.stderr, "left as it was recorded")
	require.NoFileExists(b.t, b.path("."+filepath.Base(file)+".new"))
	return readTrace(b.t, file), r.stderr
}

// TestRecordNames records a start and finds the files, and where there is eBPF
// the processes, in its trace.
func TestRecordNames(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	tr, said := b.record(s.ref)
	require.Regexp(t, `recording took at most [0-9.]+ % of a processor`, said)
	require.NotNil(t, tr.End)
	require.Equal(t, "ready: exit 0", tr.End.Reason)
	require.Equal(t, len(tr.Events), tr.End.Events)
	requireFiles(t, tr)
	who := bytesOf(tr, processOf)
	if err := probe.Check(); err != nil {
		require.Contains(t, said, "processes are not named: ")
		require.Len(t, who, 1)
		return
	}
	require.GreaterOrEqual(t, who["cat"], int64(1_000_000))
	require.Positive(t, who["sh"])
	require.Less(t, float64(who[""]), 0.1*float64(tr.Bytes()), "%v", who)
	b.settled()
}

// requireFiles looks for what the small image's command reads.
func requireFiles(t *testing.T, tr *tracefmt.Trace) {
	t.Helper()
	files := bytesOf(tr, pathOf)
	for path, size := range map[string]int64{"/data/a": 300_000, "/data/sub/new": 700_000, "/app/start": 1, "/app/page-1": 10_000, "/app/page-19": 10_000} {
		require.GreaterOrEqual(t, files[path], size, path)
		require.Less(t, files[path], size+4096, path)
	}
	require.Positive(t, files["/bin/cat"])
	for _, never := range []string{"/data/big", "/data/a.hard", "/data/more", "/app/page-2"} {
		require.NotContains(t, files, never)
	}
	var named int64
	for path, n := range files {
		if path != "" && !strings.HasSuffix(path, "/") {
			named += n
		}
	}
	require.Greater(t, float64(named), 0.5*float64(tr.Bytes()), "most bytes are of files")
}

// TestRecordErofs records where there is no block device, and where there is.
func TestRecordErofs(t *testing.T) {
	skipWithoutRunc(t)
	if !hasTool("mkfs.erofs") {
		t.Skip("needs mkfs.erofs")
	}
	if err := device.FileSystem("erofs"); err != nil {
		t.Skip(err)
	}
	b := newBench(t)
	dir := b.mkdir("mnt")
	b.ok("mount", b.smallSite("0s,unlimited").ref, dir)
	ref := b.erofsLayout(dir)
	b.ok("umount", dir)
	for _, transport := range []string{"auto", "fuse"} {
		tr, said := b.record("--transport", transport, ref)
		files := bytesOf(tr, pathOf)
		for _, path := range []string{"/data/a", "/data/sub/new", "/app/start", "/app/page-1", "/bin/cat"} {
			require.Positive(t, files[path], "%s: %s", transport, path)
		}
		if !strings.Contains(said, "processes are not named") {
			require.Positive(t, bytesOf(tr, processOf)["cat"], transport)
		}
		b.settled()
	}
}

// TestRecordStops tries the rules that stop a recording.
func TestRecordStops(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	const forEver = "cat /data/a /data/sub/new > /dev/null; exec sleep 1000"
	for name, tt := range map[string]struct {
		flags  []string
		script string
		reason string
		check  func(t *testing.T, tr *tracefmt.Trace)
	}{
		"quiet": {flags: []string{"--quiet", "300ms"}, script: forEver, reason: "quiet: nothing new for 300ms"},
		"for":   {flags: []string{"--for", "700ms"}, script: forEver, reason: "duration: 700ms"},
		"bytes": {flags: []string{"--max-bytes", "100K"}, script: forEver, reason: "bytes: [0-9]+", check: func(t *testing.T, tr *tracefmt.Trace) {
			require.GreaterOrEqual(t, tr.Bytes(), int64(100<<10))
			require.Less(t, tr.Bytes(), int64(400<<10))
		}},
		"events": {flags: []string{"--max-events", "5"}, script: forEver, reason: "events: 5"},
		"exit": {flags: []string{"--tail", "1h"}, script: "cat /data/a > /dev/null", reason: "ready: exit 0", check: func(t *testing.T, tr *tracefmt.Trace) {
			require.Positive(t, tr.End.Ready)
		}},
		"log, no tail": {flags: []string{"--ready-log", "^up$", "--tail", "0"}, script: "echo up; " + forEver, reason: `ready: log "\^up\$"`},
		"exec":         {flags: []string{"--ready-exec", "[ -e /tmp/up ]"}, script: "cat /data/a > /dev/null; : > /tmp/up; exec sleep 1000", reason: `ready: exec .*`},
		// Whoever listens first, or says that it is up, may go on loading.
		"settled": {flags: []string{"--ready-log", "^up$"}, script: "echo up; sleep 0.3; cat /data/a > /dev/null; sleep 0.3; cat /data/sub/new > /dev/null; exec sleep 1000",
			reason: `ready: log "\^up\$"`, check: func(t *testing.T, tr *tracefmt.Trace) {
				require.GreaterOrEqual(t, bytesOf(tr, pathOf)["/data/sub/new"], int64(700_000))
				require.Greater(t, tr.End.Duration, tr.End.Ready)
			}},
	} {
		t.Run(name, func(t *testing.T) {
			args := append(tt.flags, s.ref, "--", "/bin/sh", "-c", tt.script)
			tr, said := b.record(args...)
			require.Regexp(t, "^"+tt.reason+"$", tr.End.Reason)
			require.Regexp(t, regexp.MustCompile("ended by "+tt.reason+";"), said)
			if tt.check != nil {
				tt.check(t, tr)
			}
		})
	}
	b.settled()
}

// TestRecordService records what listens, and goes on loading.
func TestRecordService(t *testing.T) {
	skipWithoutRunc(t)
	if !hasTool("perl") {
		t.Skip("needs perl")
	}
	b := newBench(t)
	s := b.ownSite(false)
	perl, err := exec.LookPath("perl")
	require.NoError(t, err)
	layer := append(programs(t, "bin/sh", "bin/cat", strings.TrimPrefix(perl, "/")), dirs("tmp", "proc", "dev", "sys", "data")...)
	layer = append(layer, testFile{name: "data/late", body: randomBytes(78, 400_000)},
		testFile{name: "data/server", body: []byte(`socket(S, 2, 1, 0) or die; bind(S, pack("S n a4 x8", 2, 0, pack("C4", 127, 0, 0, 1))) or die;
listen(S, 5) or die; select(undef, undef, undef, 0.3); open(F, "/data/late"); read(F, $b, 400000); sleep 1000;`)})
	writeLayout(t, b.mkdir("service"), []testLayer{layer}, smallConfig)
	ref := s.addr + "/tests/service:obd"
	b.ok("convert", "oci:"+b.path("service"), ref)
	for _, network := range []string{"host", "own"} {
		tr, said := b.record("--net", network, ref, "--", perl, "/data/server")
		require.Regexp(t, `^ready: port [1-9][0-9]*$`, tr.End.Reason, said)
		require.GreaterOrEqual(t, bytesOf(tr, pathOf)["/data/late"], int64(400_000))
		require.Positive(t, tr.End.Ready)
		late := slices.IndexFunc(tr.Events, func(e tracefmt.Event) bool { return e.Path == "/data/late" })
		require.Greater(t, tr.Events[late].At, tr.End.Ready)
		if !strings.Contains(said, "processes are not named") {
			require.Equal(t, "perl", tr.Events[late].Process)
		}
	}
	b.settled()
}

// A registry that does not answer for long is not quiet.
func TestRecordStalled(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("600ms,unlimited")
	tr, _ := b.record("--quiet", "500ms", s.ref, "--", "/bin/sh", "-c", "cat /data/a > /dev/null; cat /data/sub/new > /dev/null; exec sleep 1000")
	require.Equal(t, "quiet: nothing new for 500ms", tr.End.Reason)
	require.GreaterOrEqual(t, bytesOf(tr, pathOf)["/data/sub/new"], int64(700_000))
}

// TestRecordRuns records cold starts that differ.
func TestRecordRuns(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	const script = "read -r id < /proc/sys/kernel/random/uuid; cat /data/a > /dev/null; case $id in [0-7]*) cat /app/page-1;; *) cat /app/page-2;; esac > /dev/null"
	for mode, want := range map[string]bool{"union": true, "intersection": false} {
		s.Reset()
		file := b.path(mode)
		r := b.run("record", "-o", file, "--runs", "3", "--merge", mode, s.ref, "--", "/bin/sh", "-c", script)
		require.Zero(t, r.code, r.stderr)
		require.Equal(t, 3, strings.Count(r.stderr, "ended by ready: exit 0"))
		require.Regexp(t, `merged 3 recordings \(`+mode+`\): .* were read in all of them`, r.stderr)
		tr := readTrace(t, file)
		require.Equal(t, 3, tr.Runs)
		files := bytesOf(tr, pathOf)
		require.GreaterOrEqual(t, files["/data/a"], int64(300_000))
		require.Equal(t, want || files["/app/page-1"] > 0 != (files["/app/page-2"] > 0), files["/app/page-1"] > 0 || files["/app/page-2"] > 0)
		require.Greater(t, s.Stats().BytesSent, int64(3*300_000), "each of them was cold")
		left, err := filepath.Glob(file + "*")
		require.NoError(t, err)
		require.Equal(t, []string{file}, left)
	}
	left, err := filepath.Glob(filepath.Join(b.root, "cold-*"))
	require.NoError(t, err)
	require.Empty(t, left)
	b.settled()

	// What was recorded before one fails stays.
	file := b.path("failed")
	r := b.run("record", "-o", file, "--runs", "2", s.ref, "--", "/bin/sh", "-c", "cat /data/a > /dev/null; exit 3")
	require.Equal(t, exitFailed, r.code)
	require.Contains(t, r.stderr, "run 1: ")
	require.NoFileExists(t, file)
	require.NotNil(t, readTrace(t, file+".run1").End)
}

// TestRecordKilled kills a recording while it looks for the files: the trace is
// there as it was recorded.
func TestRecordKilled(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("20ms,unlimited")
	file := b.path("trace")
	cmd := b.command("record", "-o", file, s.ref)
	require.NoError(t, cmd.Start())
	var tr *tracefmt.Trace
	eventually(t, "the recording has ended", func() bool {
		var err error
		tr, err = tracefmt.Open(file)
		return err == nil && tr.End != nil
	})
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	after := readTrace(t, file)
	require.NotNil(t, after.End)
	require.Equal(t, tr.Bytes(), after.Bytes())
	require.Equal(t, tr.End.Reason, after.End.Reason)
	eventually(t, "its processes have ended", func() bool { return len(b.processes()) == 0 })
	require.NoError(t, os.RemoveAll(b.root)) // the next command would tidy up
	_ = os.Remove(b.path(".trace.new"))
	b.settled()
}
