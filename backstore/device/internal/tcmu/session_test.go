package tcmu

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// rw16 is a READ(16) or WRITE(16) of sectors.
func rw16(op byte, lba uint64, n int) []byte {
	c := make([]byte, 16)
	c[0] = op
	binary.BigEndian.PutUint64(c[2:], lba)
	binary.BigEndian.PutUint32(c[10:], uint32(n))
	return c
}

// TestModel has initiators read, write and discard at a time, each in a part
// of the disk of its own, and compares with a byte slice.
func TestModel(t *testing.T) {
	const sector, initiators, each = 512, 12, 1 << 20
	disk := &memory{data: make([]byte, initiators*each)}
	k, _ := start(t, disk, disk.config(), 8)
	want := make([]byte, len(disk.data))
	done := func(c <-chan result) result {
		r := <-c
		if r.sense != (sense{}) {
			t.Errorf("sense %x", r.sense)
		}
		return r
	}
	var wg sync.WaitGroup
	for i := range initiators {
		r := rand.New(rand.NewPCG(1, uint64(i)))
		wg.Go(func() {
			for range 50 {
				off := i*each + r.IntN(each/sector)*sector
				n := min(sector*(1+r.IntN(maxTransfer/sector)), (i+1)*each-off)
				pieces := 1 + r.IntN(min(6, n/sector))
				part := want[off : off+n]
				lba := uint64(off / sector)
				switch r.IntN(5) {
				case 0, 1:
					for j := range part {
						part[j] = byte(r.Uint32())
					}
					done(k.submit(rw16(opWrite16, lba, n/sector), part, n, pieces))
				case 2:
					clear(part)
					done(k.submit(rw16(opWriteSame16, lba, n/sector), make([]byte, sector), sector, 1))
				default:
					got := done(k.submit(rw16(opRead16, lba, n/sector), nil, n, pieces))
					if !bytes.Equal(got.data, part) {
						t.Errorf("%d bytes at %d in %d pieces differ", n, off, pieces)
					}
				}
			}
		})
	}
	wg.Wait()
	disk.mu.Lock()
	defer disk.mu.Unlock()
	require.True(t, bytes.Equal(want, disk.data))
}

// TestOutOfOrder has commands wait in the backend while others are answered,
// through many rounds of the ring.
func TestOutOfOrder(t *testing.T) {
	const blocked = 5
	gate := make(chan struct{})
	disk := &memory{data: make([]byte, 1<<20)}
	for i := range disk.data {
		disk.data[i] = byte(i >> 9)
	}
	disk.hook = func(_ string, off int64) error {
		if off < blocked*512 {
			<-gate
		}
		return nil
	}
	k, _ := start(t, disk, disk.config(), blocked+2)
	var slow []<-chan result
	for i := range uint64(blocked) {
		slow = append(slow, k.submit(rw16(opRead16, i, 1), nil, 512, 1))
	}
	for i := range 200 {
		lba := 100 + i
		r := await(t, k.submit(rw16(opRead16, uint64(lba), 1), nil, 512, 1))
		require.Equal(t, bytes.Repeat([]byte{byte(lba)}, 512), r.data)
	}
	close(gate)
	for i, c := range slow {
		require.Equal(t, bytes.Repeat([]byte{byte(i)}, 512), await(t, c).data)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	require.Less(t, slices.Index(k.answers, 100), slices.Index(k.answers, 1))
}

// TestMoreThanWorkers has more commands than workers, some of which block.
func TestMoreThanWorkers(t *testing.T) {
	gate := make(chan struct{})
	disk := &memory{data: make([]byte, 1<<20), hook: func(string, int64) error { <-gate; return nil }}
	k, _ := start(t, disk, disk.config(), 2)
	var all []<-chan result
	for i := range uint64(20) {
		all = append(all, k.submit(rw16(opRead16, i, 1), nil, 512, 1))
	}
	close(gate)
	for _, c := range all {
		require.Zero(t, await(t, c).sense)
	}
}

func TestGiveUp(t *testing.T) {
	const workers = 3
	gate, entered := make(chan struct{}), make(chan struct{}, workers)
	disk := &memory{data: make([]byte, 1<<20)}
	disk.hook = func(string, int64) error {
		entered <- struct{}{}
		<-gate
		return nil
	}
	k, s := start(t, disk, disk.config(), workers)
	t.Cleanup(sync.OnceFunc(func() { close(gate) }))
	var stuck []<-chan result
	for i := range uint64(workers) {
		stuck = append(stuck, k.submit(rw16(opWrite16, i, 1), make([]byte, 512), 512, 1))
	}
	for range workers {
		<-entered
	}
	queued := k.submit(rw16(opRead16, 9, 1), nil, 512, 1)
	require.True(t, s.giveUp())
	for _, c := range append(stuck, queued) {
		require.Equal(t, senseFailed, await(t, c).sense)
	}
	for _, cdb := range [][]byte{rw16(opRead16, 0, 1), rw16(opWrite16, 0, 1), rw16(opSyncCache16, 0, 0)} {
		require.Equal(t, senseFailed, await(t, k.submit(cdb, nil, 512, 1)).sense)
	}
	require.Zero(t, await(t, k.submit(make([]byte, 6), nil, 0, 1)).sense, "a unit that is going is ready")
	k.mu.Lock()
	require.Equal(t, workers, k.kept, "the stuck commands' data")
	k.mu.Unlock()
	require.False(t, s.giveUp())
	select {
	case <-s.ended:
		t.Error("it has ended with commands in the backend")
	default:
	}
}

func TestErrors(t *testing.T) {
	var fault atomic.Pointer[error]
	disk := &memory{data: make([]byte, 1<<20), hook: func(string, int64) error { return *fault.Load() }}
	k, _ := start(t, disk, disk.config(), 4)
	run := func(cdb []byte, n int) sense { return await(t, k.submit(cdb, nil, n, 1)).sense }
	blocks := uint64(len(disk.data) / 512)
	fua := rw16(opWrite16, 3, 1)
	fua[1] = 8
	protected := rw16(opRead16, 3, 1)
	protected[1] = 0x20
	for name, tt := range map[string]struct {
		cdb   []byte
		n     int
		fault error
		want  sense
	}{
		"read":             {cdb: rw16(opRead16, 0, 1), n: 512},
		"read the last":    {cdb: rw16(opRead16, blocks-1, 1), n: 512},
		"read nothing":     {cdb: rw16(opRead16, blocks, 0)},
		"read past":        {cdb: rw16(opRead16, blocks-1, 2), n: 1024, want: senseRange},
		"read far past":    {cdb: rw16(opRead16, 1<<63, 1), n: 512, want: senseRange},
		"read wrap":        {cdb: rw16(opRead16, 1<<64-1, 2), n: 1024, want: senseRange},
		"no room":          {cdb: rw16(opRead16, 0, 2), n: 512, want: senseField},
		"no room at all":   {cdb: rw16(opRead16, 0, 2), want: senseField},
		"too much":         {cdb: rw16(opRead16, 0, maxTransfer/512+1), n: maxTransfer + 512, want: senseField},
		"protection":       {cdb: protected, n: 512, want: senseField},
		"read fails":       {cdb: rw16(opRead16, 0, 1), n: 512, fault: errBoom, want: senseFailed},
		"write fails":      {cdb: rw16(opWrite16, 0, 1), n: 512, fault: errBoom, want: senseFailed},
		"disk full":        {cdb: rw16(opWrite16, 0, 1), n: 512, fault: unix.ENOSPC, want: senseFull},
		"FUA fails":        {cdb: fua, n: 512, fault: errBoom, want: senseFailed},
		"sync fails":       {cdb: rw16(opSyncCache16, 0, 0), fault: errBoom, want: senseFailed},
		"sync needs not":   {cdb: rw16(opSyncCache16, 0, 0), fault: unix.ENOTSUP},
		"discard past":     {cdb: rw16(opWriteSame16, blocks, 1), n: 512, want: senseRange},
		"discard nothing":  {cdb: rw16(opWriteSame16, 0, 0), n: 512, want: senseField},
		"fill, not zeros":  {cdb: rw16(opWriteSame16, 0, 1), n: 512, want: senseField}, // the test's data are 0xdb
		"verify":           {cdb: rw16(opVerify16, 0, 1)},
		"verify past":      {cdb: rw16(opVerify16, blocks, 1), want: senseRange},
		"unknown":          {cdb: []byte{0xff}, want: senseOpcode},
		"mode page":        {cdb: []byte{opModeSense6, 0, 0x1c, 0, 64}, n: 64, want: senseField},
		"saved mode pages": {cdb: []byte{opModeSense6, 0, 0xff, 0, 64}, n: 64, want: senseSaving},
	} {
		t.Run(name, func(t *testing.T) {
			fault.Store(&tt.fault)
			require.Equal(t, tt.want, run(tt.cdb, tt.n))
		})
	}
}

func TestFUA(t *testing.T) {
	disk := &memory{data: make([]byte, 1<<20)}
	k, _ := start(t, disk, disk.config(), 4)
	c := rw16(opWrite16, 3, 1)
	require.Zero(t, await(t, k.submit(c, nil, 512, 1)).sense)
	require.Zero(t, disk.syncs.Load())
	c[1] = 8
	require.Zero(t, await(t, k.submit(c, nil, 512, 1)).sense)
	require.EqualValues(t, 1, disk.syncs.Load())
}

func TestUnmap(t *testing.T) {
	disk := &memory{data: bytes.Repeat([]byte{1}, 1<<20)}
	want := bytes.Clone(disk.data)
	k, _ := start(t, disk, disk.config(), 4)
	list := make([]byte, 8+2*16)
	binary.BigEndian.PutUint16(list, uint16(len(list)-2))
	binary.BigEndian.PutUint16(list[2:], 32)
	for i, e := range [][2]int{{4, 8}, {100, 1}} {
		binary.BigEndian.PutUint64(list[8+16*i:], uint64(e[0]))
		binary.BigEndian.PutUint32(list[16+16*i:], uint32(e[1]))
		clear(want[e[0]*512 : (e[0]+e[1])*512])
	}
	cdb := []byte{opUnmap, 0, 0, 0, 0, 0, 0, 0, byte(len(list)), 0}
	require.Zero(t, await(t, k.submit(cdb, list, len(list), 1)).sense)
	disk.mu.Lock()
	require.True(t, bytes.Equal(want, disk.data))
	disk.mu.Unlock()
	binary.BigEndian.PutUint64(list[8:], 1<<40)
	require.Equal(t, senseRange, await(t, k.submit(cdb, list, len(list), 1)).sense)
	require.Zero(t, await(t, k.submit(cdb, nil, 0, 1)).sense, "an empty list")
}

// TestShortAnswers wants the rest of the initiator's room cleared.
func TestShortAnswers(t *testing.T) {
	disk := &memory{data: make([]byte, 1<<20)}
	k, _ := start(t, disk, disk.config(), 4)
	r := await(t, k.submit([]byte{opInquiry, 0, 0, 0, 96}, nil, 96, 1))
	require.Zero(t, r.sense)
	require.Equal(t, 36, r.read)
	require.Equal(t, vendor+product+revision, string(r.data[8:36]))
	require.Equal(t, make([]byte, 60), r.data[36:])
	r = await(t, k.submit([]byte{opInquiry, 0, 0, 0, 5}, nil, 5, 1))
	require.Equal(t, 0, r.read)
	require.Equal(t, []byte{0, 0, 6, 2, 31}, r.data)
}

// TestBroken has the ring made nonsense of.
func TestBroken(t *testing.T) {
	disk := &memory{data: make([]byte, 1<<20)}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	require.NoError(t, err)
	defer unix.Close(fds[0])
	mem := mapMemory(t)
	k := &kernel{mem: mem}
	binary.NativeEndian.PutUint32(k.ring(), 3000|opCmd)
	binary.NativeEndian.PutUint32(mem[mailboxHead:], 3000)
	srv := testUnitServer(disk)
	s, err := newSession(fds[1], mem, testUnit(srv, 512), 4)
	require.NoError(t, err)
	s.start()
	<-s.ended
	require.ErrorIs(t, s.failure(), errRing)
	srv.Stop()
}
