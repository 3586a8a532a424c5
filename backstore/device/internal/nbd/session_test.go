package nbd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// TestDevice makes a device of the kernel's, where that has the driver.
func TestDevice(t *testing.T) {
	if err := Missing(); err != nil {
		if os.Getenv("REPRISE_VM") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Run("Limits", testLimits)
	t.Run("Disconnected", testDisconnected)
	t.Run("ConnectionLost", testConnectionLost)
	t.Run("Adopt", testAdopt)
	t.Run("AdoptGone", testAdoptGone)
	t.Run("OwnDevice", testOwnDevice)
	t.Run("Orphan", testOrphan)
}

func attachMemory(t *testing.T, m *memory) *Session {
	t.Helper()
	srv := request.New(m, request.Config{Size: int64(len(m.bytes))})
	t.Cleanup(srv.Stop)
	cfg := Config{ID: "nbd-test", Size: int64(len(m.bytes)), BlockSize: 512, ReadAheadKB: 64, CanSync: true, CanDiscard: true,
		Workers: 8}
	s, err := Attach(t.Context(), srv, cfg, func(int) error { return nil })
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, s.Close(-1, time.Minute, nil))
		require.Eventually(t, func() bool { return !connected(s.Index()) }, time.Minute, time.Millisecond)
	})
	return s
}

// testLimits raises the size of the kernel's requests.
func testLimits(t *testing.T) {
	m := newMemory()
	s := attachMemory(t, m)
	for name, want := range map[string]string{"max_sectors_kb": "256\n", "read_ahead_kb": "64\n"} {
		b, err := os.ReadFile(attribute(s.Index(), "queue/"+name))
		require.NoError(t, err)
		require.Equal(t, want, string(b))
	}
	require.NoError(t, os.WriteFile(attribute(s.Index(), "queue/max_sectors_kb"), []byte("1024"), 0))
	f, err := os.OpenFile(s.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	require.NoError(t, err)
	defer f.Close()
	p, err := request.Map(pageSize + 1<<20)
	require.NoError(t, err)
	defer unix.Munmap(p)
	p = p[pageSize:]
	_, err = f.ReadAt(p, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(m.content(), p))
	clear(p)
	_, err = f.WriteAt(p, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(m.content(), p))
}

// testDisconnected has somebody else take the device away.
func testDisconnected(t *testing.T) {
	s := attachMemory(t, newMemory())
	require.NoError(t, disconnect(s.Index()))
	<-s.Ended()
	require.ErrorIs(t, s.Err(), errDisconnected)
}

// testConnectionLost has the connection die under a live session.
func testConnectionLost(t *testing.T) {
	m := newMemory()
	s := attachMemory(t, m)
	s.mu.Lock()
	unix.Shutdown(s.conn.fd, unix.SHUT_RDWR)
	s.mu.Unlock()
	b, err := os.ReadFile(s.Path())
	require.NoError(t, err)
	require.True(t, bytes.Equal(m.content(), b))
	require.NoError(t, s.Err())
}

// testAdopt goes on with a device while one read waits, which is executed again.
func testAdopt(t *testing.T) {
	m := newMemory()
	old := attachMemory(t, m)
	require.NoError(t, set(old.Index(), []setting{{"io_timeout", "1000"}}))
	m.gate = make(chan struct{})
	open := sync.OnceFunc(func() { close(m.gate) })
	defer open()
	read := make(chan error, 1)
	go func() {
		b, err := os.ReadFile(old.Path())
		if err == nil && !bytes.Equal(b, newMemory().bytes) {
			err = errors.New("wrong bytes")
		}
		read <- err
	}()
	// What the end of a process does to its session.
	old.mu.Lock()
	old.closing = true
	old.err.Store(&errDisconnected)
	unix.Shutdown(old.conn.fd, unix.SHUT_RDWR)
	old.mu.Unlock()
	dev, err := unix.FcntlInt(uintptr(old.dev), unix.F_DUPFD_CLOEXEC, 0)
	require.NoError(t, err)
	s, err := Adopt(t.Context(), old.srv, old.cfg, old.index, dev)
	require.NoError(t, err)
	open()
	require.NoError(t, <-read)
	<-old.Ended()
	require.NoError(t, s.Close(-1, time.Minute, nil))
}

// testAdoptGone finds nothing to adopt, or another's device.
func testAdoptGone(t *testing.T) {
	s := attachMemory(t, newMemory())
	other := s.cfg
	other.ID = "nbd-test-2"
	for _, index := range []int{s.Index(), 4711} {
		_, err := Adopt(t.Context(), s.srv, other, index, -1)
		require.ErrorIs(t, err, ErrGone)
	}
	_, err := os.ReadFile(s.Path())
	require.NoError(t, err)
}

// orphanEnv makes the test binary a process that serves a device until it is
// killed. It prints the device's number, and a line when a read is held. With
// "survives" it holds none, but uses its device, and prints a line each time.
const orphanEnv = "REPRISE_TEST_NBD_ORPHAN"

const held = 512 << 10

type announced struct{ *memory }

func (a announced) ReadAt(p []byte, off int64) (int, error) {
	if off == held {
		fmt.Println("held")
	}
	return a.memory.ReadAt(p, off)
}

func orphanConfig(survives bool) Config {
	return Config{ID: "nbd-orphan", Size: 1 << 20, BlockSize: 4096, Workers: 8, Survives: survives}
}

func serveOrphan(survives bool) error {
	m := newMemory()
	if !survives {
		m.held, m.gate = held, make(chan struct{})
	}
	srv := request.New(announced{m}, request.Config{Size: int64(len(m.bytes))})
	s, err := Attach(context.Background(), srv, orphanConfig(survives), func(int) error { return nil })
	if err != nil {
		return err
	}
	fmt.Println(s.Index())
	for survives {
		if err := apart.Run(func() error { return useDevice(s.Path()) }); err != nil {
			return err
		}
		fmt.Println("used")
	}
	<-s.Ended()
	return s.Err()
}

// testOrphan kills the process behind a device that does not survive it, under
// a read. It takes as long as the driver's time limit.
func testOrphan(t *testing.T) {
	c, lines, index := startOrphan(t, "1")
	f, err := os.OpenFile(devicePath(index), os.O_RDONLY|unix.O_DIRECT, 0)
	require.NoError(t, err)
	p, err := request.Map(pageSize + 4096)
	require.NoError(t, err)
	defer unix.Munmap(p)
	read := make(chan error, 1)
	go func() {
		_, err := f.ReadAt(p[:4096], held)
		read <- err
	}()
	require.True(t, lines.Scan())
	require.NoError(t, c.Process.Kill())
	c.Wait() // says that it was killed
	require.ErrorIs(t, <-read, unix.EIO)
	_, err = f.ReadAt(p[:4096], 0)
	require.ErrorIs(t, err, unix.EIO)
	require.NoError(t, f.Close())
	require.Eventually(t, func() bool { return !connected(index) }, time.Minute, time.Millisecond)
}

func startOrphan(t *testing.T, how string) (c *exec.Cmd, lines *bufio.Scanner, index int) {
	t.Helper()
	c = exec.Command(os.Args[0])
	c.Env = append(os.Environ(), orphanEnv+"="+how)
	c.Stderr = os.Stderr
	out, err := c.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.Start())
	lines = bufio.NewScanner(out)
	require.True(t, lines.Scan())
	index, err = strconv.Atoi(lines.Text())
	require.NoError(t, err)
	return c, lines, index
}

// useDevice reads and writes a device, and closes it with pages to be written.
func useDevice(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	p := make([]byte, 64<<10)
	for off := int64(0); off < 1<<20; off += int64(len(p)) {
		if _, err := unix.Pread(fd, p, off); err != nil {
			return err
		}
		if _, err := unix.Pwrite(fd, p, off); err != nil {
			return err
		}
	}
	return unix.IoctlSetInt(fd, unix.BLKFLSBUF, 0) // writes back, and forgets
}

// testOwnDevice kills a process that uses the device that it serves: it ends,
// at the latest when another has adopted the device.
func testOwnDevice(t *testing.T) {
	for i := range 5 {
		c, lines, index := startOrphan(t, "survives")
		dev, err := open(devicePath(index), unix.O_RDONLY)
		require.NoError(t, err)
		for range i {
			require.True(t, lines.Scan())
		}
		require.NoError(t, c.Process.Kill())
		m := newMemory()
		srv := request.New(m, request.Config{Size: 1 << 20})
		s, err := Adopt(t.Context(), srv, orphanConfig(true), index, dev)
		require.NoError(t, err)
		c.Wait() // says that it was killed
		b, err := os.ReadFile(s.Path())
		require.NoError(t, err)
		require.True(t, bytes.Equal(newMemory().bytes, b))
		require.NoError(t, s.Close(-1, time.Minute, nil))
		srv.Stop()
		require.False(t, connected(index))
	}
}
