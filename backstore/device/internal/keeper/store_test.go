package keeper

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// storeFor opens a Store as a process of systemd's would.
func storeFor(t *testing.T, f *fakeManager, values map[string]string, first int) *Store {
	t.Helper()
	e := environment{pid: os.Getpid(), ppid: os.Getppid(), first: first, values: map[string]string{}}
	if f != nil {
		e.values[envNotify] = f.conn.LocalAddr().String()
	}
	for k, v := range values {
		e.values[k] = v
	}
	s, err := openStore(e)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// together does a call of a Store, which waits for its manager.
func together(t *testing.T, call func() error) func() {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- call() }()
	return func() {
		t.Helper()
		select {
		case err := <-done:
			require.NoError(t, err)
		case <-time.After(limit):
			t.Fatal("the call does not return")
		}
	}
}

func TestStoreSpeaksSystemd(t *testing.T) {
	for _, name := range []string{"@reprise-test-" + strconv.Itoa(os.Getpid()), filepath.Join(t.TempDir(), "notify")} {
		f := newFakeManager(t, name)
		s := storeFor(t, f, nil, 3)
		require.True(t, s.Kept())
		require.False(t, s.Supervised())

		file, err := os.CreateTemp(t.TempDir(), "kept")
		require.NoError(t, err)
		defer file.Close()
		_, err = file.WriteString("content")
		require.NoError(t, err)

		wait := together(t, func() error { return s.Store("vol.1.fuse", int(file.Fd())) })
		text, fds := f.next()
		require.Equal(t, "FDSTORE=1\nFDNAME=vol.1.fuse\nFDPOLL=0", text)
		require.Len(t, fds, 1)
		require.Equal(t, "content", readAll(t, fds[0]))
		require.True(t, sameFile(fds[0], int(file.Fd())))
		closeFDs(fds)
		f.barrier()
		wait()
		require.Equal(t, []string{"vol.1.fuse"}, s.Names())

		wait = together(t, func() error { return s.Remove("vol.1.fuse") })
		text, fds = f.next()
		require.Equal(t, "FDSTOREREMOVE=1\nFDNAME=vol.1.fuse", text)
		require.Empty(t, fds)
		f.barrier()
		wait()
		require.Empty(t, s.Names())

		for want, call := range map[string]func() error{
			"READY=1": s.Ready, "STOPPING=1": s.Stopping, "WATCHDOG=1": s.Alive,
			"STATUS=two lines": func() error { return s.Status("two\nlines") },
		} {
			require.NoError(t, call())
			text, _ := f.next()
			require.Equal(t, want, text)
		}
		require.ErrorIs(t, s.Upgrade("/bin/true"), errors.ErrUnsupported)
		require.Error(t, s.Store("a:b", 0))
		require.Error(t, s.Remove("a\nb"))
		require.NoError(t, f.conn.Close())
		require.Error(t, s.Ready(), "the manager is gone")
		require.Error(t, s.Store("x", 0))
	}
}

// A service manager that dies closes what was sent to it, as for a barrier.
func TestManagerDiesInBarrier(t *testing.T) {
	f := newFakeManager(t, filepath.Join(t.TempDir(), "notify"))
	s := storeFor(t, f, nil, 3)
	done := make(chan error)
	go func() { done <- s.Store("x", 0) }()
	_, fds := f.next()
	closeFDs(fds)
	_, fds = f.next()
	require.NoError(t, f.conn.Close())
	closeFDs(fds)
	require.ErrorContains(t, <-done, "gone")
}

func TestNobodyKeeps(t *testing.T) {
	s := storeFor(t, nil, nil, 3)
	require.False(t, s.Kept())
	require.NoError(t, s.Store("a.b", 0))
	require.NoError(t, s.Remove("a.b"))
	require.NoError(t, s.Ready())
	require.NoError(t, s.Status("x"))
	require.NoError(t, s.Stopping())
	require.NoError(t, s.Alive())
	require.Empty(t, s.IDs())
	require.Empty(t, s.Names())
	require.Zero(t, s.Watchdog())
}

// handed makes descriptors with consecutive numbers, as at a process's start.
func handed(t *testing.T, files ...int) (first int) {
	t.Helper()
	first = 600
	for i, fd := range files {
		require.NoError(t, unix.Dup3(fd, first+i, 0))
	}
	return first
}

func TestInherit(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	defer l.Close()
	lf, err := l.(*net.UnixListener).File()
	require.NoError(t, err)
	defer lf.Close()
	files := make([]int, 4)
	for i := range files {
		files[i], err = unix.MemfdCreate("f"+strconv.Itoa(i), unix.MFD_CLOEXEC)
		require.NoError(t, err)
		defer unix.Close(files[i])
	}
	var raw int
	sc, err := lf.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, sc.Control(func(fd uintptr) { raw = int(fd) }))
	first := handed(t, raw, files[0], files[1], files[2], files[3])
	s := storeFor(t, nil, map[string]string{
		envListenPID: strconv.Itoa(os.Getpid()), envListenFDs: "5", envListenNames: "reprise.socket:vol.7.fuse:vol.7.mount:plain:vol.7.fuse",
	}, first)
	require.Equal(t, []string{"plain", "vol.7"}, s.IDs())
	require.Equal(t, []string{"plain", "vol.7.fuse", "vol.7.mount"}, s.Names())
	for fd := first; fd < first+5; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		require.NoError(t, err)
		require.Equal(t, unix.FD_CLOEXEC, flags)
	}
	require.Equal(t, map[string]int{"fuse": first + 1, "mount": first + 2}, s.Take("vol.7"))
	unix.Close(first + 1)
	unix.Close(first + 2)
	require.Empty(t, s.Take("vol.7"))
	require.Equal(t, []string{"plain"}, s.IDs())

	ls, err := s.Listeners()
	require.NoError(t, err)
	require.Len(t, ls, 1)
	require.Equal(t, "reprise.socket", ls[0].Name)
	go func() {
		if c, err := net.Dial("unix", l.Addr().String()); err == nil {
			c.Close()
		}
	}()
	c, err := ls[0].Accept()
	require.NoError(t, err)
	c.Close()
	ls[0].Close()
}

func TestInheritNothing(t *testing.T) {
	pid := strconv.Itoa(os.Getpid())
	ppid := strconv.Itoa(os.Getppid())
	for _, values := range []map[string]string{
		{},
		{envListenFDs: "3"},                    // for nobody in particular
		{envListenFDs: "3", envListenPID: "1"}, // for another
		{envListenFDs: "3", envListenPID: "x"}, // for another
		{envListenFDs: "0", envListenPID: pid}, // none
		{envListenFDs: "0", envListenPID: pid, envListenNames: ""}, // none
		{envListenFDs: "3", envKeeper: "1000000000:900"},           // of a grandparent
	} {
		s := storeFor(t, nil, values, 3)
		require.Empty(t, s.IDs(), values)
		require.False(t, s.Supervised())
	}
	for _, values := range []map[string]string{
		{envListenFDs: "x", envListenPID: pid},
		{envListenFDs: "-1", envListenPID: pid},
		{envListenFDs: "8193", envListenPID: pid},
		{envListenFDs: "2", envListenPID: pid, envListenNames: "a"},
		{envListenFDs: "1", envListenPID: pid}, // not open
		{envKeeper: ppid},
		{envKeeper: ppid + ":x"},
		{envKeeper: ppid + ":2"},
		{envKeeper: ppid + ":1000000"},
		{envNotify: "vsock:2:1234"},
		{envNotify: "relative"},
		{envNotify: "/" + strings.Repeat("x", 108)},
	} {
		_, err := openStore(environment{pid: os.Getpid(), ppid: os.Getppid(), first: 100_000, values: values})
		require.Error(t, err, "%v", values)
	}
}

func TestWatchdogEnvironment(t *testing.T) {
	for us, want := range map[string]time.Duration{
		"": 0, "x": 0, "0": 0, "-1": 0, "1500": 1500 * time.Microsecond, "9223372036854775807": 0,
	} {
		require.Equal(t, want, storeFor(t, nil, map[string]string{envWatchdog: us}, 3).Watchdog(), us)
	}
	require.Zero(t, storeFor(t, nil, map[string]string{envWatchdog: "5", envWatchdogPID: "1"}, 3).Watchdog())
}
