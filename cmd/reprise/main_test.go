package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/recorder/container"
)

// The test binary, with this variable in its environment, is the program.
const envProgram = "REPRISE_TEST_PROGRAM"

// envMark marks the processes of one test.
const envMark = "REPRISE_TEST_MARK"

// patience bounds waits that end much sooner when all is well.
const patience = 3 * time.Minute

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // a second, for each process, otherwise
	if os.Getenv(envProgram) != "" {
		main()
		return
	}
	container.Init()
	code := m.Run()
	small.remove()
	os.Exit(code)
}

// skipUnprivileged skips a test that mounts where mounting is not possible.
func skipUnprivileged(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs %s: %v", dev, err)
		}
		f.Close()
	}
	if !hasTool("mkfs.ext4") {
		t.Skip("needs mkfs.ext4")
	}
}

// skipWithoutRunc skips a test that starts containers.
func skipWithoutRunc(t testing.TB) {
	t.Helper()
	skipUnprivileged(t)
	if !hasTool("runc") {
		t.Skip("needs runc")
	}
}

func hasTool(name string) bool {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if fi, err := os.Stat(filepath.Join(dir, name)); err == nil && fi.Mode()&0o111 != 0 {
			return true
		}
	}
	return false
}

// A bench is where one test runs commands: a state directory, and a mark by
// which its processes, mounts and loop devices are known. When the test ends
// nothing of them may be left.
type bench struct {
	t    testing.TB
	root string
	dir  string // for the test's own files
	mark string
	env  []string
	loop []string // parts of the names of loop devices of this test
}

func newBench(t testing.TB) *bench {
	b := &bench{t: t, dir: t.TempDir(), mark: rand.Text()}
	require.NoError(t, os.Chmod(filepath.Dir(b.dir), 0o755)) // for nobody
	b.root = filepath.Join(b.dir, "state")
	b.env = append(os.Environ(), envProgram+"=1", envMark+"="+b.mark, "DOCKER_CONFIG="+b.dir, "TMPDIR="+b.mkdir("tmp"))
	t.Cleanup(func() {
		b.settled()
		for _, f := range b.files("tmp") {
			require.Equal(t, ".lock", filepath.Ext(f), "temporary file %s", f)
		}
	})
	return b
}

func (b *bench) mkdir(name string) string {
	dir := filepath.Join(b.dir, name)
	require.NoError(b.t, os.MkdirAll(dir, 0o777))
	require.NoError(b.t, os.Chmod(dir, 0o777))
	return dir
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) write(name, content string) string {
	require.NoError(b.t, os.WriteFile(b.path(name), []byte(content), 0o644))
	return b.path(name)
}

// files lists what is below a directory, other than directories.
func (b *bench) files(name string) (all []string) {
	_ = filepath.WalkDir(b.path(name), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, path)
		}
		return nil
	})
	return all
}

// A result is what a command has done.
type result struct {
	code           int
	stdout, stderr string
}

// command prepares one command. It gets --root where it takes that.
func (b *bench) command(args ...string) *exec.Cmd {
	self, err := os.Executable()
	require.NoError(b.t, err)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	b.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, self, b.withRoot(args)...)
	cmd.Args[0] = "reprise"
	cmd.Env = b.env
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGQUIT) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// withRoot names the state directory, to those commands that have one and take
// the default otherwise.
func (b *bench) withRoot(args []string) []string {
	if slices.Contains(args, "--root") {
		return args
	}
	switch {
	case len(args) > 0 && slices.Contains([]string{"mount", "umount", "run", "record", "attach"}, args[0]):
		return slices.Insert(slices.Clone(args), 1, "--root", b.root)
	case len(args) > 1 && args[0] == "trace" && args[1] == "import":
		return slices.Insert(slices.Clone(args), 2, "--root", b.root)
	}
	return args
}

// run runs a command to its end.
func (b *bench) run(args ...string) result {
	b.t.Helper()
	return b.finish(b.command(args...))
}

func (b *bench) finish(cmd *exec.Cmd) result {
	b.t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.t.Fatalf("%q: %v", cmd.Args, err)
	}
	r := result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
	if strings.Contains(r.stderr, "DATA RACE") || strings.Contains(r.stderr, "goroutine ") {
		b.t.Fatalf("%q:\n%s", cmd.Args, r.stderr)
	}
	return r
}

// ok runs a command that must succeed and returns its standard output.
func (b *bench) ok(args ...string) string {
	b.t.Helper()
	r := b.run(args...)
	require.Zero(b.t, r.code, "%q:\n%s", args, r.stderr)
	return r.stdout
}

// fails runs a command that must fail with the status and say, in one message,
// all of the words; and that leaves nothing behind.
func (b *bench) fails(status int, args []string, words ...string) result {
	b.t.Helper()
	r := b.run(args...)
	b.complains(r, status, args, words...)
	return r
}

func (b *bench) complains(r result, status int, args []string, words ...string) {
	b.t.Helper()
	require.Equal(b.t, status, r.code, "%q:\n%s", args, r.stderr)
	line := message(r.stderr)
	require.NotEmpty(b.t, line, "%q says nothing:\n%s", args, r.stderr)
	for _, w := range words {
		require.Contains(b.t, line, w, "%q", args)
	}
	if testing.Verbose() {
		b.t.Logf("%q: %s", args, line)
	}
	b.settled()
}

// message is the line that says what went wrong; the only one.
func message(stderr string) string {
	var found []string
	for line := range strings.Lines(stderr) {
		if strings.HasPrefix(line, "reprise: ") {
			found = append(found, strings.TrimSpace(line))
		}
	}
	if len(found) != 1 {
		return ""
	}
	return found[0]
}

// eventually waits for what the kernel does in its own time.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// settled makes sure that nothing of this test is left: no process, no mount,
// no loop device, no state.
func (b *bench) settled() {
	b.t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	left := ""
	deadline := time.Now().Add(20 * time.Second)
	for {
		if left = b.leftovers(); left == "" {
			return
		}
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	b.clean()
	b.t.Errorf("left behind:\n%s", left)
}

func (b *bench) leftovers() string {
	var all []string
	for _, p := range b.processes() {
		all = append(all, fmt.Sprintf("process %d: %s", p, cmdline(p)))
	}
	for _, m := range b.mounts() {
		all = append(all, "mount "+m)
	}
	for _, l := range b.loops() {
		all = append(all, "loop device "+l)
	}
	for _, dir := range []string{"state/run", "state/devices"} {
		entries, _ := os.ReadDir(b.path(dir))
		for _, e := range entries {
			all = append(all, "state "+filepath.Join(dir, e.Name()))
		}
	}
	if _, err := os.Stat(b.path("state/reprise.sock")); err == nil {
		all = append(all, "the daemon's socket")
	}
	return strings.Join(all, "\n")
}

func cmdline(pid int) string {
	p, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.ReplaceAll(strings.TrimRight(string(p), "\x00"), "\x00", " ")
}

// processes are those with the test's mark.
func (b *bench) processes() (pids []int) {
	mark := []byte(envMark + "=" + b.mark)
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, name := range environs {
		p, err := os.ReadFile(name)
		var pid int
		if _, e := fmt.Sscanf(name, "/proc/%d/", &pid); err != nil || e != nil || pid == os.Getpid() {
			continue
		}
		if bytes.Contains(p, mark) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (b *bench) mounts() (at []string) {
	p, err := os.ReadFile("/proc/self/mounts")
	require.NoError(b.t, err)
	for line := range strings.Lines(string(p)) {
		if f := strings.Fields(line); strings.HasPrefix(f[1], b.dir+"/") && f[2] != "tmpfs" {
			at = append(at, f[1])
		}
	}
	return at
}

func (b *bench) loops() (found []string) {
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range names {
		p, _ := os.ReadFile(name)
		for _, part := range append(b.loop, strings.ReplaceAll(b.dir, "/", "_")) {
			if strings.Contains(string(p), part) {
				found = append(found, name+": "+string(p))
			}
		}
	}
	return found
}

// clean ends what a failed test has left.
func (b *bench) clean() {
	for _, dir := range b.mounts() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
	for _, pid := range b.processes() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// vectors is the folder of the reference's files.
func vectors(t testing.TB, elem ...string) string {
	t.Helper()
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		require.NotEqual(t, "/", dir, "no go.mod above the working directory")
		dir = filepath.Dir(dir)
	}
	dir = filepath.Join(dir, "..", "shared", "vectors")
	if _, err := os.Stat(dir); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("vectors: %v", err)
		}
		t.Skipf("vectors: %v", err)
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// sha is the sha256 of a file.
func sha(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	require.NoError(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

// decode reads JSON that has the keys, given as dotted paths.
func decode(t testing.TB, text string, keys ...string) map[string]any {
	t.Helper()
	var m map[string]any
	require.NoError(t, json.Unmarshal([]byte(text), &m), text)
	for _, key := range keys {
		var at any = m
		for part := range strings.SplitSeq(key, ".") {
			if list, ok := at.([]any); ok {
				require.NotEmpty(t, list, key)
				at = list[0]
			}
			o, ok := at.(map[string]any)
			require.True(t, ok, "%s in %s", key, text)
			at, ok = o[part]
			require.True(t, ok, "%s is missing in %s", key, text)
		}
	}
	return m
}

// copyFile copies a vector that is to be written to.
func copyFile(t testing.TB, from, to string) string {
	t.Helper()
	p, err := os.ReadFile(from)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(to, p, 0o644))
	return to
}

// executable is the test binary where everybody may run it.
func (b *bench) executable() string {
	self, err := os.Executable()
	require.NoError(b.t, err)
	to := b.path("reprise")
	if os.Link(self, to) != nil {
		copyFile(b.t, self, to)
	}
	require.NoError(b.t, os.Chmod(to, 0o755))
	return to
}
