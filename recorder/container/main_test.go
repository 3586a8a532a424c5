package container

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary is also what runs in the containers, and the program that is
// killed under a container. These variables say which.
const (
	envWorkload = "REPRISE_TEST_WORKLOAD"
	envProgram  = "REPRISE_TEST_PROGRAM"
)

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0") // a second, for each process, otherwise
	if len(os.Args) > 1 && os.Getenv(envWorkload) != "" {
		os.Exit(workload(os.Args[1:]))
	}
	Init()
	if lower := os.Getenv(envProgram); lower != "" {
		os.Exit(program(lower))
	}
	goleak.VerifyTestMain(descriptors{m})
}

// descriptors fails a run that leaks descriptors.
type descriptors struct{ m *testing.M }

func (d descriptors) Run() int {
	r, w, err := os.Pipe() // the poller's own descriptors come with the first
	if err != nil {
		panic(err)
	}
	r.Close()
	w.Close()
	before := openFiles()
	code := d.m.Run()
	if after := openFiles(); code == 0 && len(after) > len(before) {
		fmt.Fprintf(os.Stderr, "descriptors leaked:\nbefore %v\nafter %v\n", before, after)
		return 1
	}
	return code
}

func openFiles() []string {
	var all []string
	dir, _ := os.ReadDir("/proc/self/fd")
	for _, e := range dir {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil {
			all = append(all, to)
		}
	}
	return all
}

// workload is what the first process of a container does.
func workload(args []string) int {
	switch args[0] {
	case "clock":
		fmt.Println(monotonic())
	case "listen": // ADDRESS; prints it; until killed
		l, err := net.Listen("tcp", args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 3
		}
		fmt.Println(l.Addr())
		for { // not select {}: the runtime would see a deadlock
			if c, err := l.Accept(); err == nil {
				c.Close()
			}
		}
	case "http": // ADDRESS: 503 twice, then 200
		var n atomic.Int32
		err := http.ListenAndServe(args[1], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if n.Add(1) < 3 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		}))
		fmt.Fprintln(os.Stderr, err)
		return 3
	case "trap": // SIGNAL STATUS
		sig, err := ParseSignal(args[1])
		if err != nil {
			return 3
		}
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, sig)
		fmt.Println("trapping")
		<-ch
		status, _ := strconv.Atoi(args[2])
		return status
	case "deaf":
		signal.Ignore(unix.SIGTERM)
		fmt.Println("deaf")
		for { // not select {}: the runtime would see a deadlock
			time.Sleep(time.Hour)
		}
	}
	return 3
}

// program starts a container on lower, says so, and waits to be killed.
func program(lower string) int {
	stage, err := NewStage(ctxBackground, nil)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	cfg := baseConfig(lower, "deaf")
	if strings.HasPrefix(lower, "/dev/") {
		cfg.LowerDir, cfg.Device = "", lower
	}
	c, err := stage.Start(ctxBackground, cfg)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("started", stage.Pid(), c.Pid())
	for {
		time.Sleep(time.Hour)
	}
}

// probe skips a test that this machine or user cannot run.
func probe(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("needs runc")
	}
}

// makeRoot makes an image's tree of links into the machine's own /usr, which
// baseConfig mounts.
func makeRoot(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	fillRoot(t, dir)
	return dir
}

func fillRoot(t testing.TB, dir string) {
	t.Helper()
	for _, d := range []string{"usr", "etc", "tmp", "self", "data", "proc", "dev", "sys"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if _, err := os.Stat("/usr/" + l); err == nil {
			must(t, os.Symlink("usr/"+l, filepath.Join(dir, l)))
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nalice:x:1234:2345::/home/alice:/bin/sh\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "etc/group"), []byte("root:x:0:\nalice:x:2345:\naudio:x:63:alice\nvideo:x:64:bob,alice\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "etc/plain"), []byte("not a program\n"), 0o644))
}

// baseConfig runs a workload of the test binary.
func baseConfig(lower string, args ...string) *Config {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cfg := &Config{
		LowerDir: lower,
		Args:     append([]string{"/self/" + filepath.Base(self)}, args...),
		Env:      []string{envWorkload + "=1"},
		Network:  OwnNetwork,
		Mounts: []Mount{
			{Source: "/usr", Target: "/usr", ReadOnly: true},
			{Source: filepath.Dir(self), Target: "/self", ReadOnly: true},
		},
	}
	return cfg
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// firstLine reads a line from a program's output.
func firstLine(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("read first line: %v (%q)", err, line)
	}
	return strings.TrimSpace(line)
}
