package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Start mounts and starts the container, and returns once its process has been
// started. Whatever it returns, the caller closes the stage in the end. When ctx
// ends first, the stage is killed. The error is a *StartError when mounting or
// runc went wrong. A stage starts one container: a second Start is an error.
func (s *Stage) Start(ctx context.Context, config *Config) (*Container, error) {
	first := false
	s.askOnce.Do(func() { first = true })
	if !first {
		return nil, errors.New("start container: its stage has been used: make another")
	}
	s.mu.Lock()
	s.times.Requested = time.Now()
	s.mu.Unlock()
	cfg, c, err := s.prepare(config)
	if err != nil {
		return nil, &StartError{Status: 125, Err: err}
	}
	if err := s.begin(ctx, cfg); err != nil {
		return nil, err
	}
	c.attach(cfg.Network)
	return c, nil
}

// prepare checks the configuration, fills its defaults, and sets up what must
// watch the container from its first moment.
func (s *Stage) prepare(config *Config) (*Config, *Container, error) {
	cfg := *config
	if err := cfg.fill(); err != nil {
		return nil, nil, err
	}
	stop, err := ParseSignal(cfg.StopSignal)
	if err != nil {
		return nil, nil, fmt.Errorf("stop signal: %w", err)
	}
	c := &Container{stage: s, ready: cfg.Ready, stop: stop, logged: make(chan struct{}), heard: make(chan struct{})}
	if err := c.ready.check(cfg.Network); err != nil {
		return nil, nil, err
	}
	if c.ready.Log != nil {
		for _, w := range s.logs {
			w.expect(c.ready.Log, c.seen)
		}
	}
	return &cfg, c, nil
}

// fill checks a configuration and sets its defaults.
func (cfg *Config) fill() error {
	if (cfg.Device == "") == (cfg.LowerDir == "") {
		return errors.New("configuration: give either Device or LowerDir")
	}
	if cfg.FSType == "" {
		cfg.FSType = "ext4"
	}
	if cfg.StopSignal == "" {
		cfg.StopSignal = cfg.Image.StopSignal
	}
	switch cfg.Network {
	case "":
		cfg.Network = HostNetwork
	case HostNetwork, OwnNetwork:
	default:
		return fmt.Errorf("network %q: not known: give %s or %s", cfg.Network, HostNetwork, OwnNetwork)
	}
	for _, m := range cfg.Mounts {
		if !filepath.IsAbs(m.Source) || !filepath.IsAbs(m.Target) {
			return fmt.Errorf("mount %s on %s: give absolute paths", m.Source, m.Target)
		}
	}
	for _, kv := range cfg.Env {
		if key, _, ok := strings.Cut(kv, "="); !ok || key == "" {
			return fmt.Errorf("environment %q: give KEY=VALUE", kv)
		}
	}
	_, err := command(cfg)
	return err
}

// begin hands the stage its configuration and waits for the start.
func (s *Stage) begin(ctx context.Context, cfg *Config) error {
	files, err := cfg.files()
	defer closeAll(files)
	if err != nil {
		return &StartError{Status: 125, Err: err}
	}
	select {
	case <-s.up:
	case <-s.settled:
		return s.startFailure()
	case <-ctx.Done():
		return s.abandon(ctx)
	}
	s.sendMu.Lock()
	err = send(s.conn, request{Op: opStart}, files...)
	s.sendMu.Unlock()
	if err != nil && !errors.Is(err, unix.EPIPE) { // EPIPE: the stage's death says more
		return fmt.Errorf("start container: tell the stage: %w", err)
	}
	select {
	case <-s.settled:
		return s.startFailure()
	case <-ctx.Done():
		return s.abandon(ctx)
	}
}

// abandon kills the stage of a start that nobody waits for any more.
func (s *Stage) abandon(ctx context.Context) error {
	_ = s.proc.Kill()
	return fmt.Errorf("start container: %w", context.Cause(ctx))
}

// startFailure is nil if the container has started.
func (s *Stage) startFailure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started {
		return nil
	}
	var start *StartError
	if s.failure == nil || errors.As(s.failure, &start) {
		return s.failure
	}
	return &StartError{Status: 125, Err: s.failure}
}

// files are the descriptors that go with the start request.
func (cfg *Config) files() (files []*os.File, err error) {
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	if len(b) > maxConfig {
		return nil, fmt.Errorf("configuration of %d bytes is over the limit of %d", len(b), maxConfig)
	}
	mem, err := memFile("config", b)
	if err != nil {
		return nil, err
	}
	files = append(files, mem)
	if cfg.deviceIsFile() {
		dir := filepath.Dir(cfg.Device)
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return files, fmt.Errorf("device %s: %w", cfg.Device, err)
		}
		files = append(files, os.NewFile(uintptr(fd), dir))
	}
	if cfg.LowerDir != "" {
		f, err := tree(cfg.LowerDir)
		if err != nil {
			return files, fmt.Errorf("lower directory %s: %w", cfg.LowerDir, err)
		}
		files = append(files, f)
	}
	if cfg.StateDir != "" {
		if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
			return files, fmt.Errorf("state directory: %w", err)
		}
		f, err := tree(cfg.StateDir)
		if err != nil {
			return files, fmt.Errorf("state directory %s: %w", cfg.StateDir, err)
		}
		files = append(files, f)
	}
	return files, nil
}

// Timeline gives the moments so far.
func (s *Stage) Timeline() Timeline {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.times
}

// Pid is the process ID of the stage. What its mount namespace holds is seen
// below /proc/<pid>/root.
func (s *Stage) Pid() int { return s.proc.Pid }

// exitStatus is the container's, after exited.
func (s *Stage) exitStatus() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return s.status, nil
	}
	return 0, fmt.Errorf("container: %w", s.failure)
}

// Close kills the container if it still runs, unmounts its file system, and
// waits until nothing of either is left. It may be called more than once.
func (s *Stage) Close() error {
	s.sendMu.Lock()
	_ = s.conn.CloseWrite() // the stage kills, unmounts and ends
	s.sendMu.Unlock()
	if !s.waitGone(endGrace) {
		_ = s.proc.Kill()
		if !s.waitGone(endGrace) {
			return fmt.Errorf("container: stage %d does not end: is its image's device still served?", s.proc.Pid)
		}
	}
	_ = s.conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pidfd != nil {
		_ = s.pidfd.Close()
		s.pidfd = nil
	}
	return nil
}

func (s *Stage) waitGone(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-s.gone:
		return true
	case <-timer.C:
		return false
	}
}

// run executes a command in the container and gives its exit status and the end
// of its output.
func (s *Stage) run(ctx context.Context, args []string) (report, error) {
	ch := make(chan report, 1)
	s.sendMu.Lock()
	s.nextExec++
	id := s.nextExec
	s.mu.Lock()
	s.execs[id] = ch
	s.mu.Unlock()
	err := send(s.conn, request{Op: opExec, ID: id, Args: args})
	s.sendMu.Unlock()
	if err != nil {
		return report{}, fmt.Errorf("run %s in the container: %w", args[0], err)
	}
	select {
	case r, ok := <-ch:
		if !ok {
			return report{}, fmt.Errorf("run %s in the container: %w", args[0], os.ErrProcessDone)
		}
		return r, nil
	case <-s.exited:
		return report{}, fmt.Errorf("run %s in the container: %w", args[0], os.ErrProcessDone)
	case <-ctx.Done():
		return report{}, ctx.Err()
	}
}

// pidOf reads which process a pidfd stands for, in our own PID namespace.
func pidOf(pidfd *os.File) int {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(pidfd.Fd())))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return max(n, 0)
		}
	}
	return 0
}
