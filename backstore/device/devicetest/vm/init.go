package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// runnerArg makes this program, in the machine, the process that runs the
// tests: process 1 has to reap whatever they leave.
const runnerArg = "--run-tests-in-the-machine"

// bootstrap is process 1: it makes the machine usable, has the tests run, and
// turns it off.
func bootstrap() {
	status := 1
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "vm: init:", err)
	} else if status, err = superviseTests(); err != nil {
		fmt.Fprintln(os.Stderr, "vm: init:", err)
	}
	fmt.Printf("\n%s%d\n", resultMark, status)
	drain()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // with -no-reboot this ends qemu at once
	select {}
}

// drain waits until the serial line has sent everything.
func drain() { unix.IoctlSetInt(1, unix.TCSBRK, 1) }

// prepare mounts, opens the serial line, loads modules.
func prepare() error {
	for _, m := range []struct{ kind, dir, data string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"tmpfs", "/tmp", "mode=1777,size=80%"},
		{"tmpfs", "/run", "mode=755"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"devpts", "/dev/pts", ""},
	} {
		if err := mountAt(m.kind, m.dir, m.data); err != nil {
			return err
		}
	}
	tty, err := unix.Open("/dev/ttyS0", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("open /dev/ttyS0: %w", err)
	}
	for fd := range 3 {
		if err := unix.Dup3(tty, fd, 0); err != nil {
			return err
		}
	}
	for link, to := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"} {
		os.Symlink(to, link) // devtmpfs may have them
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := mountAt("fusectl", "/sys/fs/fuse/connections", ""); err != nil {
		return err
	}
	if err := mountAt("configfs", "/sys/kernel/config", ""); err != nil {
		return err
	}
	return errors.Join(raiseLoopback(), unix.Sethostname([]byte("vm")))
}

func mountAt(kind, dir, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(kind, dir, kind, 0, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s at %s: %w", kind, dir, err)
	}
	return nil
}

func loadModules() error {
	p, err := readPlan()
	if err != nil {
		return err
	}
	for _, name := range p.Modules {
		if err := loadModule(filepath.Join(moduleDir, name)); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) { // ENODEV: not on this processor
		return nil
	}
	return err
}

// raiseLoopback does what `ip link set lo up` does.
func raiseLoopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	return nil
}

func readPlan() (*plan, error) {
	b, err := os.ReadFile(planFile)
	if err != nil {
		return nil, err
	}
	p := new(plan)
	return p, json.Unmarshal(b, p)
}

// superviseTests starts the process that runs the tests, reaps every child
// that the machine has, and returns that one's exit status.
func superviseTests() (status int, err error) {
	p, err := os.StartProcess("/init", []string{"/init", runnerArg},
		&os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Env: []string{"PATH=/bin"}})
	if err != nil {
		return 1, err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case pid == p.Pid && ws.Exited():
			return ws.ExitStatus(), nil
		case pid == p.Pid:
			return 1, fmt.Errorf("the process that runs the tests was killed: %v", ws.Signal())
		}
	}
}

// runTests runs the test binaries and returns how many failed.
func runTests() (failed int) {
	p, err := readPlan()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		return 1
	}
	var up unix.Sysinfo_t
	unix.Sysinfo(&up)
	fmt.Printf("=== vm: up after %d s\n", up.Uptime)
	for _, t := range p.Packages {
		fmt.Printf("=== vm: %s\n", t.Path)
		begin := time.Now()
		c := exec.Command(t.Binary, p.Args...)
		c.Dir = t.Dir
		c.Env = append(p.Env, "PWD="+t.Dir)
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		result := "ok"
		if err := c.Run(); err != nil {
			result = "FAIL: " + err.Error()
			failed++
		}
		fmt.Printf("=== vm: %s: %s, %.1f s\n", t.Path, result, time.Since(begin).Seconds())
	}
	return failed
}
