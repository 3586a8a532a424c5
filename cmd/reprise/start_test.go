package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestConvertAndMount converts an image, between all kinds of places, and looks
// at the trees.
func TestConvertAndMount(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	want := expected(small.layers)
	layout := "oci:" + b.path("layout") + ":v1"
	require.Contains(t, b.ok("convert", "--cache-dir", small.converted(), small.source(), layout), "sha256:")
	for _, ref := range []string{s.ref, layout} {
		info := decode(t, b.ok("image", "info", "--json", ref), "manifest", "device_size", "layers.digest", "layers.codec", "command")
		require.Len(t, info["layers"], len(small.layers))
		require.Equal(t, []any{"/bin/sh", "/app/start"}, info["command"])
		dir := b.mkdir("mnt")
		require.Contains(t, b.ok("mount", ref, dir), ref+" mounted at "+dir)
		got := listTree(t, dir)
		require.Equal(t, want, withoutRoot(got))
		require.Error(t, os.WriteFile(dir+"/data/a", nil, 0o644), "it is read-only")
		require.Empty(t, b.ok("umount", dir))
		b.settled()
	}
	require.Contains(t, b.ok("image", "verify", s.ref), "good, 5 layers")
	require.Contains(t, b.ok("image", "verify", layout), "good, 5 layers")
}

// withoutRoot leaves out what no layer has.
func withoutRoot(lines []string) (out []string) {
	for _, l := range lines {
		if !strings.HasPrefix(l, "/\t") && !strings.HasPrefix(l, "/lost+found\t") {
			out = append(out, l)
		}
	}
	return out
}

// TestMountWritable writes to a mount; what was written is dropped.
func TestMountWritable(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir := b.mkdir("mnt")
	big := randomBytes(9, 3_000_000)
	for range 2 {
		b.ok("mount", "--rw", s.ref, dir)
		_, err := os.Stat(dir + "/new")
		require.ErrorIs(t, err, os.ErrNotExist)
		b.writeThrough(dir+"/new", big)
		require.NoError(t, os.WriteFile(dir+"/data/a", []byte("other"), 0o600))
		require.NoError(t, os.Remove(dir+"/data/big"))
		got, err := os.ReadFile(dir + "/new")
		require.NoError(t, err)
		require.Equal(t, big, got)
		got, err = os.ReadFile(dir + "/data/a.hard")
		require.NoError(t, err)
		require.Equal(t, "other", string(got))
		b.ok("umount", dir)
		b.settled()
	}
}

// writeThrough writes a file that the next reader gets from the device.
func (b *bench) writeThrough(path string, p []byte) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	require.NoError(b.t, err)
	defer f.Close()
	_, err = f.Write(p)
	require.NoError(b.t, err)
	require.NoError(b.t, f.Sync())
	require.NoError(b.t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// TestMountUpper writes to the upper layer that a config.v1.json names, which
// keeps it, and which only one may write to at a time.
func TestMountUpper(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	layout := b.path("layout")
	b.ok("convert", "--cache-dir", small.converted(), small.source(), "oci:"+layout)
	var c configJSON
	for _, l := range decode(t, b.ok("image", "info", "--json", s.ref))["layers"].([]any) {
		d := l.(map[string]any)["digest"].(string)
		c.Lowers = append(c.Lowers, lowerJSON{File: filepath.Join(layout, "blobs/sha256", strings.TrimPrefix(d, "sha256:")), Digest: d})
	}
	c.Upper = map[string]string{"data": b.upper(64 << 30)}
	config := b.config("config.v1.json", c)

	dir, second := b.mkdir("mnt"), b.mkdir("second")
	b.ok("mount", "--rw", config, dir)
	require.NoError(t, os.WriteFile(dir+"/kept", []byte("kept"), 0o600))
	r := b.run("mount", "--rw", config, second)
	require.Equal(t, exitFailed, r.code)
	require.Contains(t, r.stderr, "another process has it open")
	require.Equal(t, exitFailed, b.run("image", "verify", config).code)
	b.ok("umount", dir)

	b.ok("mount", config, dir)
	b.ok("mount", config, second) // two may read
	for _, d := range []string{dir, second} {
		p, err := os.ReadFile(d + "/kept")
		require.NoError(t, err)
		require.Equal(t, "kept", string(p))
		b.ok("umount", d)
	}
	b.ok("image", "verify", config)
}

// withoutFigures leaves out what run says of the bytes that it had to fetch.
func withoutFigures(stderr string) string {
	var b strings.Builder
	for line := range strings.Lines(stderr) {
		if !strings.HasPrefix(line, "reprise: ready after ") && !strings.HasPrefix(line, "reprise: at the end: ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestRun starts containers and passes on what they say.
func TestRun(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	require.Equal(t, "hello from the image\n", b.ok("run", s.ref))

	r := b.run("run", s.ref, "--", "/bin/sh", "-c", "echo out; echo err >&2; exit 42")
	require.Equal(t, result{42, "out\n", "err\n"}, result{r.code, r.stdout, withoutFigures(r.stderr)})
	require.Equal(t, 137, b.run("run", s.ref, "--", "/bin/sh", "-c", "sh -c 'kill -9 $$'").code)
	require.Equal(t, "1234 other /data\n", b.ok("run", "--user", "alice", "-e", "GREETING=other", "--workdir", "/data", s.ref,
		"--", "/bin/sh", "-c", `while read -r k v _; do [ "$k" != Uid: ] || u=$v; done < /proc/self/status; echo $u $GREETING $PWD`))
	cmd := b.command("run", s.ref, "--", "/bin/cat")
	cmd.Stdin = strings.NewReader("through\n")
	through := b.finish(cmd)
	require.Equal(t, result{0, "through\n", ""}, result{through.code, through.stdout, withoutFigures(through.stderr)})
	b.settled()

	// Exit status of what cannot be started, as shells have it.
	b.fails(127, []string{"run", s.ref, "--", "/no/such"}, "command not found in the image", "/no/such")
	b.fails(126, []string{"run", s.ref, "--", "/etc/passwd"}, "command cannot be executed", "/etc/passwd")
	b.fails(125, []string{"run", "--user", "nobodythere", s.ref}, "nobodythere")

	// A layout and a config.v1.json start too, without a registry.
	layout := "oci:" + b.path("layout")
	b.ok("convert", "--cache-dir", small.converted(), small.source(), layout)
	require.Equal(t, "hello from the image\n", b.ok("run", layout))
	b.settled()
}

// TestTraces records, attaches, lists, pulls, shows and replays, with the two
// ways in which registries list what is beside an image.
func TestTraces(t *testing.T) {
	skipWithoutRunc(t)
	for name, noReferrers := range map[string]bool{"referrers": false, "fallback tag": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			s := b.ownSite(noReferrers)
			b.traces(s)
			if noReferrers {
				return
			}
			b.recordAndAttach(s)
		})
	}
}

func (b *bench) traces(s *site) {
	t := b.t
	r := b.run("run", "--explain", "--root", b.mkdir("cold"), s.ref)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stderr, "no trace of workload sh-")

	file := b.path("trace")
	r = b.run("record", "-o", file, s.ref)
	require.Zero(t, r.code, r.stderr)
	require.Empty(t, r.stdout)
	require.Contains(t, r.stderr, "hello from the image\n")
	require.Contains(t, r.stderr, "ended by ready: exit 0")
	require.Contains(t, b.ok("attach", s.ref, file), "for workload sh-")

	var list []traceInfo
	require.NoError(t, json.Unmarshal([]byte(b.ok("trace", "ls", "--json", s.ref)), &list))
	require.Len(t, list, 1)
	require.True(t, strings.HasPrefix(list[0].Workload, "sh-"), list[0].Workload)
	require.Positive(t, list[0].Bytes)
	require.Positive(t, list[0].Ready)
	require.Contains(t, b.ok("trace", "ls", s.ref), list[0].Workload)

	pulled := b.path("pulled")
	b.ok("trace", "pull", s.ref, pulled)
	for _, f := range []string{file, pulled} {
		shown := decode(t, b.ok("trace", "show", "--json", f), "header.image", "header.manifest", "header.layers.digest", "header.workload",
			"events.at_us", "events.layer", "events.offset", "events.length", "end.reason", "end.ready_us")
		require.Equal(t, s.ref, shown["header"].(map[string]any)["image"])
		require.Contains(t, b.ok("trace", "show", f), "ready after")
	}
	p, err := os.ReadFile(pulled)
	require.NoError(t, err)
	require.Equal(t, string(p), b.ok("trace", "pull", s.ref, "-", "--workload", list[0].Workload))

	// The attached one, one from a file, and one by its digest.
	for _, trace := range []string{"auto", file, string(list[0].Digest)} {
		root := b.mkdir("root-" + filepath.Base(trace))
		r = b.run("run", "--root", root, "--explain", "--trace", trace, s.ref)
		require.Zero(t, r.code, r.stderr)
		require.Equal(t, "hello from the image\n", r.stdout)
		require.Contains(t, r.stderr, "replay:   replayed", "trace %s", trace)
		require.Contains(t, r.stderr, "fetched:  ")
	}
	r = b.run("run", "--root", b.mkdir("none"), "--explain", "--trace", "none", s.ref)
	require.Contains(t, r.stderr, "trace:    not used: no trace was asked for")
	require.Zero(t, r.code)

	dir := b.mkdir("mnt")
	r = b.run("mount", "--explain", "--workload", list[0].Workload, s.ref, dir)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stderr, "trace sha256:")
	b.ok("umount", dir)
	b.settled()
}

// recordAndAttach puts a second workload beside the image in one go.
func (b *bench) recordAndAttach(s *site) {
	t := b.t
	args := []string{"--ready-log", "^ready$", "--tail", "1ms", s.ref, "--", "/bin/sh", "-c", "trap 'exit 0' TERM; cat /data/more > /dev/null; echo ready; sleep 1000 & wait"}
	r := b.run(append([]string{"record", "--attach", "--workload", "serve"}, args...)...)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stdout, "for workload serve")
	require.Contains(t, r.stderr, `ended by ready: log "^ready$"`)
	require.Equal(t, 2, strings.Count(b.ok("trace", "ls", s.ref), "sha256:"))
	b.fails(exitFailed, []string{"trace", "pull", s.ref, b.path("which")}, "it has 2 traces", "--workload")
	b.ok("trace", "pull", s.ref, b.path("serve"), "--workload", "serve")
	b.fails(exitFailed, []string{"trace", "pull", s.ref, b.path("none"), "--workload", "nosuch"}, `no trace of workload "nosuch"`)

	// A recording that is interrupted is a good one.
	cmd := b.command("record", "--attach", "--workload", "interrupted", sayUp, s.ref, "--", "/bin/sh", "-c", "trap 'exit 0' TERM; : > /tmp/up; sleep 1000 & wait")
	said := b.start(cmd, func(line string) bool { return line == "up" })
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	require.NoError(t, cmd.Wait(), said())
	require.Contains(t, said(), "ended by stop: interrupted")
	b.ok("trace", "pull", s.ref, b.path("interrupted"), "--workload", "interrupted")

	// One of a container that fails is not attached, and says so.
	r = b.run("record", "--attach", "-o", b.path("failed"), s.ref, "--", "/bin/sh", "-c", "cat /data/a > /dev/null; exit 3")
	require.Equal(t, exitFailed, r.code)
	require.Contains(t, r.stderr, "container exited with status 3 before")
	require.NotContains(t, r.stdout, "attached")
	b.ok("trace", "show", b.path("failed"))
	b.settled()
}

// sayUp has a container that has made /tmp/up say so once it is known to have
// started; what it says by itself may come sooner.
const sayUp = "--ready-exec=[ ! -e /tmp/up ] || echo up > /proc/1/fd/1; exit 1"

// start starts a command and returns once a line of its standard error, where
// record sends the container's output too, or output is what is waited for.
// said gives all of both.
func (b *bench) start(cmd *exec.Cmd, is func(string) bool) (said func() string) {
	b.t.Helper()
	r, w, err := os.Pipe()
	require.NoError(b.t, err)
	cmd.Stdout, cmd.Stderr = w, w
	require.NoError(b.t, cmd.Start())
	require.NoError(b.t, w.Close())
	var all strings.Builder
	lines := bufio.NewScanner(r)
	found := false
	for !found && lines.Scan() {
		all.WriteString(lines.Text() + "\n")
		found = is(lines.Text())
	}
	rest := make(chan struct{})
	go func() {
		defer close(rest)
		for lines.Scan() {
			all.WriteString(lines.Text() + "\n")
		}
		r.Close()
	}()
	said = func() string {
		<-rest
		return all.String()
	}
	if !found {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		b.t.Fatalf("%q ended: %s", cmd.Args, said())
	}
	return said
}
