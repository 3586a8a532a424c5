package fuse

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a backend with faults.
type memory struct {
	mu    sync.Mutex // guards data and syncs
	data  []byte
	syncs int
	read  func(off int64) error // before each read; may block
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if m.read != nil {
		if err := m.read(off); err != nil {
			return 0, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := copy(p, m.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) Discard(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *memory) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncs++
	return nil
}

// kernel plays the kernel's side of /dev/fuse over a socket that keeps the
// bounds of messages.
type kernel struct {
	t      *testing.T
	fd     int
	unique uint64
	s      *Session
	stuck  bool // Close is to fail
}

func initRequest(minor uint32) []byte {
	b := make([]byte, inHeaderSize+64)
	native.PutUint32(b, uint32(len(b)))
	native.PutUint32(b[4:], uint32(opInit))
	native.PutUint64(b[8:], 1)
	native.PutUint32(b[40:], protoMajor)
	native.PutUint32(b[44:], minor)
	native.PutUint32(b[48:], 0x20000)
	native.PutUint32(b[52:], ^uint32(0))
	return b
}

func socketPair(t *testing.T) (ours, theirs int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4*maxIO)
	}
	return fds[0], fds[1]
}

// newKernel starts a session over b and takes part in its INIT.
func newKernel(t *testing.T, b *memory, cfg Config) *kernel {
	t.Helper()
	return newKernelOver(t, server(t, b), cfg)
}

// server executes the requests of a session on b.
func server(t testing.TB, b *memory) *request.Server {
	srv := request.New(b, request.Config{Size: int64(len(b.data)), CanDiscard: true, CanSync: true})
	t.Cleanup(srv.Stop)
	return srv
}

func newKernelOver(t *testing.T, srv *request.Server, cfg Config) *kernel {
	t.Helper()
	ours, theirs := socketPair(t)
	k := &kernel{t: t, fd: ours, unique: 1}
	k.send(initRequest(40))
	s, err := newSession(theirs, -1, srv, cfg)
	if err != nil {
		t.Fatal(err)
	}
	k.s = s
	if unique, errno, body := k.receive(); unique != 1 || errno != 0 || len(body) != initOutSize {
		t.Fatalf("INIT answered with unique %d, errno %d, %d bytes", unique, errno, len(body))
	}
	t.Cleanup(func() {
		unix.Close(k.fd)
		if err := s.Close(time.Minute); (err != nil) != k.stuck {
			t.Errorf("Close: %v", err)
		}
	})
	return k
}

func (k *kernel) send(b []byte) {
	k.t.Helper()
	if _, err := unix.Write(k.fd, b); err != nil {
		k.t.Fatal(err)
	}
}

// request sends a request and returns its unique number.
func (k *kernel) request(op opcode, node uint64, body []byte) uint64 {
	k.t.Helper()
	k.unique += 2
	b := make([]byte, inHeaderSize, inHeaderSize+len(body))
	native.PutUint32(b, uint32(inHeaderSize+len(body)))
	native.PutUint32(b[4:], uint32(op))
	native.PutUint64(b[8:], k.unique)
	native.PutUint64(b[16:], node)
	k.send(append(b, body...))
	return k.unique
}

func (k *kernel) receive() (unique uint64, errno unix.Errno, body []byte) {
	k.t.Helper()
	b := make([]byte, outHeaderSize+maxIO)
	n, err := unix.Read(k.fd, b)
	if err != nil || n < outHeaderSize || int(native.Uint32(b)) != n {
		k.t.Fatalf("reply of %d bytes that says %d: %v", n, native.Uint32(b), err)
	}
	return native.Uint64(b[8:]), unix.Errno(-int32(native.Uint32(b[4:]))), b[outHeaderSize:n]
}

// call is request and receive.
func (k *kernel) call(op opcode, node uint64, body []byte) (unix.Errno, []byte) {
	k.t.Helper()
	want := k.request(op, node, body)
	got, errno, reply := k.receive()
	if got != want {
		k.t.Fatalf("reply to %d, want %d", got, want)
	}
	return errno, reply
}

func rw(off, n uint64, data []byte) []byte {
	b := make([]byte, writeInSize, writeInSize+len(data))
	native.PutUint64(b, fileFH)
	native.PutUint64(b[8:], off)
	native.PutUint32(b[16:], uint32(n))
	return append(b, data...)
}

func falloc(off, n uint64, mode uint32) []byte {
	b := make([]byte, 32)
	native.PutUint64(b[8:], off)
	native.PutUint64(b[16:], n)
	native.PutUint32(b[24:], mode)
	return b
}

var testConfig = Config{Name: "disk", BlockSize: 4096, Workers: 8}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>9) ^ byte(i)
	}
	return b
}

func TestMeta(t *testing.T) {
	k := newKernel(t, &memory{data: pattern(1 << 20)}, testConfig)
	errno, body := k.call(opLookup, rootNode, []byte("disk\x00"))
	if errno != 0 || native.Uint64(body) != fileNode || native.Uint64(body[48:]) != 1<<20 {
		t.Errorf("lookup: %v, %x", errno, body)
	}
	if errno, _ := k.call(opLookup, rootNode, []byte("disc\x00")); errno != unix.ENOENT {
		t.Errorf("lookup of another name: %v", errno)
	}
	if errno, body := k.call(opGetattr, rootNode, make([]byte, 16)); errno != 0 || native.Uint32(body[76:])&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("getattr of the root: %v, %x", errno, body)
	}
	for _, op := range []opcode{opOpen, opStatfs, opRelease, opFsync, opFlush} {
		if errno, _ := k.call(op, fileNode, make([]byte, 40)); errno != 0 {
			t.Errorf("opcode %d: %v", op, errno)
		}
	}
	for _, op := range []opcode{4, 22, 39, 52, opInterrupt, 9999} {
		if errno, _ := k.call(op, fileNode, make([]byte, 40)); errno != unix.ENOSYS {
			t.Errorf("opcode %d: %v, want ENOSYS", op, errno)
		}
	}
	k.request(opForget, fileNode, make([]byte, 8)) // no reply: the next call gets its own
	k.request(opBatchForget, 0, make([]byte, 24))
	if errno, _ := k.call(opStatfs, rootNode, nil); errno != 0 {
		t.Error(errno)
	}
}

func TestReadWrite(t *testing.T) {
	m := &memory{data: pattern(4 * maxIO)}
	want := slices.Clone(m.data)
	k := newKernel(t, m, testConfig)
	check := func(off, n int) {
		t.Helper()
		errno, body := k.call(opRead, fileNode, rw(uint64(off), uint64(n), nil))
		if errno != 0 || !bytes.Equal(body, want[off:off+n]) {
			t.Errorf("read %d at %d: %v or wrong bytes (%d)", n, off, errno, len(body))
		}
	}
	check(0, maxIO)
	check(4*maxIO-512, 512)
	for _, n := range []int{512, 4096, maxIO} {
		p := bytes.Repeat([]byte{byte(n >> 9)}, n)
		errno, body := k.call(opWrite, fileNode, rw(8192, uint64(n), p))
		if errno != 0 || native.Uint32(body) != uint32(n) {
			t.Errorf("write: %v, %x", errno, body)
		}
		copy(want[8192:], p)
		check(0, maxIO)
	}
	for _, mode := range []uint32{fallocPunchHole | fallocKeepSize, fallocZeroRange | fallocKeepSize} {
		if errno, _ := k.call(opFallocate, fileNode, falloc(4096, 8192, mode)); errno != 0 {
			t.Errorf("fallocate %x: %v", mode, errno)
		}
		clear(want[4096 : 4096+8192])
		check(0, maxIO)
	}
	errno, _ := k.call(opFsync, fileNode, make([]byte, 16))
	m.mu.Lock()
	defer m.mu.Unlock()
	if errno != 0 || m.syncs != 1 {
		t.Errorf("fsync: %v, %d syncs", errno, m.syncs)
	}
}

func TestBadRequests(t *testing.T) {
	const size = 1 << 20
	k := newKernel(t, &memory{data: pattern(size)}, testConfig)
	tests := []struct {
		name string
		op   opcode
		body []byte
		want unix.Errno
	}{
		{"read without a body", opRead, nil, unix.EINVAL},
		{"read past the end", opRead, rw(size, 512, nil), unix.EINVAL},
		{"read far past the end", opRead, rw(1<<63, 512, nil), unix.EINVAL},
		{"read too long", opRead, rw(0, maxIO+512, nil), unix.EINVAL},
		{"write without a body", opWrite, nil, unix.EINVAL},
		{"write that lies", opWrite, rw(0, 1024, make([]byte, 512)), unix.EINVAL},
		{"write past the end", opWrite, rw(size, 512, make([]byte, 512)), unix.EINVAL},
		{"short fallocate", opFallocate, make([]byte, 8), unix.EINVAL},
		{"fallocate past the end", opFallocate, falloc(size, 512, fallocPunchHole), unix.EINVAL},
		{"fallocate that overflows", opFallocate, falloc(512, ^uint64(0), fallocPunchHole), unix.EINVAL},
		{"allocating fallocate", opFallocate, falloc(0, 512, 0), unix.EOPNOTSUPP},
	}
	for _, tt := range tests {
		if errno, _ := k.call(tt.op, fileNode, tt.body); errno != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, errno, tt.want)
		}
	}
	// The page cache reads whole pages: what is beyond the end is left out.
	errno, p := k.call(opRead, fileNode, rw(size-512, 1024, nil))
	if errno != 0 || !bytes.Equal(p, pattern(size)[size-512:]) {
		t.Errorf("read over the end: %v, %d bytes", errno, len(p))
	}
}

func TestBackendErrors(t *testing.T) {
	faults := map[int64]error{0: errors.New("boom"), 4096: unix.ENOSPC, 8192: io.EOF, 12288: errors.ErrUnsupported}
	k := newKernel(t, &memory{data: pattern(1 << 20), read: func(off int64) error { return faults[off] }}, testConfig)
	for off, want := range map[uint64]unix.Errno{0: unix.EIO, 4096: unix.ENOSPC, 8192: unix.EIO, 12288: unix.ENOSYS, 16384: 0} {
		if errno, _ := k.call(opRead, fileNode, rw(off, 4096, nil)); errno != want {
			t.Errorf("read at %d: %v, want %v", off, errno, want)
		}
	}
}

// TestBlockedBackend fills all workers but one with reads that wait, in turn,
// and sees others answered all the while.
func TestBlockedBackend(t *testing.T) {
	const blocked = 7 // of 8 workers
	gate := make(chan struct{})
	entered := make(chan struct{}, blocked)
	m := &memory{data: pattern(1 << 20), read: func(off int64) error {
		if off == 0 {
			entered <- struct{}{}
			<-gate
		}
		return nil
	}}
	k := newKernel(t, m, testConfig)
	waiting := map[uint64]bool{}
	for range blocked {
		waiting[k.request(opRead, fileNode, rw(0, 4096, nil))] = true
		<-entered
		for range 20 {
			if errno, _ := k.call(opRead, fileNode, rw(4096, 4096, nil)); errno != 0 {
				t.Fatal(errno)
			}
		}
	}
	close(gate)
	for range blocked {
		unique, errno, body := k.receive()
		if !waiting[unique] || errno != 0 || !bytes.Equal(body, m.data[:4096]) {
			t.Errorf("reply to %d: %v", unique, errno)
		}
		delete(waiting, unique)
	}
}

// TestWorkersBounded sends more than there are workers for.
func TestWorkersBounded(t *testing.T) {
	cfg := testConfig
	var mu sync.Mutex
	var now, most int
	m := &memory{data: pattern(1 << 20)}
	entered, gate := make(chan struct{}, 100), make(chan struct{})
	m.read = func(int64) error {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		entered <- struct{}{}
		<-gate
		mu.Lock()
		now--
		mu.Unlock()
		return nil
	}
	k := newKernel(t, m, cfg)
	for range 3 * cfg.Workers {
		k.request(opRead, fileNode, rw(0, 512, nil))
	}
	for range cfg.Workers {
		<-entered
	}
	close(gate)
	for range 3 * cfg.Workers {
		k.receive()
	}
	mu.Lock()
	defer mu.Unlock()
	if most != cfg.Workers {
		t.Errorf("%d reads at a time, want %d", most, cfg.Workers)
	}
}

// TestCloseStuck closes a session whose backend does not return.
func TestCloseStuck(t *testing.T) {
	entered, gate := make(chan struct{}), make(chan struct{})
	m := &memory{data: pattern(1 << 20), read: func(int64) error {
		close(entered)
		<-gate
		return nil
	}}
	k := newKernel(t, m, testConfig)
	s := k.s
	k.request(opRead, fileNode, rw(0, 512, nil))
	<-entered
	first := s.Close(time.Millisecond)
	if first == nil || s.Close(time.Minute) != first {
		t.Errorf("Close of a stuck session: %v", first)
	}
	select {
	case <-s.Ended():
		t.Error("ended before the backend returned")
	default:
	}
	close(gate)
	unix.Shutdown(k.fd, unix.SHUT_RDWR) // what the mount does for idle workers
	<-s.Ended()
	k.stuck = true
}

func TestOldKernel(t *testing.T) {
	ours, theirs := socketPair(t)
	defer unix.Close(ours)
	defer unix.Close(theirs)
	k := &kernel{t: t, fd: ours}
	k.send(initRequest(27))
	_, err := newSession(theirs, -1, server(t, &memory{}), testConfig)
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("INIT from 7.27: %v", err)
	}
}

// sink returns a session that drops its replies.
func sink(t testing.TB, b *memory, cfg Config) (*Session, *buffer) {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &Session{cfg: cfg, srv: server(t, b), fd: fd}
	s.bufs.Server, s.bufs.Size = s.srv, bufferSize
	buf := (*buffer)(s.bufs.Get())
	t.Cleanup(func() {
		s.bufs.Put((*request.Buffer)(buf))
		s.bufs.Free()
		unix.Close(fd)
	})
	return s, buf
}

func frame(b *buffer, op opcode, body []byte) []byte {
	req := b.request()[:inHeaderSize+len(body)]
	clear(req[:inHeaderSize])
	native.PutUint32(req[4:], uint32(op))
	native.PutUint64(req[16:], fileNode)
	copy(req[inHeaderSize:], body)
	return req
}

func TestNoAllocation(t *testing.T) {
	s, b := sink(t, &memory{data: pattern(1 << 20)}, testConfig)
	for name, r := range map[string]struct {
		op   opcode
		body []byte
	}{
		"read":    {opRead, rw(4096, 4096, nil)},
		"write":   {opWrite, rw(4096, 4096, pattern(4096))},
		"discard": {opFallocate, falloc(4096, 4096, fallocPunchHole)},
		"sync":    {opFsync, make([]byte, 16)},
	} {
		if n := testing.AllocsPerRun(100, func() { s.handle(b, frame(b, r.op, r.body)) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func FuzzHandle(f *testing.F) {
	f.Add(uint32(opRead), rw(0, 4096, nil))
	f.Add(uint32(opWrite), rw(0, 512, make([]byte, 512)))
	f.Add(uint32(opFallocate), falloc(0, 4096, fallocZeroRange))
	f.Add(uint32(opLookup), []byte("disk"))
	s, b := sink(f, &memory{data: make([]byte, 1<<20)}, testConfig)
	f.Fuzz(func(_ *testing.T, op uint32, body []byte) {
		s.handle(b, frame(b, opcode(op), body[:min(len(body), maxIO)]))
	})
}
