package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/replayer/node"
)

// TestDoctor runs it on this machine: table and JSON say the same, and the exit
// status is what they say.
func TestDoctor(t *testing.T) {
	b := newBench(t)
	dir := b.mkdir("doctor")
	table := b.run("doctor", "--root", dir)
	r := b.run("doctor", "--root", dir, "--json")
	require.Equal(t, table.code, r.code)
	require.Empty(t, table.stderr+r.stderr)
	var d diagnosis
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &d))
	require.Equal(t, d.OK, r.code == 0)
	require.Equal(t, d.OK, strings.Contains(table.stdout, "can run reprise"))
	require.NotContains(t, table.stdout, "\x1b")
	t.Log(table.stdout)
	names := map[string]bool{}
	for _, f := range d.Findings {
		names[f.Name] = true
		require.Contains(t, table.stdout, f.Name)
		if f.Name != "state" { // how much is free changes
			require.Contains(t, table.stdout, f.Detail)
		}
		for _, line := range f.remedyLines() {
			require.Contains(t, table.stdout, line+"\n")
		}
		if f.Grade == broken || f.Grade == lacking {
			require.NotEmpty(t, f.Remedy, "%+v", f)
		}
	}
	for _, name := range []string{"kernel", "privileges", "fuse", "erofs", "ublk", "nbd", "tcmu", "ext4", "state", "daemon", "runc", "registries"} {
		require.True(t, names[name], name)
	}
	require.Empty(t, b.files("doctor"), "it changes nothing")
	if os.Geteuid() != 0 {
		require.Equal(t, 1, r.code)
	}
}

func TestDoctorNobody(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become nobody")
	}
	b := newBench(t)
	cmd := b.command("doctor", "--root", filepath.Join(b.dir, "x", "y"))
	cmd.Path = b.executable()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	r := b.finish(cmd)
	require.Equal(t, 1, r.code, r.stderr)
	require.Contains(t, r.stdout, "FAIL  privileges")
	require.Contains(t, r.stdout, "for root only")
}

// TestDoctorConfigured looks at the daemon's configuration, and where that says.
func TestDoctorConfigured(t *testing.T) {
	b := newBench(t)
	find := func(args ...string) (configuration, state finding) {
		t.Helper()
		var d diagnosis
		require.NoError(t, json.Unmarshal([]byte(b.run(append([]string{"doctor", "--json"}, args...)...).stdout), &d))
		var node []finding
		for _, f := range d.Findings {
			if f.Group == groupNode {
				node = append(node, f)
			}
		}
		return findingOf(t, node, "daemon config"), findingOf(t, node, "state")
	}
	path := b.write("config.toml", "root = \""+b.path("there")+"\"\n")
	f, state := find("--config", path)
	require.Equal(t, finding{Group: groupNode, Name: "daemon config", Grade: fine, Detail: path}, f)
	require.Contains(t, state.Detail, b.path("there"))
	_, state = find("--config", path, "--root", b.path("here"))
	require.Contains(t, state.Detail, b.path("here"))
	for text, says := range map[string]string{
		"rooot = \"x\"\n":                 "rooot",
		"root = \"\"\n":                   "root",
		"[cache]\nchunk_size = \"3 B\"\n": "chunk_size",
	} {
		f, _ = find("--config", b.write("config.toml", text))
		require.Equal(t, lacking, f.Grade, text)
		require.Contains(t, f.Detail, says)
		require.Contains(t, f.Remedy, "reprise daemon config")
	}
	f, _ = find("--config", b.path("none"))
	require.Equal(t, lacking, f.Grade, "a file that was named is to be there")
}

func TestDoctorUsage(t *testing.T) {
	b := newBench(t)
	for _, args := range [][]string{{"doctor", "x", "y"}, {"doctor", "x y"}, {"doctor", "--root="}, {"doctor", "--frob"}} {
		require.Equal(t, exitUsage, b.run(args...).code, args)
	}
}

func TestDiagnosisPrinted(t *testing.T) {
	d := &diagnosis{Findings: []finding{
		{Group: "One", Name: "a", Grade: fine, Detail: "all is well"},
		{Group: "One", Name: "longer", Grade: lacking, Detail: "gone", Remedy: "bring it back"},
		{Group: "Two", Name: "b", Grade: without, Detail: "nobody needs it"},
	}}
	var out bytes.Buffer
	require.NoError(t, d.print(&out))
	require.Equal(t, `
One
  ok    a       all is well
  warn  longer  gone
                → bring it back

Two
  -     b       nobody needs it

This machine can run reprise; some things do not work: see warn above (1).
`, out.String())
	d.add(finding{Group: "Two", Name: "c", Grade: broken, Detail: "x"})
	require.Contains(t, d.verdict()[0], "cannot run reprise")
	require.ErrorIs(t, d.print(failingWriter{}), errFull)
}

var errFull = errors.New("full")

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errFull }

func TestFold(t *testing.T) {
	text := "a few words, an exceptionally-long-word-that-does-not-fit-anywhere and öäü at the end"
	for width := range 80 {
		tab := table{width: width}
		got := tab.fold(text, 10)
		require.Equal(t, strings.Fields(text), strings.Fields(got))
		for i, line := range strings.Split(got, "\n") {
			if i == 0 {
				line = strings.Repeat(" ", 10) + line
			}
			if n := utf8.RuneCountInString(line); width >= 30 && strings.Contains(strings.TrimSpace(line), " ") {
				require.LessOrEqual(t, n, width)
			}
		}
	}
}

func TestCheckTransport(t *testing.T) {
	missing := &device.FeatureError{Feature: "/dev/x", Hint: "modprobe x", Err: unix.ENOENT}
	all := []device.Support{
		{Transport: "fuse", Detail: "d", Missing: missing, Since: "5.8"},
		{Transport: "nbd", Detail: "d", Available: true, Survives: true, Auto: "all images"},
	}
	out := checkTransports(all)
	require.Equal(t, finding{Group: groupTransports, Name: "fuse", Grade: without,
		Detail: "/dev/x is not there (Linux 5.8 can have it)", Remedy: "modprobe x"}, out[0])
	require.Equal(t, "d; devices survive a kill; auto for all images", out[1].Detail)
	require.True(t, *out[1].Survives)
	require.Equal(t, broken, checkTransports(all[:1])[0].Grade, "without any transport nothing works")
}

func TestCheckKernel(t *testing.T) {
	for release, want := range map[string]grade{"5.4.0": broken, "5.15.0-1": lacking, "6.8.12": lacking, "6.9.0": fine, "7.1": fine, "?": fine} {
		f := checkKernel(release)
		require.Equal(t, want, f.Grade, release)
		require.Equal(t, want == fine, f.Remedy == "", release)
	}
}

func TestCheckState(t *testing.T) {
	dir := t.TempDir()
	require.Equal(t, fine, checkState(dir).Grade)
	require.Contains(t, checkState(filepath.Join(dir, "a", "b")).Detail, "will be made")
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	for _, bad := range []string{file, filepath.Join(file, "below")} {
		f := checkState(bad)
		require.Equal(t, broken, f.Grade)
		require.NotEmpty(t, f.Remedy)
	}
}

func TestCheckDaemon(t *testing.T) {
	root := t.TempDir()
	require.Equal(t, without, checkDaemon(t.Context(), root).Grade)

	l, err := net.Listen("unix", node.SocketPath(root))
	require.NoError(t, err)
	kept := true
	answer := func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, "/v1/server", r.URL.Path)
		_ = json.NewEncoder(w).Encode(node.ServerInfo{Pid: 7, Devices: 3, Kept: kept, Version: "1.2"})
	}
	srv := &http.Server{Handler: http.HandlerFunc(answer)}
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()
	f := checkDaemon(t.Context(), root)
	require.Equal(t, finding{Group: groupNode, Name: "daemon", Grade: fine, Detail: "process 7, version 1.2, 3 devices"}, f)
	kept = false
	require.Equal(t, lacking, checkDaemon(t.Context(), root).Grade)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.Contains(t, checkDaemon(ctx, root).Detail, "does not answer")
	require.NoError(t, srv.Close())
	require.ErrorIs(t, <-served, http.ErrServerClosed)
}

func TestCheckHosts(t *testing.T) {
	dir := t.TempDir()
	require.Equal(t, without, checkHosts(filepath.Join(dir, "none")).Grade)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "docker.io"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "docker.io", "hosts.toml"), nil, 0o600))
	require.Contains(t, checkHosts(dir).Detail, "hosts.toml for 1")
	require.Equal(t, lacking, checkHosts(filepath.Join(dir, "docker.io", "hosts.toml")).Grade)
}
