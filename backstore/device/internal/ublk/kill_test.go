package ublk

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// childEnv makes the test binary a child that does what it names, until it is
// killed or its standard input ends.
const childEnv = "REPRISE_TEST_UBLK_CHILD"

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "cycle":
		err = cycle()
	case "own":
		err = useOwn()
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1)
}

// cycle makes a device, recovers it from itself, and closes it, again and
// again. It prints the number as soon as it knows it.
func cycle() error {
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	m := newMemory(1 << 20)
	srv := request.New(m, request.Config{Size: 1 << 20, CanSync: true})
	for {
		d, err := Add(srv, testConfig)
		if err != nil {
			return err
		}
		fmt.Println(d.Number())
		if err := d.Start(); err != nil {
			return err
		}
		number := d.Number()
		d.leave()
		if d, err = Recover(context.Background(), srv, number, testConfig); err != nil {
			return err
		}
		claim, err := d.Claim()
		if err != nil {
			return err
		}
		if err := d.Close(claim, time.Minute); err != nil {
			return err
		}
		fmt.Println(-1)
	}
}

// useOwn reads from its own device, whose backend does not answer.
func useOwn() error {
	m := newMemory(1 << 20)
	entered := make(chan struct{}, 64)
	m.hook = func(int64) { entered <- struct{}{}; select {} }
	srv := request.New(m, request.Config{Size: 1 << 20, ReadOnly: true})
	d, err := Add(srv, testConfig)
	if err == nil {
		err = d.Start()
	}
	if err != nil {
		return err
	}
	fd, err := unix.Open(d.Path(), os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	p := page(4096)
	go apart.Call(fd, unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), 4096, 0)
	<-entered
	unix.Close(fd)
	fmt.Println(d.Number())
	_, err = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(p)
	return err
}

// child starts one and returns what it prints.
func child(t *testing.T, what string) (c *exec.Cmd, out *bufio.Scanner) {
	t.Helper()
	need(t)
	c = exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), childEnv+"="+what)
	c.Stderr = os.Stderr
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); c.Process.Kill() })
	return c, bufio.NewScanner(stdout)
}

func number(t *testing.T, out *bufio.Scanner) int {
	t.Helper()
	if !out.Scan() {
		t.Fatalf("the child ended: %v", out.Err())
	}
	n, err := strconv.Atoi(strings.TrimSpace(out.Text()))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestKilledAnywhere kills a process at any stage of a device's life. What it
// leaves can be recovered or removed.
func TestKilledAnywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	m := newMemory(1 << 20)
	var recovered, gone int
	for range 20 {
		c, out := child(t, "cycle")
		last := number(t, out)
		time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond) // any moment is good
		c.Process.Kill()
		for out.Scan() {
			last, _ = strconv.Atoi(out.Text())
		}
		if last < 0 {
			c.Wait()
			continue
		}
		d, err := Recover(t.Context(), server(t, m, len(m.data)), last, testConfig)
		switch {
		case err == nil:
			recovered++
			closeDevice(t, d)
		case errors.Is(err, ErrGone):
			gone++
		default:
			t.Error(err)
		}
		c.Wait()
	}
	sweep() // what was made, but not yet printed
	checkGone(t)
	t.Logf("%d were recovered, %d were gone", recovered, gone)
}

// TestOwnDevice kills a process that waits for its own device, in the way that
// the package comment allows.
func TestOwnDevice(t *testing.T) {
	defer func(was time.Duration) { patience = was }(patience)
	patience = time.Second
	m := newMemory(1 << 20)
	c, out := child(t, "own")
	n := number(t, out)
	if err := recoverErr(t, m, n, testConfig); err == nil || errors.Is(err, ErrGone) {
		t.Errorf("a device whose server lives: %v", err)
	}
	patience = time.Minute
	c.Process.Kill()
	if err := recoverErr(t, m, n, testConfig); err != nil {
		t.Error(err)
	}
	c.Wait()
}
