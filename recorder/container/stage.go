package container

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// This file is the stage's side: it runs in the child process only.

// stageName is the stage's argv[0], by which Init knows it.
const stageName = "reprise: container stage"

// Descriptors that the stage is started with, after the standard ones.
const (
	fdConn = 3 + iota
	fdStdin
	fdStdout
	fdStderr
	fdEnd
)

// initialized tells NewStage that executing the program again gives a stage.
var initialized bool

// Init makes a process that was started as a stage be one; it does not return
// then. Call it first in main, and in TestMain.
func Init() {
	initialized = true
	if os.Args[0] != stageName {
		return
	}
	for fd := fdConn; fd < fdEnd; fd++ {
		unix.CloseOnExec(fd)
	}
	if err := runStage(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// stage is the state of the child process.
type stage struct {
	conn  *net.UnixConn
	stdio [3]*os.File
	runc  string        // path to execute
	mem   *os.File      // what that leads to, if it is a memory file; kept from the garbage collector
	ended chan struct{} // closed when run is through

	mu  sync.Mutex   // guards id and own
	id  string       // of the running container; "" if there is none
	own map[int]bool // children that somebody waits for

	wmu sync.Mutex // guards writing to conn
}

// runStage serves the program until the container has ended, or the program is
// gone. The death signal ends the stage when the program is killed; the closed
// connection does where the signal was not set yet, and when it closes the Stage.
func runStage() error {
	s, err := openStage()
	if err != nil {
		return err
	}
	if err := privateMounts(); err != nil {
		return err
	}
	if err := s.loadRunc(); err != nil {
		return err
	}
	if err := s.report(report{Event: evReady}); err != nil {
		return err
	}
	go s.serve()
	<-s.ended
	unmountRoot()
	return nil
}

func openStage() (*stage, error) {
	s := &stage{ended: make(chan struct{}), own: map[int]bool{}}
	f := os.NewFile(fdConn, "connection")
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("stage: connection: %w", err)
	}
	var ok bool
	if s.conn, ok = conn.(*net.UnixConn); !ok {
		return nil, errors.New("stage: not started by NewStage")
	}
	for i := range s.stdio {
		s.stdio[i] = os.NewFile(uintptr(fdStdin+i), "stdio")
	}
	return s, nil
}

// loadRunc puts runc into a sealed memory file. It stays there when the page
// cache is dropped or short, and runc, which protects its binary from the
// container, sees that it need not make a copy of itself. Running it once shows
// that it can be run from there, and loads its libraries.
func (s *stage) loadRunc() error {
	path, err := exec.LookPath("runc")
	if err != nil {
		return errNoRunc
	}
	s.runc = path
	src, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("runc: %w", err)
	}
	defer src.Close()
	const sealing, executable = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING, 0x10 // MFD_EXEC, Linux 6.3
	fd, err := unix.MemfdCreate("runc", sealing|executable)
	if err != nil {
		fd, err = unix.MemfdCreate("runc", sealing)
	}
	if err != nil {
		return nil // the file itself will do
	}
	mem := os.NewFile(uintptr(fd), "runc")
	if _, err := io.Copy(mem, src); err != nil {
		return mem.Close()
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(mem.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return mem.Close()
	}
	// Not /proc/self: a child rearranges its descriptors before it executes.
	sealed := "/proc/1/fd/" + strconv.Itoa(fd)
	if exec.Command(sealed, "--version").Run() != nil {
		return mem.Close() // memory files may not be executed here
	}
	s.runc, s.mem = sealed, mem
	return nil
}

// runcCommand leaves the environment out: runc would take up NOTIFY_SOCKET and
// LISTEN_FDS, which are meant for the program.
func (s *stage) runcCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(s.runc, args...)
	cmd.Args[0] = "runc"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	return cmd
}

func (s *stage) report(r report, files ...*os.File) error {
	r.At = monotonic()
	r.Text = clip(r.Text)
	s.wmu.Lock()
	defer s.wmu.Unlock()
	return send(s.conn, r, files...)
}

// serve handles requests until the program closes the connection. Then it kills
// everything, here "everything but process 1", which makes run end.
func (s *stage) serve() {
	buf := make([]byte, maxMessage)
	started := false
	for {
		var req request
		files, err := receive(s.conn, buf, &req)
		if err != nil {
			break
		}
		switch {
		case req.Op == opStart && !started:
			started = true
			go s.run(files)
		case req.Op == opExec:
			go s.execute(req)
		default:
			closeAll(files)
		}
	}
	if !started {
		close(s.ended)
		return
	}
	s.killAll()
}

// killAll repeats the kill until run has ended: a process may have been born
// while it went on.
func (s *stage) killAll() {
	for {
		_ = unix.Kill(-1, unix.SIGKILL)
		select {
		case <-s.ended:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// run starts the container and waits for its end.
func (s *stage) run(files []*os.File) {
	defer close(s.ended)
	pid, pidfd, err := s.start(files)
	closeAll(files)
	closeAll(s.stdio[:])
	if err != nil {
		status := 125
		var start *StartError
		if errors.As(err, &start) {
			status, err = start.Status, start.Err
		}
		_ = s.report(report{Event: evFailed, Status: status, Text: err.Error()})
		return
	}
	_ = s.report(report{Event: evStarted, Pid: pid}, pidfd)
	go s.reap()
	status, err := await(pid)
	if err != nil {
		_ = s.report(report{Event: evFailed, Status: 125, Text: fmt.Sprintf("wait for process %d: %v", pid, err)})
		return
	}
	_ = s.report(report{Event: evExited, Status: status})
	_ = pidfd.Close()
}

// start mounts, writes the bundle and runs runc. The container's first process
// becomes a child of the stage when runc, which is detached, ends.
func (s *stage) start(files []*os.File) (pid int, pidfd *os.File, err error) {
	cfg, err := readConfig(files)
	if err != nil {
		return 0, nil, err
	}
	if err := mountRoot(cfg, files[1:]); err != nil {
		return 0, nil, err
	}
	if err := s.report(report{Event: evMounted}); err != nil {
		return 0, nil, err
	}
	if err := writeBundle(cfg); err != nil {
		return 0, nil, err
	}
	id := "reprise-" + strconv.FormatInt(monotonic(), 36) // must not be the name of a cgroup
	if err := s.runRunc(id); err != nil {
		return 0, nil, err
	}
	if pid, pidfd, err = startedProcess(); err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.id = id
	s.own[pid] = true
	return pid, pidfd, nil
}

func readConfig(files []*os.File) (*Config, error) {
	cfg := new(Config)
	if len(files) == 0 {
		return nil, errors.New("stage: no configuration")
	}
	b, err := io.ReadAll(io.NewSectionReader(files[0], 0, maxConfig))
	if err != nil {
		return nil, fmt.Errorf("stage: read configuration: %w", err)
	}
	if err := json.Unmarshal(b, cfg); err != nil {
		return nil, fmt.Errorf("stage: read configuration: %w", err)
	}
	want := 1
	if cfg.LowerDir != "" || cfg.deviceIsFile() {
		want++
	}
	if cfg.StateDir != "" {
		want++
	}
	if len(files) != want {
		return nil, fmt.Errorf("stage: %d descriptors instead of %d", len(files), want)
	}
	return cfg, nil
}

// writeBundle writes what runc reads.
func writeBundle(cfg *Config) error {
	name := cfg.User
	if name == "" {
		name = cfg.Image.User
	}
	id, err := userIn(mergedDir, name)
	if err != nil {
		return err
	}
	h, err := thisHost(cfg)
	if err != nil {
		return err
	}
	spec, err := runtimeSpec(cfg, id, h, mergedDir)
	if err != nil {
		return err
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundleDir, "config.json"), b, 0o600)
}

// thisHost gathers what the specification takes from the machine, and copies
// the files that the container gets, so that it cannot change the machine's.
func thisHost(cfg *Config) (host, error) {
	var h host
	var err error
	if h.Hostname, err = os.Hostname(); err != nil {
		return h, err
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return h, fmt.Errorf("limit of open files: %w", err)
	}
	h.NoFile = min(limit.Max, 1<<20)
	if h.Caps, err = ownCaps(); err != nil {
		return h, err
	}
	if cfg.Network != HostNetwork {
		h.Hosts, err = bundleFile("hosts", []byte("127.0.0.1\tlocalhost\n::1\tlocalhost\n"))
		return h, err
	}
	for name, to := range map[string]*string{"resolv.conf": &h.Resolv, "hosts": &h.Hosts} {
		b, err := os.ReadFile("/etc/" + name)
		if err != nil {
			continue // the machine has none
		}
		if *to, err = bundleFile(name, b); err != nil {
			return h, err
		}
	}
	return h, nil
}

func bundleFile(name string, b []byte) (string, error) {
	path := filepath.Join(bundleDir, name)
	return path, os.WriteFile(path, b, 0o644)
}

// ownCaps reads this process's effective capabilities.
func ownCaps() (uint64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	return 0, errors.New("read capabilities: /proc/self/status has no CapEff")
}

// runRunc starts the container. runc ends once the container's process runs.
func (s *stage) runRunc(id string) error {
	cmd := s.runcCommand("--root", runcDir, "--log", logFile, "--log-format", "json", "--rootless=true",
		"run", "--detach", "--no-new-keyring", "--bundle", bundleDir, "--pid-file", pidFile, id)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.stdio[0], s.stdio[1], s.stdio[2]
	err := s.runCommand(cmd, func() { _ = s.report(report{Event: evRunc}) })
	if err == nil {
		return nil
	}
	log, openErr := os.Open(logFile)
	if openErr != nil {
		return fmt.Errorf("runc: %w", err)
	}
	defer log.Close()
	return runcError(log, err)
}

// startedProcess finds the process that runc started.
func startedProcess() (int, *os.File, error) {
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return 0, nil, fmt.Errorf("runc: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid < 2 {
		return 0, nil, fmt.Errorf("runc: pid file holds %q", b)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return pid, os.NewFile(uintptr(fd), "pidfd"), nil
}

// await waits for a child and gives its exit status as shells do.
func await(pid int) (int, error) {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return ws.ExitStatus(), nil
	}
}

// execute runs a command in the container.
func (s *stage) execute(req request) {
	s.mu.Lock()
	id := s.id
	s.mu.Unlock()
	r := report{Event: evExec, ID: req.ID, Status: 125, Text: "container does not run"}
	if id != "" {
		out := new(tail)
		cmd := s.runcCommand(append([]string{"--root", runcDir, "--rootless=true", "exec", id}, req.Args...)...)
		cmd.Stdout, cmd.Stderr = out, out
		if err := s.runCommand(cmd, func() {}); cmd.ProcessState == nil {
			r.Text = err.Error()
		} else {
			r.Status, r.Text = cmd.ProcessState.ExitCode(), out.String()
		}
	}
	_ = s.report(r)
}

// runcError turns runc's log into an error; other is what is left to say if the
// log does not. runc has no codes for what a user can mend, only words, which
// have been the same since its first release.
func runcError(log io.Reader, other error) error {
	msg := ""
	lines := bufio.NewScanner(io.LimitReader(log, 1<<20))
	for lines.Scan() {
		var entry struct{ Level, Msg string }
		if json.Unmarshal(lines.Bytes(), &entry) == nil && (entry.Level == "error" || entry.Level == "fatal") {
			msg = entry.Msg
		}
	}
	if msg == "" {
		return fmt.Errorf("runc: %w", other)
	}
	msg = strings.TrimPrefix(msg, "runc run failed: ")
	msg = strings.TrimPrefix(msg, "unable to start container process: ")
	msg = strings.TrimPrefix(msg, "error during container init: ")
	e := &StartError{Status: 125, Err: errors.New("runc: " + msg)}
	if strings.Contains(msg, "seccomp not supported") {
		e.Err = errors.New("runc: it is built without seccomp: install one that has it, or start without the filter")
	}
	if !strings.Contains(msg, "exec") {
		return e
	}
	switch {
	case strings.Contains(msg, "executable file not found"), strings.Contains(msg, "no such file or directory"):
		e.Status, e.Err = 127, fmt.Errorf("command not found in the image: %s", msg)
	case strings.Contains(msg, "permission denied"), strings.Contains(msg, "is a directory"):
		e.Status, e.Err = 126, fmt.Errorf("command cannot be executed: %s", msg)
	}
	return e
}
