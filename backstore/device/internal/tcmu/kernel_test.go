package tcmu

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

const (
	testRing   = 4 << 10 // small, so that it wraps
	testBlock  = maxTransfer + 64<<10
	testBlocks = 40
	testPage   = 4096
)

// A kernel is the other side of a ring, as target_core_user.c has it.
type kernel struct {
	t    testing.TB
	mem  []byte
	sock *os.File // the other end is the session's /dev/uioN

	mu      sync.Mutex // guards what follows
	room    *sync.Cond // ring, blocks or numbers have become free
	cleaned uint32     // up to where answers were read
	blocks  []int      // free ones
	waiting map[uint16]*pending
	lastID  uint16
	kept    int // answers that keep their data
	answers []uint16

	wg sync.WaitGroup
}

// pending is a command in the ring.
type pending struct {
	id     uint16
	block  int
	data   [][]byte
	result chan result
}

// result is what a SCSI initiator gets.
type result struct {
	sense sense
	data  []byte
	read  int // what the answer says was read; 0 is all
}

// newMemory makes an empty ring and its data area.
func newMemory() []byte {
	const size = mailboxSize + testRing + testBlocks*testBlock
	words := make([]uint64, size/8)
	mem := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), size)
	binary.NativeEndian.PutUint16(mem[mailboxVersion:], version)
	binary.NativeEndian.PutUint16(mem[mailboxFlags:], canReorder|canReadLen|canKeepBuf)
	binary.NativeEndian.PutUint32(mem[mailboxRingOff:], mailboxSize)
	binary.NativeEndian.PutUint32(mem[mailboxRing:], testRing)
	return mem
}

// mapMemory is newMemory that can be unmapped.
func mapMemory(t testing.TB) []byte {
	src := newMemory()
	mem, err := unix.Mmap(-1, 0, len(src), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	require.NoError(t, err)
	copy(mem, src[:mailboxSize])
	return mem
}

// start has a session serve a new ring over b, until the test ends.
func start(t testing.TB, b request.Backend, c request.Config, workers int) (*kernel, *session) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	require.NoError(t, err)
	k := &kernel{t: t, mem: mapMemory(t), sock: os.NewFile(uintptr(fds[0]), "kernel"), waiting: map[uint16]*pending{}}
	k.room = sync.NewCond(&k.mu)
	for i := range testBlocks {
		k.blocks = append(k.blocks, i)
	}
	srv := request.New(b, c)
	s, err := newSession(fds[1], k.mem, testUnit(srv, 512), workers)
	require.NoError(t, err)
	s.start()
	k.wg.Go(k.complete)
	t.Cleanup(func() {
		s.closing()
		k.sock.Close()
		<-s.ended
		k.wg.Wait()
		srv.Stop()
		require.NoError(t, s.failure())
	})
	return k, s
}

func testUnit(srv *request.Server, sector int) *unit {
	return newUnit(target{name: "reprise-test", hba: 7}, srv, &Config{SectorSize: sector})
}

// submit puts a command into the ring. Its data are n bytes in so many pieces,
// which begin as out has them.
func (k *kernel) submit(cdb, out []byte, n, pieces int) <-chan result {
	k.mu.Lock()
	defer k.mu.Unlock()
	length := uint32(max(entrySize, entryIov+pieces*iovSize) + 16)
	for len(k.blocks) == 0 || !k.fits(length) {
		k.room.Wait()
	}
	at := k.pad(length)
	k.lastID++
	p := &pending{id: k.lastID, result: make(chan result, 1)}
	k.waiting[p.id] = p
	entry := k.ring()[at : at+length]
	clear(entry)
	binary.NativeEndian.PutUint32(entry[entryLenOp:], length|opCmd)
	binary.NativeEndian.PutUint16(entry[entryID:], p.id)
	cdbAt := length - 16
	copy(entry[cdbAt:], cdb)
	binary.NativeEndian.PutUint64(entry[entryCDBOff:], uint64(mailboxSize+at+cdbAt))
	k.place(p, entry, out, n, pieces)
	k.moveHead(at, length)
	return p.result
}

// place gives the command its data, in pieces that lie in the wrong order.
func (k *kernel) place(p *pending, entry, out []byte, n, pieces int) {
	p.block = k.blocks[len(k.blocks)-1]
	k.blocks = k.blocks[:len(k.blocks)-1]
	if n == 0 {
		return
	}
	binary.NativeEndian.PutUint32(entry[entryIovCnt:], uint32(pieces))
	each := (n/pieces + 511) &^ 511
	for i := range pieces {
		size := min(each, n)
		if i == pieces-1 {
			size = n
		}
		at := mailboxSize + testRing + p.block*testBlock + (pieces-1-i)*(each+testPage)
		binary.NativeEndian.PutUint64(entry[entryIov+i*iovSize:], uint64(at))
		binary.NativeEndian.PutUint64(entry[entryIov+i*iovSize+8:], uint64(size))
		piece := k.mem[at : at+size]
		c := copy(piece, out)
		for j := range piece[c:] {
			piece[c+j] = 0xdb
		}
		out = out[c:]
		p.data = append(p.data, piece)
		n -= size
	}
}

func (k *kernel) ring() []byte { return k.mem[mailboxSize : mailboxSize+testRing] }

func (k *kernel) head() *uint32 { return (*uint32)(unsafe.Pointer(&k.mem[mailboxHead])) }

func (k *kernel) fits(length uint32) bool {
	head := *k.head()
	if testRing-head < length {
		length += testRing - head
	}
	used := (head + testRing - k.cleaned) % testRing
	return testRing-used-1 >= length
}

// pad goes to the beginning if the entry does not fit before the end.
func (k *kernel) pad(length uint32) (at uint32) {
	head := *k.head()
	if rest := testRing - head; rest < length {
		binary.NativeEndian.PutUint32(k.ring()[head:], rest|opPad)
		k.moveHead(head, rest)
		return 0
	}
	return head
}

func (k *kernel) moveHead(at, length uint32) {
	atomic.StoreUint32(k.head(), (at+length)%testRing)
	k.sock.Write(make([]byte, 4))
}

// complete reads answers whenever it is notified.
func (k *kernel) complete() {
	var p [4]byte
	for {
		if _, err := k.sock.Read(p[:]); err != nil {
			return
		}
		k.mu.Lock()
		for k.cleaned != atomic.LoadUint32((*uint32)(unsafe.Pointer(&k.mem[mailboxTail]))) {
			entry := k.ring()[k.cleaned:]
			lenOp := binary.NativeEndian.Uint32(entry)
			if lenOp&opMask == opCmd {
				k.answered(entry)
			}
			k.cleaned = (k.cleaned + lenOp&^opMask) % testRing
		}
		k.room.Broadcast()
		k.mu.Unlock()
	}
}

func (k *kernel) answered(entry []byte) {
	id := binary.NativeEndian.Uint16(entry[entryID:])
	p := k.waiting[id]
	if p == nil {
		k.t.Errorf("answer to command %d, which there is not", id)
		return
	}
	delete(k.waiting, id)
	k.answers = append(k.answers, id)
	var r result
	for _, d := range p.data {
		r.data = append(r.data, d...)
	}
	if entry[entryStatus] == statusCheck {
		r.sense = sense{entry[entrySense+2], entry[entrySense+12], entry[entrySense+13]}
	}
	if entry[entryUflags]&flagReadLen != 0 {
		r.read = int(binary.NativeEndian.Uint32(entry[entryReadLen:]))
	}
	if entry[entryUflags]&flagKeepBuf != 0 {
		k.kept++
	} else {
		k.blocks = append(k.blocks, p.block)
	}
	p.result <- r
}

const patienceForTests = 30 * time.Second

func await(t testing.TB, c <-chan result) (r result) {
	t.Helper()
	select {
	case r = <-c:
	case <-time.After(patienceForTests):
		t.Fatal("the command was not answered")
	}
	return r
}

// memory is a backend.
type memory struct {
	mu    sync.RWMutex
	data  []byte
	syncs atomic.Int32
	hook  func(op string, off int64) error // before each call
}

func (m *memory) before(op string, off int64) error {
	if m.hook == nil {
		return nil
	}
	return m.hook(op, off)
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if err := m.before("read", off); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.before("write", off); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) Discard(off, n int64) error {
	if err := m.before("discard", off); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *memory) Sync() error {
	m.syncs.Add(1)
	return m.before("sync", 0)
}

func (m *memory) config() request.Config {
	return request.Config{Size: int64(len(m.data)), CanDiscard: true, CanSync: true}
}

var errBoom = errors.New("boom")
