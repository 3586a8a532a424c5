package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

func TestMain(m *testing.M) {
	if os.Getenv(orphanEnv) != "" {
		fmt.Fprintln(os.Stderr, serveOrphan(os.Getenv(orphanEnv) == "survives"))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// memory is a backend of which reads at held wait for gate, if that is there.
type memory struct {
	mu    sync.RWMutex // guards bytes
	bytes []byte
	held  int64
	gate  chan struct{}
	plain bool // neither Discard nor Sync
	syncs atomic.Int32
}

// content is a copy of the bytes.
func (m *memory) content() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Clone(m.bytes)
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if off == m.held && m.gate != nil {
		<-m.gate
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return bytes.NewReader(m.bytes).ReadAt(p, off)
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.bytes[off:], p), nil
}

func (m *memory) Discard(off, n int64) error {
	if m.plain {
		return errors.ErrUnsupported
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.bytes[off : off+n])
	return nil
}

func (m *memory) Sync() error {
	if m.plain {
		return errors.ErrUnsupported
	}
	m.syncs.Add(1)
	return nil
}

// newMemory is a megabyte in which each KiB differs.
func newMemory() *memory {
	m := &memory{bytes: make([]byte, 1<<20)}
	for i := 0; i < len(m.bytes); i += 1 << 10 {
		binary.BigEndian.PutUint32(m.bytes[i:], uint32(i))
	}
	return m
}

// client is the kernel's end of a connection.
type client struct {
	*os.File
	t *testing.T
	c *conn
}

// dialConn serves m to a client until the test ends.
func dialConn(t *testing.T, m *memory, workers int) *client {
	srv := request.New(m, request.Config{Size: int64(len(m.bytes))})
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	bufs := &request.Buffers{Server: srv, Size: bufferSize}
	b := get(bufs)
	require.NotNil(t, b)
	c := newConn(pair[0], b, bufs, workers)
	k := &client{os.NewFile(uintptr(pair[1]), "client"), t, c}
	t.Cleanup(func() {
		k.Close()
		c.release()
		bufs.Free()
		srv.Stop()
	})
	return k
}

// encode is a request as it goes over the wire.
func encode(h header, data []byte) []byte {
	p := binary.BigEndian.AppendUint32(nil, requestMagic)
	p = binary.BigEndian.AppendUint16(p, h.flags)
	p = binary.BigEndian.AppendUint16(p, h.command)
	p = binary.BigEndian.AppendUint64(p, h.handle)
	p = binary.BigEndian.AppendUint64(p, uint64(h.off))
	p = binary.BigEndian.AppendUint32(p, h.n)
	return append(p, data...)
}

func (k *client) send(p ...[]byte) {
	_, err := k.Write(slices.Concat(p...))
	require.NoError(k.t, err)
}

// reply receives a reply; n is how long its data is if it has no error.
func (k *client) reply(n int) (handle uint64, errno uint32, data []byte) {
	var h [replySize]byte
	_, err := io.ReadFull(k, h[:])
	require.NoError(k.t, err)
	require.Equal(k.t, uint32(replyMagic), binary.BigEndian.Uint32(h[:]))
	errno = binary.BigEndian.Uint32(h[4:])
	if errno == 0 {
		data = make([]byte, n)
		_, err = io.ReadFull(k, data)
		require.NoError(k.t, err)
	}
	return binary.BigEndian.Uint64(h[8:]), errno, data
}

// call makes one request.
func (k *client) call(h header, data []byte) (errno uint32, got []byte) {
	k.send(encode(h, data))
	n := 0
	if h.command == cmdRead {
		n = int(h.n)
	}
	handle, errno, got := k.reply(n)
	require.Equal(k.t, h.handle, handle)
	return errno, got
}

func TestRequests(t *testing.T) {
	m := newMemory()
	k := dialConn(t, m, 4)
	want := m.content()

	errno, got := k.call(header{command: cmdRead, handle: 1, off: 4096, n: 8192}, nil)
	require.Zero(t, errno)
	require.Equal(t, want[4096:12288], got)

	large := uint32(maxIO + 4096)
	errno, got = k.call(header{command: cmdRead, handle: 2, off: 1024, n: large}, nil)
	require.Zero(t, errno)
	require.Equal(t, want[1024:1024+large], got)

	data := bytes.Repeat([]byte("reprise!"), int(large/8))
	errno, _ = k.call(header{command: cmdWrite, handle: 3, off: 512, n: large}, data)
	require.Zero(t, errno)
	copy(want[512:], data)
	require.Equal(t, want, m.content())
	require.Zero(t, m.syncs.Load())

	errno, _ = k.call(header{command: cmdWrite, flags: flagFUA, handle: 4, off: 0, n: 8}, data[:8])
	require.Zero(t, errno)
	copy(want, data[:8])
	require.Equal(t, int32(1), m.syncs.Load())

	errno, _ = k.call(header{command: cmdFlush, handle: 5}, nil)
	require.Zero(t, errno)
	require.Equal(t, int32(2), m.syncs.Load())

	errno, _ = k.call(header{command: cmdTrim, handle: 6, off: 4096, n: 4096}, nil)
	require.Zero(t, errno)
	clear(want[4096:8192])
	errno, _ = k.call(header{command: cmdWriteZeroes, handle: 7, off: 0, n: 4096}, nil)
	require.Zero(t, errno)
	clear(want[:4096])
	require.Equal(t, want, m.content())

	for _, h := range []header{
		{command: cmdRead, handle: 8, off: 1 << 20, n: 512},
		{command: cmdRead, handle: 9, off: -512, n: 512},
		{command: cmdTrim, handle: 10, off: 1 << 19, n: 1 << 20},
		{command: 77, handle: 11},
	} {
		errno, _ = k.call(h, nil)
		require.Equal(t, uint32(unix.EINVAL), errno, "command %d", h.command)
	}
}

// TestPlain has a backend that can only be read and written.
func TestPlain(t *testing.T) {
	m := newMemory()
	m.plain = true
	k := dialConn(t, m, 1)
	errno, _ := k.call(header{command: cmdFlush}, nil)
	require.Zero(t, errno)
	errno, _ = k.call(header{command: cmdTrim, n: 512}, nil)
	require.Equal(t, uint32(unix.EOPNOTSUPP), errno)
	errno, _ = k.call(header{command: cmdWriteZeroes, off: 1024, n: maxIO + 1024}, nil)
	require.Zero(t, errno)
	got := m.content()
	require.Equal(t, make([]byte, maxIO+1024), got[1024:maxIO+2048])
	require.NotZero(t, binary.BigEndian.Uint32(got[maxIO+2048:]))
}

// TestOvertake has a read wait while others, sent after it at once, are
// answered.
func TestOvertake(t *testing.T) {
	m := newMemory()
	m.gate = make(chan struct{})
	k := dialConn(t, m, 8)
	var batch []byte
	for i := range 100 {
		batch = append(batch, encode(header{command: cmdRead, handle: uint64(i), off: int64(i) << 10, n: 4}, nil)...)
	}
	k.send(batch)
	seen := map[uint64]bool{}
	for range 99 {
		handle, errno, data := k.reply(4)
		require.Zero(t, errno)
		require.Equal(t, uint32(handle<<10), binary.BigEndian.Uint32(data))
		seen[handle] = true
	}
	require.Len(t, seen, 99)
	require.NotContains(t, seen, uint64(0))
	close(m.gate)
	handle, _, _ := k.reply(4)
	require.Zero(t, handle)
}

// TestEnds ends connections in all ways.
func TestEnds(t *testing.T) {
	for name, test := range map[string]struct {
		send []byte
		want string // "" is the peer's doing
	}{
		"closed":          {nil, ""},
		"closed within":   {encode(header{command: cmdRead}, nil)[:10], ""},
		"closed in data":  {encode(header{command: cmdWrite, n: 512}, make([]byte, 100)), ""},
		"disconnected":    {encode(header{command: cmdDisconnect}, nil), "disconnected"},
		"out of step":     {make([]byte, requestSize), "magic"},
		"a read too long": {encode(header{command: cmdRead, n: maxRequest + 1}, nil), "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			k := dialConn(t, newMemory(), 2)
			k.send(test.send)
			if test.want == "" {
				require.NoError(t, k.Close())
			}
			<-k.c.over
			<-k.c.done
			if err := k.c.why(); test.want == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, test.want)
			}
		})
	}
}

// TestAllocations counts what a request costs the garbage collector.
func TestAllocations(t *testing.T) {
	k := dialConn(t, newMemory(), 2)
	p := encode(header{command: cmdRead, off: 4096, n: 4096}, nil)
	got := make([]byte, replySize+4096)
	fd := int(k.Fd()) // blocking from now on
	n := testing.AllocsPerRun(1000, func() {
		unix.Write(fd, p)
		for i := 0; i < len(got); {
			n, err := unix.Read(fd, got[i:])
			if err != nil && err != unix.EINTR || n == 0 {
				t.Error(err)
				return
			}
			i += max(n, 0)
		}
	})
	require.Less(t, n, 1.0)
}

func TestHungUp(t *testing.T) {
	ours, theirs, err := socketpair(20)
	require.NoError(t, err)
	require.Greater(t, ours, 20)
	require.False(t, hungUp(ours))
	require.NoError(t, unix.Close(theirs))
	require.True(t, hungUp(ours))
	require.NoError(t, unix.Close(ours))
}

// TestMissing has a kernel without the driver, or a process without privilege,
// say so.
func TestMissing(t *testing.T) {
	if err := Missing(); err != nil {
		require.ErrorContains(t, err, "nbd")
	}
}

// FuzzRequests sends anything: there is an answer, or an end, never a panic,
// and what is written is what was sent.
func FuzzRequests(f *testing.F) {
	f.Add(encode(header{command: cmdRead, n: 4096}, nil))
	f.Add(slices.Concat(encode(header{command: cmdWrite, off: 512, n: 512}, make([]byte, 512)), encode(header{command: cmdFlush}, nil)))
	f.Add(encode(header{command: cmdWriteZeroes, flags: flagFUA, off: -1, n: 1 << 31}, nil))
	f.Fuzz(func(t *testing.T, stream []byte) {
		in := input{read: func(p []byte) (int, error) { // recv's end is no error
			n := copy(p, stream[:min(len(stream), 1+len(stream)%7*100)])
			stream = stream[n:]
			return n, nil
		}}
		sent := stream
		for at := 0; ; {
			h, err := in.next()
			if err != nil {
				return
			}
			require.Equal(t, sent[at+4:at+requestSize], encode(h, nil)[4:])
			at += requestSize
			if h.command != cmdWrite {
				continue
			}
			p := make([]byte, min(int(h.n), len(sent)-at+1))
			if in.data(p) != nil {
				require.Less(t, len(sent)-at, len(p))
				return
			}
			require.True(t, bytes.Equal(sent[at:at+len(p)], p))
			at += len(p)
		}
	})
}
