package probe

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/bpf"
	"github.com/reprise-project/reprise/tracefmt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needProbe skips where no probe can be started. In CI as root it can.
func needProbe(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs /dev/loop-control")
	}
	if err := Check(); err != nil {
		if _, stat := os.Stat("/sys/kernel/btf/vmlinux"); stat == nil && os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// start begins to watch until the test ends.
func start(t testing.TB, o *Options) *Probe {
	t.Helper()
	p, err := Start(o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

// loop makes a loop device of a backing file or device, for as long as the test
// runs, and returns its path and st_rdev.
func loop(t testing.TB, backing string, flags uint32) (path string, rdev uint64) {
	t.Helper()
	file, err := os.OpenFile(backing, os.O_RDWR, 0)
	require.NoError(t, err)
	defer file.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	require.NoError(t, err)
	defer ctl.Close()
	for {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		require.NoError(t, err)
		path = fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		c := unix.LoopConfig{Fd: uint32(file.Fd()), Size: 512}
		c.Info.Flags = flags | unix.LO_FLAGS_AUTOCLEAR
		if err := unix.IoctlLoopConfigure(int(dev.Fd()), &c); errors.Is(err, unix.EBUSY) {
			dev.Close() // another was faster
			continue
		} else if err != nil {
			dev.Close()
			t.Fatalf("configure %s: %v", path, err)
		}
		t.Cleanup(func() { dev.Close() })
		return path, rdevOf(t, path)
	}
}

func rdevOf(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st), path)
	return st.Rdev
}

func backing(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Truncate(path, size))
	return path
}

// A span is what was read, in bytes.
type span struct{ off, n int64 }

// dd reads blocks of a device, past the page cache, in one process, one read
// each. It returns the number of the process.
func dd(t testing.TB, path string, blocks ...span) int {
	t.Helper()
	cmd := exec.Command("dd", "if="+path, "of=/dev/null", "iflag=direct", "status=none")
	require.Len(t, blocks, 1)
	b := blocks[0]
	require.Zero(t, b.off%b.n)
	cmd.Args = append(cmd.Args, fmt.Sprint("bs=", b.n), fmt.Sprint("skip=", b.off/b.n), "count=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return cmd.Process.Pid
}

// seen are the reads of processes that have ended, so that they have completed,
// whether that was seen or not.
func seen(p *Probe) []tracefmt.Event {
	p.mu.Lock()
	p.drain()
	for _, r := range p.reads {
		r.done = true
	}
	p.mu.Unlock()
	return p.Reads()
}

// of returns the events of a process.
func of(reads []tracefmt.Event, pid int) (mine []tracefmt.Event) {
	for _, e := range reads {
		if e.Pid == pid {
			mine = append(mine, e)
		}
	}
	return mine
}

func TestReads(t *testing.T) {
	needProbe(t)
	path, rdev := loop(t, backing(t, 64<<20), 0)
	other, _ := loop(t, backing(t, 64<<20), 0)
	begin := time.Now()
	p := start(t, &Options{Devices: []uint64{rdev}, Start: begin})
	blocks := []span{{0, 4096}, {1 << 20, 4096}, {40 << 20, 64 << 10}, {512, 512}, {64<<20 - 4096, 4096}}
	var last, waits time.Duration
	for _, b := range blocks {
		before := time.Since(begin)
		pid := dd(t, path, b)
		after := time.Since(begin)
		elsewhere := dd(t, other, b)

		reads := seen(p)
		require.Empty(t, of(reads, elsewhere))
		got := of(reads, pid)
		require.Len(t, got, 1)
		e := got[0]
		require.Equal(t, b, span{e.Off, e.Len})
		require.Equal(t, "dd", e.Process)
		require.Empty(t, e.Container)
		require.Zero(t, e.Layer)
		require.GreaterOrEqual(t, e.At, before)
		require.LessOrEqual(t, e.At+e.Wait, after)
		waits += e.Wait
		require.Greater(t, e.At, last)
		last = e.At
	}
	require.Positive(t, waits)
	s := p.Stats()
	require.GreaterOrEqual(t, s.Reads, int64(len(blocks)))
	require.Zero(t, s.Lost)
}

// A device can be added when it is there.
func TestAddDevice(t *testing.T) {
	needProbe(t)
	p := start(t, nil)
	for i := range 2 {
		path, rdev := loop(t, backing(t, 1<<20), 0)
		early := dd(t, path, span{0, 4096})
		require.NoError(t, p.AddDevice(rdev))
		late := dd(t, path, span{4096, 4096})
		reads := seen(p)
		require.Empty(t, of(reads, early))
		require.Len(t, of(reads, late), 1)
		require.Equal(t, i, of(reads, late)[0].Layer)
	}
	require.ErrorIs(t, p.AddDevice(unix.Mkdev(4000, 1)), os.ErrNotExist)
	require.NoError(t, p.Close())
	require.ErrorIs(t, p.AddDevice(rdevOf(t, "/dev/loop0")), os.ErrClosed)
}

// What is written is not told, nor what comes out of the page cache.
func TestNoReads(t *testing.T) {
	needProbe(t)
	path, rdev := loop(t, backing(t, 1<<20), 0)
	dev, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	require.NoError(t, err)
	defer dev.Close()
	p := start(t, &Options{Devices: []uint64{rdev}})
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(page)) }()
	_, err = dev.WriteAt(page, 8192)
	require.NoError(t, err)
	require.NoError(t, dev.Sync())
	require.Empty(t, of(seen(p), os.Getpid()))
	_, err = dev.ReadAt(page, 8192)
	require.NoError(t, err)
	require.Len(t, of(seen(p), os.Getpid()), 1)
}

// Read-ahead belongs to the process for which it is done.
func TestReadAhead(t *testing.T) {
	needProbe(t)
	const size = 8 << 20
	path, rdev := loop(t, backing(t, size), 0)
	p := start(t, &Options{Devices: []uint64{rdev}})
	cmd := exec.Command("cat", path)
	out, err := cmd.Output()
	require.NoError(t, err)
	require.Len(t, out, size)
	reads := of(seen(p), cmd.Process.Pid)
	require.EqualValues(t, size, (&tracefmt.Trace{Events: reads}).Bytes())
	var waits time.Duration
	for _, e := range reads {
		require.Equal(t, "cat", e.Process)
		waits += e.Wait
	}
	require.Positive(t, waits)
	require.Positive(t, p.Stats().ReadAhead)
	require.Zero(t, p.Stats().Kernel)
}

// Threads of the kernel read for a loop device that lies on another.
func TestKernelReads(t *testing.T) {
	needProbe(t)
	lower, rdev := loop(t, backing(t, 1<<20), 0)
	upper, _ := loop(t, lower, unix.LO_FLAGS_DIRECT_IO)
	p := start(t, &Options{Devices: []uint64{rdev}})
	filtered := start(t, &Options{Devices: []uint64{rdev}, Filter: true})
	pid := dd(t, upper, span{64 << 10, 4096})
	reads := seen(p)
	require.Empty(t, of(reads, pid))
	found := false
	for _, e := range reads {
		if (span{e.Off, e.Len}) == (span{64 << 10, 4096}) {
			found = true
			require.Contains(t, e.Process, "kworker")
			require.Empty(t, e.Container)
		}
	}
	require.True(t, found, "%+v", reads)
	require.Positive(t, p.Stats().Kernel)
	require.Empty(t, seen(filtered))
}

// zram makes a disk that is given bios, where others are given requests.
func zram(t testing.TB, size int64) (path string, rdev uint64) {
	t.Helper()
	const control = "/sys/class/zram-control/"
	number, err := os.ReadFile(control + "hot_add")
	if err != nil {
		t.Skipf("needs zram: %v", err)
	}
	n := strings.TrimSpace(string(number))
	t.Cleanup(func() { require.NoError(t, os.WriteFile(control+"hot_remove", []byte(n), 0)) })
	require.NoError(t, os.WriteFile("/sys/block/zram"+n+"/disksize", fmt.Append(nil, size), 0))
	path = node(t, "/dev/zram"+n)
	return path, rdevOf(t, path)
}

func TestBios(t *testing.T) {
	needProbe(t)
	path, rdev := zram(t, 1<<20)
	p := start(t, &Options{Devices: []uint64{rdev}})
	pid := dd(t, path, span{8192, 4096})
	reads := of(p.Reads(), pid) // it has completed, and been seen to
	require.Len(t, reads, 1)
	require.Equal(t, span{8192, 4096}, span{reads[0].Off, reads[0].Len})
	require.Positive(t, reads[0].Wait)
}

// partitioned makes a loop device with two partitions, at 1 and 3 MiB, of 2 and
// 4 MiB. No table is needed for that, nor a kernel that can read one.
func partitioned(t testing.TB) (disk string, parts [2]string) {
	t.Helper()
	disk, _ = loop(t, backing(t, 16<<20), unix.LO_FLAGS_PARTSCAN)
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	for i, at := range [][2]int64{{1 << 20, 2 << 20}, {3 << 20, 4 << 20}} {
		addPartition(t, f, i+1, at[0], at[1])
		parts[i] = node(t, fmt.Sprintf("%sp%d", disk, i+1))
	}
	return disk, parts
}

func addPartition(t testing.TB, disk *os.File, number int, off, n int64) {
	t.Helper()
	part := unix.BlkpgPartition{Start: off, Length: n, Pno: int32(number)}
	arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg)))
	require.Zero(t, errno, "%v", errno)
}

// node is where a partition can be opened: /dev is not kept up to date everywhere.
func node(t testing.TB, path string) string {
	t.Helper()
	name := filepath.Base(path)
	b, err := os.ReadFile(filepath.Join("/sys/class/block", name, "dev"))
	require.NoError(t, err)
	var major, minor uint32
	_, err = fmt.Sscanf(string(b), "%d:%d", &major, &minor)
	require.NoError(t, err)
	path = filepath.Join(t.TempDir(), name)
	require.NoError(t, unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))))
	return path
}

func TestPartitions(t *testing.T) {
	needProbe(t)
	disk, parts := partitioned(t)
	p := start(t, &Options{Devices: []uint64{rdevOf(t, parts[1]), rdevOf(t, disk)}})
	second := start(t, &Options{Devices: []uint64{rdevOf(t, parts[1])}})
	const mb = 1 << 20
	for _, tt := range []struct {
		path   string
		read   span
		onPart span // of the second partition
		onDisk span
	}{
		{parts[1], span{0, 4096}, span{0, 4096}, span{3 * mb, 4096}},
		{parts[1], span{4*mb - 4096, 4096}, span{4*mb - 4096, 4096}, span{7*mb - 4096, 4096}},
		{parts[0], span{4096, 4096}, span{}, span{mb + 4096, 4096}},
		{disk, span{4 * mb, 4096}, span{mb, 4096}, span{4 * mb, 4096}},
		{disk, span{8 * mb, 4096}, span{}, span{8 * mb, 4096}},
	} {
		pid := dd(t, tt.path, tt.read)
		var onPart, onDisk span
		for _, e := range of(seen(p), pid) {
			if e.Layer == 0 {
				onPart = span{e.Off, e.Len}
			} else {
				onDisk = span{e.Off, e.Len}
			}
		}
		require.Equal(t, tt.onPart, onPart, "%+v", tt)
		require.Equal(t, tt.onDisk, onDisk, "%+v", tt)
		var alone span
		for _, e := range of(seen(second), pid) {
			alone = span{e.Off, e.Len}
		}
		require.Equal(t, tt.onPart, alone, "%+v", tt)
	}
}

// held is a process that does nothing until it is told to go on.
type held struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	ns  uint64
}

// hold starts a shell in a mount namespace of its own, or in this one.
func hold(t testing.TB, own bool, script string) *held {
	t.Helper()
	h := &held{cmd: exec.Command("sh", "-c", "echo here; read go; "+script)}
	h.cmd.Stderr = os.Stderr
	if own {
		h.cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	}
	var err error
	h.in, err = h.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := h.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, h.cmd.Start())
	_, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	h.ns, err = mountNamespace(h.cmd.Process.Pid)
	require.NoError(t, err)
	return h
}

func (h *held) goOn(t testing.TB) {
	t.Helper()
	_, err := io.WriteString(h.in, "\n")
	require.NoError(t, err)
	require.NoError(t, h.cmd.Wait())
}

func TestFilter(t *testing.T) {
	needProbe(t)
	path, rdev := loop(t, backing(t, 1<<20), 0)
	script := "exec dd iflag=direct of=/dev/null bs=4096 count=1 status=none if=" + path
	all := start(t, &Options{Devices: []uint64{rdev}})
	none := start(t, &Options{Devices: []uint64{rdev}, Filter: true})
	added := start(t, &Options{Devices: []uint64{rdev}, Filter: true})

	outside, inside, other := hold(t, false, script), hold(t, true, script), hold(t, true, script)
	named := start(t, &Options{Devices: []uint64{rdev}, Filter: true, Containers: []uint64{inside.ns, other.ns}})
	require.NoError(t, added.AddContainer(inside.cmd.Process.Pid))
	for _, h := range []*held{outside, inside, other} {
		h.goOn(t)
	}
	who := func(p *Probe) (pids []int) {
		for _, e := range seen(p) {
			if e.Process == "dd" {
				pids = append(pids, e.Pid)
			}
			want := ""
			if e.Pid == inside.cmd.Process.Pid || e.Pid == other.cmd.Process.Pid {
				ns := inside.ns
				if e.Pid == other.cmd.Process.Pid {
					ns = other.ns
				}
				want = fmt.Sprintf("mnt:[%d]", ns)
			}
			require.Equal(t, want, e.Container)
		}
		return pids
	}
	o, i, x := outside.cmd.Process.Pid, inside.cmd.Process.Pid, other.cmd.Process.Pid
	require.Equal(t, []int{o, i, x}, who(all))
	require.Empty(t, who(none))
	require.Equal(t, []int{i}, who(added))
	require.Equal(t, []int{i, x}, who(named))

	require.ErrorIs(t, added.AddContainer(o), os.ErrNotExist) // it has gone
}

func TestListens(t *testing.T) {
	needProbe(t)
	begin := time.Now()
	p := start(t, &Options{Listen: true, Start: begin})
	none := start(t, &Options{Listen: true, Filter: true})
	host, err := mountNamespace(os.Getpid())
	require.NoError(t, err)
	here := start(t, &Options{Listen: true, Filter: true, Containers: []uint64{host}})
	var netns unix.Stat_t
	require.NoError(t, unix.Stat("/proc/self/ns/net", &netns))

	for _, addr := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		before := time.Since(begin)
		fd := bound(t, addr)
		port := boundPort(t, fd)
		require.NoError(t, unix.Listen(fd, 1))
		after := time.Since(begin)
		for _, q := range []*Probe{p, here} {
			l := listened(t, q)
			require.EqualValues(t, port, l.Addr.Port())
			require.Equal(t, addr, strings.Replace(net.JoinHostPort(plain(l.Addr.Addr().String()), "0"), "[]", "", 1))
			require.Equal(t, os.Getpid(), l.Pid)
			require.Equal(t, comm(t), l.Process)
			require.Empty(t, l.Container)
			require.Equal(t, host, l.MountNS)
			require.Equal(t, netns.Ino, l.NetNS)
			if q == p {
				require.GreaterOrEqual(t, l.At, before)
				require.LessOrEqual(t, l.At, after)
			}
		}
		require.NoError(t, unix.Close(fd))
	}
	require.GreaterOrEqual(t, here.Stats().Listens, int64(3))
	require.Zero(t, none.Stats().Listens)
	require.NoError(t, none.Close())
	_, ok := <-none.Listens()
	require.False(t, ok)
}

// plain is what one writes for any address.
func plain(addr string) string {
	if addr == "::" {
		return ""
	}
	return addr
}

func comm(t testing.TB) string {
	b, err := os.ReadFile("/proc/self/comm")
	require.NoError(t, err)
	return strings.TrimSpace(string(b))
}

// bound is a TCP socket that has a port but does not listen.
func bound(t testing.TB, addr string) int {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp", addr)
	require.NoError(t, err)
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{})
	if a.IP != nil {
		sa = &unix.SockaddrInet6{Addr: [16]byte(a.IP.To16())}
	}
	if ip := a.IP.To4(); ip != nil {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte(ip)}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		t.Skip("needs IPv6")
	}
	require.NoError(t, err)
	require.NoError(t, unix.Bind(fd, sa))
	return fd
}

func boundPort(t testing.TB, fd int) int {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	require.NoError(t, err)
	if sa, ok := sa.(*unix.SockaddrInet4); ok {
		return sa.Port
	}
	return sa.(*unix.SockaddrInet6).Port
}

// listened waits for this process's next listen.
func listened(t testing.TB, p *Probe) Listen {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		select {
		case l := <-p.Listens():
			if l.Pid == os.Getpid() {
				return l
			}
		case <-ctx.Done():
			t.Fatal("no listen was seen")
		}
	}
}

func TestLost(t *testing.T) {
	needProbe(t)
	path, rdev := loop(t, backing(t, 1<<20), 0)
	p := start(t, &Options{Devices: []uint64{rdev}, Buffer: 1})
	const reads = 200
	p.mu.Lock() // nobody empties the ring
	cmd := exec.Command("dd", "if="+path, "of=/dev/null", "iflag=direct", "bs=4096", fmt.Sprint("count=", reads), "status=none")
	err := cmd.Run()
	p.mu.Unlock()
	require.NoError(t, err)
	got := of(seen(p), cmd.Process.Pid)
	s := p.Stats()
	require.NotEmpty(t, got)
	require.Less(t, len(got), reads)
	require.GreaterOrEqual(t, s.Lost, int64(reads-len(got)))
	require.GreaterOrEqual(t, s.Reads+s.Lost, int64(reads))
	for i, e := range got { // what is there is right
		require.Equal(t, span{int64(i) * 4096, 4096}, span{e.Off, e.Len})
	}
	require.NoError(t, p.Close())
	require.Equal(t, s, p.Stats())
}

// A read that is not seen to complete is told of after a while, when its bio is
// that of another, or when the probe is closed.
func TestNeverDone(t *testing.T) {
	needProbe(t)
	_, rdev := loop(t, backing(t, 1<<20), 0)
	p := start(t, &Options{Devices: []uint64{rdev}})
	now := uint64(monotonic())
	queue := func(bio, at uint64) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.takeRead(&bpf.ProbeRead{Kind: bpf.ProbeKindREAD, Disk: p.devices[0].disk, Sector: bio, Bytes: 512, Pid: 1, At: at, Bio: bio})
	}
	told := func() (bios []uint64) {
		for _, e := range of(p.Reads(), 1) {
			require.Zero(t, e.Wait)
			bios = append(bios, uint64(e.Off/512))
		}
		return bios
	}
	const later = uint64(time.Hour)
	queue(1, now-uint64(completes))
	queue(2, now+later)
	require.Equal(t, []uint64{1}, told())
	queue(2, now+later+1)
	require.Equal(t, []uint64{2}, told())
	queue(3, now+later)
	require.Empty(t, told())
	for i := range uint64(maxFlying) {
		queue(100+i, now+later)
	}
	require.Subset(t, told(), []uint64{2, 3})
	p.mu.Lock()
	require.LessOrEqual(t, len(p.flying), maxFlying)
	p.takeDone(&bpf.ProbeDone{Kind: bpf.ProbeKindDONE, Bio: 5}) // of nobody
	p.mu.Unlock()
	require.NoError(t, p.Close())
	require.NotEmpty(t, told())
	require.Empty(t, told())
	require.NoError(t, p.Close())
	require.ErrorIs(t, p.AddContainer(os.Getpid()), os.ErrClosed)
}

// Nothing is left open, also where a probe cannot be started.
func TestDescriptors(t *testing.T) {
	needProbe(t)
	once := func() int {
		p, err := Start(&Options{Devices: []uint64{rdevOf(t, "/dev/loop0")}, Listen: true})
		require.NoError(t, err)
		require.NoError(t, p.Close())
		_, err = Start(&Options{Containers: []uint64{1 << 40}})
		require.ErrorContains(t, err, "not an inode")
		require.NoError(t, Check())
		open, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(open)
	}
	first := once()
	require.LessOrEqual(t, once(), first)
}

func TestNoDevice(t *testing.T) {
	_, err := Start(&Options{Devices: []uint64{unix.Mkdev(4000, 1)}})
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NotErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "device 4000:1")
}

// Without capabilities the error says so. They are given up by one thread, which
// ends with the goroutine.
func TestUnprivileged(t *testing.T) {
	ch := make(chan error, 2)
	go func() {
		runtime.LockOSThread() // and not unlocked
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			ch <- err
			ch <- err
			return
		}
		_, err := Start(&Options{Listen: true})
		ch <- err
		ch <- Check()
	}()
	for range 2 {
		var missing *UnsupportedError
		require.ErrorAs(t, <-ch, &missing)
		if m := thisMachine(); m.btf && !m.tooOld() {
			require.EqualError(t, missing, "eBPF: no privilege: it needs root, or CAP_BPF and CAP_PERFMON")
		}
	}
}
