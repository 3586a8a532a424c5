package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// resultMark begins the last line of the tests' serial line; the number of
// packages that failed follows.
const resultMark = "=== vm: packages that failed: "

// kernelArgs: the kernel writes to the second serial line; a panic ends the
// machine; what costs an emulator time is left out.
const kernelArgs = "console=ttyS1 ignore_loglevel panic=-1 rdinit=/init mitigations=off tsc=reliable no_timer_check " +
	"random.trust_cpu=on rcupdate.rcu_expedited=1 audit=0 selinux=0 apparmor=0 cgroup_disable=memory"

// boot runs the machine; ok tells whether all tests passed.
func boot(ctx context.Context, dir string, k *kernel, initrd string, o *options) (ok bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	console := filepath.Join(dir, "console")
	qemu := qemuCommand(ctx, k, initrd, console)
	qemu.Stderr = os.Stderr
	serial, err := qemu.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := qemu.Start(); err != nil {
		return false, err
	}
	stopConsole := func() {}
	if o.verbose {
		stopConsole = follow(console)
	}
	failed, found := copyOutput(os.Stdout, serial)
	if found { // it powers itself off, unless that waits for a broken device
		time.AfterFunc(3*time.Second, cancel)
	}
	err = qemu.Wait()
	stopConsole()
	switch {
	case found && failed == 0:
		return true, nil
	case found:
		err = fmt.Errorf("tests failed in %d packages", failed)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("the machine did not end within %v", o.timeout)
	case ctx.Err() != nil:
		return false, ctx.Err()
	default:
		err = errors.Join(errors.New("the machine ended before the tests did"), err)
	}
	if !o.verbose {
		printTail(os.Stderr, console)
	}
	return false, err
}

func qemuCommand(ctx context.Context, k *kernel, initrd, console string) *exec.Cmd {
	c := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", "2", "-m", "2G",
		"-nodefaults", "-display", "none", "-no-reboot",
		"-serial", "stdio", "-serial", "file:"+console,
		"-kernel", k.image, "-initrd", initrd, "-append", kernelArgs)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// copyOutput copies lines up to the one that has the result.
func copyOutput(dst io.Writer, serial io.Reader) (failed int, found bool) {
	lines := bufio.NewReader(serial)
	for {
		line, err := lines.ReadString('\n')
		line = strings.ReplaceAll(line, "\r", "")
		if s, ok := strings.CutPrefix(line, resultMark); ok {
			if failed, err := strconv.Atoi(strings.TrimSpace(s)); err == nil {
				return failed, true
			}
		}
		io.WriteString(dst, line)
		if err != nil {
			return 0, false
		}
	}
}

// follow copies the growing file to standard error until it is stopped.
func follow(path string) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		var off int64
		for last := false; ; {
			off += copyFrom(os.Stderr, path, off)
			if last {
				return
			}
			select {
			case <-quit:
				last = true
			case <-tick.C:
			}
		}
	}()
	return func() { close(quit); <-done }
}

func copyFrom(dst io.Writer, path string, off int64) int64 {
	f, err := os.Open(path)
	if err != nil {
		return 0 // not there yet
	}
	defer f.Close()
	n, _ := io.Copy(dst, io.NewSectionReader(f, off, 1<<40))
	return n
}

// printTail prints the end of the kernel's console.
func printTail(dst io.Writer, path string) {
	const most = 8 << 10
	info, err := os.Stat(path)
	if err != nil {
		return
	}
	fmt.Fprintln(dst, "vm: the end of the kernel's console:")
	copyFrom(dst, path, max(info.Size()-most, 0))
}
