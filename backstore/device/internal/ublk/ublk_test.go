package ublk

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// memory is a backend with a hook before each read.
type memory struct {
	mu    sync.RWMutex // guards data's bytes
	data  []byte
	hook  func(off int64)
	syncs atomic.Int64
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if m.hook != nil {
		m.hook(off)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if m.hook != nil {
		m.hook(off)
	}
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
	m.syncs.Add(1)
	return nil
}

func newMemory(size int) *memory {
	m := &memory{data: make([]byte, size)}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range m.data {
		m.data[i] = byte(r.Uint32())
	}
	return m
}

func need(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root (CAP_SYS_ADMIN)")
	}
	if err := Missing(); err != nil {
		t.Skip(err)
	}
}

func server(t testing.TB, b request.Backend, size int) *request.Server {
	s := request.New(b, request.Config{Size: int64(size), CanDiscard: true, CanSync: true})
	t.Cleanup(s.Stop)
	return s
}

var testConfig = Config{ID: "test", SectorSize: 512, InFlight: 128, ReadAheadKB: 64}

func attach(t testing.TB, b request.Backend, size int) *Device {
	t.Helper()
	need(t)
	d, err := Add(server(t, b, size), testConfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(errors.Join(err, d.Close(-1, time.Second)))
	}
	return d
}

// finish closes a device and looks for what is left.
func finish(t testing.TB, d *Device) {
	t.Helper()
	closeDevice(t, d)
	checkGone(t)
}

func closeDevice(t testing.TB, d *Device) {
	t.Helper()
	claim, err := d.Claim()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(claim, 10*time.Second); err != nil {
		t.Error(err)
	}
	<-d.Ended()
	if err := d.Err(); err != nil {
		t.Error(err)
	}
}

func checkGone(t testing.TB) {
	t.Helper()
	for _, pattern := range []string{"/sys/block/ublkb*", "/dev/ublk[bc]*"} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
}

func open(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func page(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+n]
}

func TestLayout(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"ublksrv_ctrl_cmd", unsafe.Sizeof(ctrlCmd{}), 32},
		{"ublksrv_ctrl_dev_info", unsafe.Sizeof(devInfo{}), 64},
		{"ublksrv_io_cmd", unsafe.Sizeof(ioCmd{}), 16},
		{"ublksrv_io_desc", unsafe.Sizeof(desc{}), descSize},
		{"ublk_param_basic", unsafe.Sizeof(basicParams{}), 32},
		{"ublk_param_discard", unsafe.Sizeof(discardParams{}), 20},
		{"discard in ublk_params", unsafe.Offsetof(params{}.discard), 40},
		{"UBLK_U_CMD_ADD_DEV", cmdAddDev, 0xc0207504},
		{"UBLK_U_CMD_GET_DEV_INFO", cmdGetDevInfo, 0x80207502},
		{"UBLK_U_IO_FETCH_REQ", ioFetch, 0xc0107520},
	} {
		if c.got != c.want {
			t.Errorf("%s: %#x, want %#x", c.name, c.got, c.want)
		}
	}
}

func TestCookie(t *testing.T) {
	c := cookie("some-id")
	if c>>48 != cookieMagic || int(c&pidMask) != os.Getpid() {
		t.Errorf("cookie %#x", c)
	}
	if !sameID(c, c^1) || sameID(c, cookie("other-id")) {
		t.Error("sameID")
	}
}

// TestMissing wants a typed error where there is no driver.
func TestMissing(t *testing.T) {
	err := Missing()
	if err == nil {
		return
	}
	var f *feature.Error
	if !errors.As(err, &f) {
		t.Fatalf("%v is no *feature.Error", err)
	}
	if errors.Is(err, os.ErrNotExist) && f.Since != since {
		t.Errorf("%v does not name the version", err)
	}
}

func TestReadWrite(t *testing.T) {
	const size = 4 << 20
	m := newMemory(size)
	want := bytes.Clone(m.data)
	d := attach(t, m, size)
	f := open(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
	p := page(1 << 20)
	for _, n := range []int{512, 4096, 256 << 10, 1 << 20} {
		if _, err := f.ReadAt(p[:n], 4096); err != nil || !bytes.Equal(p[:n], want[4096:4096+n]) {
			t.Fatalf("read of %d bytes: %v, or wrong bytes", n, err)
		}
		for i := range p[:n] {
			p[i] = byte(n>>10) + byte(i)
		}
		copy(want[8192:], p[:n])
		if _, err := f.WriteAt(p[:n], 8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil || m.syncs.Load() == 0 {
		t.Errorf("sync: %v, %d reached the backend", err, m.syncs.Load())
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 1<<20); err != nil {
		t.Error(err)
	}
	clear(want[1<<20 : 2<<20])
	if got, err := io.ReadAll(io.NewSectionReader(open(t, d.Path(), os.O_RDONLY), 0, size)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read of all: %v, or wrong bytes", err)
	}
	f.Close()
	if err := d.setReadAhead(); err != nil {
		t.Error(err)
	}
	finish(t, d)
}

// TestLeave ends a server under readers and has another go on.
func TestLeave(t *testing.T) {
	const size = 4 << 20
	m := newMemory(size)
	d := attach(t, m, size)
	number := d.Number()
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 4 {
		f := open(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
		readers.Go(func() {
			defer f.Close()
			r, p := rand.New(rand.NewPCG(3, uint64(i))), page(16<<10)
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				off := r.IntN(size/4096-4) * 4096
				if _, err := f.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, m.data[off:off+len(p)]) {
					t.Errorf("read %d at %d: %v, or wrong bytes", n, off, err)
					return
				}
			}
		})
	}
	for range 10 {
		time.Sleep(10 * time.Millisecond) // under load; whatever it does is right
		d.leave()
		next, err := Recover(t.Context(), server(t, m, size), number, testConfig)
		if err != nil {
			t.Fatal(err)
		}
		d = next
	}
	close(stop)
	readers.Wait()
	finish(t, d)
}

func TestRecoverNothing(t *testing.T) {
	m := newMemory(4096)
	d := attach(t, m, 4096)
	other := testConfig
	other.ID = "other"
	for name, err := range map[string]error{
		"no device":  recoverErr(t, m, d.Number()+100, testConfig),
		"another ID": recoverErr(t, m, d.Number(), other),
	} {
		if !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v, want ErrGone", name, err)
		}
	}
	finish(t, d)
}

func recoverErr(t *testing.T, m *memory, number int, cfg Config) error {
	d, err := Recover(t.Context(), server(t, m, len(m.data)), number, cfg)
	if err == nil {
		finish(t, d)
	}
	return err
}

// TestNotStarted recovers a device that never appeared.
func TestNotStarted(t *testing.T) {
	need(t)
	m := newMemory(4096)
	d, err := Add(server(t, m, 4096), testConfig)
	if err != nil {
		t.Fatal(err)
	}
	number := d.Number()
	d.leave()
	if err := recoverErr(t, m, number, testConfig); !errors.Is(err, ErrGone) {
		t.Errorf("%v, want ErrGone", err)
	}
	checkGone(t)
}

// TestCloseNotStarted closes a device that never appeared.
func TestCloseNotStarted(t *testing.T) {
	need(t)
	d, err := Add(server(t, newMemory(4096), 4096), testConfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(-1, time.Second); err != nil {
		t.Error(err)
	}
	checkGone(t)
}

// TestStuck closes a device over a backend that blocks in reads and writes.
func TestStuck(t *testing.T) {
	const size = 1 << 20
	m := newMemory(size)
	gate, entered := make(chan struct{}), make(chan struct{}, 64)
	m.hook = func(int64) { entered <- struct{}{}; <-gate }
	d := attach(t, m, size)
	var users sync.WaitGroup
	for i := range 8 {
		f := open(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
		users.Go(func() {
			op := f.ReadAt
			if i%2 == 1 {
				op = f.WriteAt
			}
			if _, err := op(page(4096), int64(i)*4096); !errors.Is(err, unix.EIO) {
				t.Errorf("request %d: %v, want EIO", i, err)
			}
			f.Close()
		})
		<-entered
	}
	claim, err := d.Claim()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(claim, time.Millisecond); !errors.Is(err, errStuck) {
		t.Errorf("Close: %v, want errStuck", err)
	}
	users.Wait()
	close(gate)
	<-d.Ended()
	checkGone(t)
}

// TestDeleted has somebody else remove the device.
func TestDeleted(t *testing.T) {
	m := newMemory(4096)
	d := attach(t, m, 4096)
	stopped := make(chan error, 1)
	go func() { stopped <- stop(d.number) }()
	<-d.Ended()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := d.Err(); !errors.Is(err, errStopped) {
		t.Errorf("Err: %v", err)
	}
	if err := d.Close(-1, time.Second); err != nil {
		t.Error(err)
	}
	checkGone(t)
}

// TestSweep removes what a process left that was killed in Add.
func TestSweep(t *testing.T) {
	need(t)
	i := devInfo{queues: 1, depth: 4, maxIO: maxIO, flags: wantedFlags,
		userFlags: cookie("dead")&^pidMask | 1<<23} // no process has this number
	if err := add(&i); err != nil {
		t.Fatal(err)
	}
	ours := devInfo{queues: 1, depth: 4, maxIO: maxIO, flags: wantedFlags, userFlags: cookie("ours")}
	if err := add(&ours); err != nil {
		t.Fatal(err)
	}
	sweep()
	if _, err := info(i.devID); !errors.Is(err, unix.ENODEV) {
		t.Errorf("the orphan: %v, want ENODEV", err)
	}
	if _, err := info(ours.devID); err != nil {
		t.Errorf("the other: %v", err)
	}
	if err := del(ours.devID); err != nil {
		t.Error(err)
	}
	checkGone(t)
}

func TestNoAllocations(t *testing.T) {
	const size = 1 << 20
	m := newMemory(size)
	d := attach(t, m, size)
	f := open(t, d.Path(), os.O_RDWR|unix.O_DIRECT)
	p := page(4096)
	if n := testing.AllocsPerRun(200, func() {
		f.ReadAt(p, 8192)
		f.WriteAt(p, 8192)
	}); n >= 1 {
		t.Errorf("%v allocations for a read and a write", n)
	}
	f.Close()
	finish(t, d)
}

func benchmark(b *testing.B, jobs, n int) {
	const size = 16 << 20
	m := newMemory(size)
	d := attach(b, m, size)
	b.SetBytes(int64(n))
	b.SetParallelism((jobs + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
	b.RunParallel(func(pb *testing.PB) {
		f, err := os.OpenFile(d.Path(), os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			b.Error(err)
			return
		}
		defer f.Close()
		p := page(n)
		for pb.Next() {
			off := rand.IntN(size/n) * n
			if _, err := f.ReadAt(p, int64(off)); err != nil {
				b.Error(err)
			}
		}
	})
	b.StopTimer()
	finish(b, d)
}

func BenchmarkRead4K1(b *testing.B)    { benchmark(b, 1, 4<<10) }
func BenchmarkRead4K32(b *testing.B)   { benchmark(b, 32, 4<<10) }
func BenchmarkRead256K1(b *testing.B)  { benchmark(b, 1, 256<<10) }
func BenchmarkRead256K32(b *testing.B) { benchmark(b, 32, 256<<10) }
