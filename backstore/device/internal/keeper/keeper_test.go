package keeper

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// With this variable in its environment the test binary is a supervised child,
// which does what it is told on a socket.
const envChild = "REPRISE_KEEPER_TEST"

// limit bounds waits that end much sooner when all is well.
const limit = 60 * time.Second

func TestMain(m *testing.M) {
	if mode := os.Getenv(envChild); mode != "" {
		os.Exit(beChild(mode))
	}
	os.Setenv("GORACE", "atexit_sleep_ms=0") // a second, for each child, otherwise
	before := openFiles()
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if after := openFiles(); after != before && code == 0 {
		fmt.Fprintf(os.Stderr, "%d descriptors were open before the tests, %d are after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

// openFiles counts descriptors, without those of the Go runtime's poller.
func openFiles() (n int) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if link, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(link, "anon_inode:[event") {
			n++
		}
	}
	return n
}

// beChild obeys commands, one a message, until it is told to end.
func beChild(mode string) int {
	if mode == "keeper" {
		err := Supervise(context.Background(), &Options{Command: []string{"sh", "-c", "echo up; exec sleep 1000"}, DeathSignal: syscall.SIGKILL})
		fmt.Fprintln(os.Stderr, err)
		return 93
	}
	if mode == "nothing" {
		_, _ = os.Stdout.WriteString("u")
		return 0
	}
	if mode == "service" {
		if err := beService(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 96
		}
		return 0
	}
	s, err := OpenStore()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 99
	}
	if mode == "grandchild" {
		if err := s.Store("grand.child", 0); err != nil {
			return 97
		}
		return 0
	}
	if mode == "busy" {
		return beBusy(s, s.Take("control")[""])
	}
	c := &obedient{store: s, taken: make(map[string]int)}
	for _, id := range s.IDs() {
		for role, fd := range s.Take(id) {
			name := strings.TrimSuffix(id+"."+role, ".")
			c.order = append(c.order, fmt.Sprintf("%d=%s", fd, name))
			c.taken[name] = fd
		}
	}
	control := c.taken["control"]
	reply := func(text string) { _ = unix.Sendto(control, []byte(text), unix.MSG_NOSIGNAL, nil) }
	reply(fmt.Sprintf("up %d %s", os.Getpid(), mode))
	b := make([]byte, 4096)
	for {
		n, err := unix.Read(control, b)
		if n <= 0 || err != nil {
			return 98
		}
		verb, rest, _ := strings.Cut(string(b[:n]), " ")
		if verb == "exit" {
			code, _ := strconv.Atoi(rest)
			return code
		}
		text, err := c.do(verb, rest)
		if err != nil {
			text = "error: " + err.Error()
		}
		reply(text)
	}
}

type obedient struct {
	store *Store
	taken map[string]int
	order []string
}

func (c *obedient) do(verb, rest string) (string, error) {
	name, text, _ := strings.Cut(rest, " ")
	switch verb {
	case "store":
		fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
		if err != nil {
			return "", err
		}
		c.taken[name] = fd
		if _, err := unix.Write(fd, []byte(text)); err != nil {
			return "", err
		}
		return "ok", c.store.Store(name, fd)
	case "again":
		return "ok", c.store.Store(text, c.taken[name])
	case "append":
		_, err := unix.Write(c.taken[name], []byte(text))
		return "ok", err
	case "read":
		b := make([]byte, 4096)
		n, err := unix.Pread(c.taken[name], b, 0)
		return string(b[:max(n, 0)]), err
	case "handed":
		return strings.Join(c.order, " "), nil
	case "names":
		return strings.Join(c.store.Names(), " "), nil
	case "remove":
		return "ok", c.store.Remove(name)
	case "ready":
		return "ok", c.store.Ready()
	case "alive":
		return "ok", c.store.Alive()
	case "upgrade":
		return "ok", c.store.Upgrade(name)
	case "grandchild":
		return "ok", c.grandchild()
	case "stick":
		return "ok", stick(c.store, rest)
	case "cloexec":
		return inheritable(), nil
	case "environ":
		return strings.Join(os.Environ(), "\n"), nil
	}
	return "", errors.New("unknown " + verb)
}

// grandchild sends a notification from a process below this one.
func (c *obedient) grandchild() error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envChild + "=grandchild", envNotify + "=" + c.store.addr.Name}
	return cmd.Run()
}

// inheritable lists descriptors above the standard ones that are not closed on
// exec, after a first word: an empty answer would be the end of the socket.
func inheritable() string {
	list := []string{"inheritable:"}
	for fd := 3; fd < 2048; fd++ {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			list = append(list, strconv.Itoa(fd))
		}
	}
	return strings.Join(list, " ")
}

// rig is a running Supervise with obedient children.
type rig struct {
	t       testing.TB
	control *os.File // the test's end
	theirs  *os.File
	signals chan os.Signal
	cancel  context.CancelFunc
	done    chan error
	pid     int // of the child that has said it is up last
	log     *testLog
}

type testLog struct {
	mu sync.Mutex // guards what follows
	b  strings.Builder
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newRig(t testing.TB, o Options) *rig {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.SetNonblock(pair[0], true))
	r := &rig{t: t, control: os.NewFile(uintptr(pair[0]), "control"), theirs: os.NewFile(uintptr(pair[1]), "control"),
		signals: make(chan os.Signal), done: make(chan error, 1), log: new(testLog)}
	if len(o.Command) == 0 {
		o.Command = []string{"obedient"}
		o.Path = "/proc/self/exe"
	}
	if o.Env == nil {
		o.Env = append(os.Environ(), envChild+"=obey")
	}
	o.Files = append(o.Files, File{Name: "control", File: r.theirs})
	o.Signals = r.signals
	o.DeathSignal = syscall.SIGKILL
	o.Log = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.done <- Supervise(ctx, &o) }()
	t.Cleanup(r.close)
	return r
}

// close ends what a test has left running.
func (r *rig) close() {
	r.cancel()
	select {
	case <-r.done:
	case r.signals <- unix.SIGTERM:
		<-r.done
	}
	_ = r.control.Close()
	_ = r.theirs.Close()
	if r.t.Failed() {
		r.t.Log(r.log.String())
	}
}

// up waits for the next child and returns its mode.
func (r *rig) up() string {
	r.t.Helper()
	var mode string
	text := r.hear()
	_, err := fmt.Sscanf(text, "up %d %s", &r.pid, &mode)
	require.NoError(r.t, err, text)
	return mode
}

func (r *rig) hear() string {
	r.t.Helper()
	require.NoError(r.t, r.control.SetReadDeadline(time.Now().Add(limit)))
	b := make([]byte, 65536)
	n, err := r.control.Read(b)
	require.NoError(r.t, err, "%s", r.log)
	return string(b[:n])
}

func (r *rig) tell(format string, args ...any) {
	r.t.Helper()
	_, err := fmt.Fprintf(r.control, format, args...)
	require.NoError(r.t, err)
}

// ask tells the child something and returns its answer.
func (r *rig) ask(format string, args ...any) string {
	r.t.Helper()
	r.tell(format, args...)
	return r.hear()
}

func (r *rig) ok(format string, args ...any) {
	r.t.Helper()
	require.Equal(r.t, "ok", r.ask(format, args...))
}

func (r *rig) kill() {
	r.t.Helper()
	require.NoError(r.t, unix.Kill(r.pid, unix.SIGKILL))
}

// end waits for the end of Supervise.
func (r *rig) end() error {
	r.t.Helper()
	select {
	case err := <-r.done:
		r.done <- nil // for close
		return err
	case <-time.After(limit):
		r.t.Fatalf("Supervise does not end: %s", r.log)
		return nil
	}
}

// fakeManager is systemd as far as a Store can tell.
type fakeManager struct {
	t    testing.TB
	conn *net.UnixConn
	sock *socket
}

func newFakeManager(t testing.TB, name string) *fakeManager {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	raw, err := conn.SyscallConn()
	require.NoError(t, err)
	return &fakeManager{t: t, conn: conn, sock: &socket{conn: conn, raw: raw, oob: make([]byte, 4096)}}
}

// next returns the next message and its descriptors.
func (f *fakeManager) next() (text string, fds []int) {
	f.t.Helper()
	require.NoError(f.t, f.conn.SetReadDeadline(time.Now().Add(limit)))
	var r received
	var err error
	rerr := f.sock.raw.Read(func(fd uintptr) bool {
		r, err = f.sock.receive(int(fd))
		return err != unix.EAGAIN
	})
	require.NoError(f.t, rerr)
	require.NoError(f.t, err)
	return string(r.text), r.fds
}

// barrier expects one and answers it.
func (f *fakeManager) barrier() {
	f.t.Helper()
	text, fds := f.next()
	require.Equal(f.t, "BARRIER=1", text)
	require.Len(f.t, fds, 1)
	unix.Close(fds[0])
}

func readAll(t testing.TB, fd int) string {
	t.Helper()
	var b strings.Builder
	_, err := io.Copy(&b, bufio.NewReader(io.NewSectionReader(fdReader(fd), 0, 1<<20)))
	require.NoError(t, err)
	return b.String()
}

type fdReader int

func (f fdReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := unix.Pread(int(f), p, off)
	if n == 0 && err == nil {
		return 0, io.EOF
	}
	return max(n, 0), err
}

func itoa(n int) string { return strconv.Itoa(n) }

// sorted sorts words by their part after a separator.
func sorted(text, sep string, part int) string {
	words := strings.Fields(text)
	slices.SortFunc(words, func(a, b string) int {
		return strings.Compare(strings.Split(a, sep)[part], strings.Split(b, sep)[part])
	})
	return strings.Join(words, " ")
}
