package lsmt

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var crashSteps = flag.Int("crash-steps", 250, "steps of each run of the crash test")

// medium is a file as a disk has it: for each block the content at the last
// sync, and everything that it has been since, any of which a power cut may
// leave. A block that is a hole is nil.
type medium struct {
	f      *os.File
	unit   int64
	blocks [][][]byte
	sizes  []int64
	mixes  bool // a block may be torn between two versions, by the sector
}

func (m *medium) current(t *testing.T) (blocks [][]byte, size int64) {
	t.Helper()
	fi, err := m.f.Stat()
	require.NoError(t, err)
	for at := int64(0); at < fi.Size(); at += m.unit {
		from, _, err := nextData(m.f, at)
		if errors.Is(err, unix.ENXIO) || err == nil && from >= at+m.unit {
			blocks = append(blocks, nil)
			continue
		}
		p := make([]byte, m.unit)
		_, err = m.f.ReadAt(p, at)
		if !errors.Is(err, io.EOF) {
			require.NoError(t, err)
		}
		blocks = append(blocks, p)
	}
	return blocks, fi.Size()
}

// note adds what the file is now to what it may be after a power cut.
func (m *medium) note(t *testing.T) {
	now, size := m.current(t)
	m.sizes = append(m.sizes, size)
	for i, b := range now {
		if i == len(m.blocks) {
			m.blocks = append(m.blocks, [][]byte{nil})
		}
		last := m.blocks[i][len(m.blocks[i])-1]
		if (b == nil) != (last == nil) || !bytes.Equal(b, last) {
			m.blocks[i] = append(m.blocks[i], b)
		}
	}
}

// synced forgets everything but what the file is now.
func (m *medium) synced(t *testing.T) {
	now, size := m.current(t)
	m.sizes, m.blocks = []int64{size}, nil
	for _, b := range now {
		m.blocks = append(m.blocks, [][]byte{b})
	}
}

// cut gives the file after a power cut, as a new one.
func (m *medium) cut(t *testing.T, r *rand.Rand) *os.File {
	f := newFile(t)
	size := m.sizes[r.IntN(len(m.sizes))]
	for i, versions := range m.blocks {
		at := int64(i) * m.unit
		if at >= size {
			break
		}
		b := versions[r.IntN(len(versions))]
		if b == nil {
			continue
		}
		b = slices.Clone(b)
		if c := versions[r.IntN(len(versions))]; m.mixes && c != nil {
			for s := 0; s < len(b); s += SectorSize {
				if r.IntN(2) == 0 {
					copy(b[s:s+SectorSize], c[s:])
				}
			}
		}
		_, err := f.WriteAt(b[:min(m.unit, size-at)], at)
		require.NoError(t, err)
	}
	require.NoError(t, f.Truncate(size))
	return f
}

// crashRun is a sparse layer with a discard log over a lower layer, and a model
// of the device: one byte for each sector, which fills it.
type crashRun struct {
	t     *testing.T
	r     *rand.Rand
	w     *Writable
	data  *medium
	log   *medium
	lower []byte
	now   []byte
	may   [][256]bool // what each sector may be after a power cut
	cuts  int
}

// fillReader reads sectors that are filled with one byte each.
type fillReader []byte

func (f fillReader) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = f[(off+int64(i))/SectorSize]
	}
	return len(p), nil
}

func newCrashRun(t *testing.T, seed uint64) *crashRun {
	m := &crashRun{t: t, r: rand.New(rand.NewPCG(seed, 9)), lower: make([]byte, modelSectors)}
	for i := range m.lower {
		m.lower[i] = byte(200 + m.r.IntN(56))
	}
	m.now = slices.Clone(m.lower)
	data, log := newFile(t), newFile(t)
	w, err := CreateSparse(data, &WritableOptions{VirtualSize: modelSectors * SectorSize, Discards: log})
	require.NoError(t, err)
	m.use(w, data, log)
	require.NoError(t, w.Sync())
	m.settled()
	return m
}

// use goes on with a layer that was just opened on these files.
func (m *crashRun) use(w *Writable, data, log *os.File) {
	w.SetBelow(fillReader(m.lower))
	m.w = w
	m.data = &medium{f: data, unit: 4096, mixes: true}
	m.log = &medium{f: log, unit: SectorSize}
	w.fdatasync = func(f *os.File) error {
		for _, d := range []*medium{m.data, m.log} {
			if d.f == f {
				d.synced(m.t)
			}
		}
		return nil
	}
}

func (m *crashRun) settled() {
	m.may = make([][256]bool, len(m.now))
	for i, b := range m.now {
		m.may[i][b] = true
	}
}

func (m *crashRun) change(fill byte) {
	off := m.r.Int64N(modelSectors)
	n := min(1+m.r.Int64N(1+m.r.Int64N(40)), modelSectors-off)
	if m.r.IntN(4) == 0 { // whole blocks
		off, n = off/8*8, (n+7)/8*8
	}
	for s := off; s < off+n; s++ {
		m.now[s] = fill
		m.may[s][fill] = true
	}
	if fill == 0 {
		require.NoError(m.t, m.w.Discard(off*SectorSize, n*SectorSize))
	} else {
		_, err := m.w.WriteAt(bytes.Repeat([]byte{fill}, int(n*SectorSize)), off*SectorSize)
		require.NoError(m.t, err)
	}
	m.data.note(m.t)
	m.log.note(m.t)
}

// read gives the bytes that fill the sectors of the device.
func (m *crashRun) read() []byte {
	m.t.Helper()
	got := make([]byte, 0, modelSectors)
	for _, s := range m.w.Lookup(nil, 0, modelSectors*SectorSize) {
		p := make([]byte, s.Len)
		if s.Kind == Hole {
			_, _ = fillReader(m.lower).ReadAt(p, s.Off)
		} else {
			_, err := m.w.ReadAt(p, s.Off)
			require.NoError(m.t, err)
		}
		for ; len(p) > 0; p = p[SectorSize:] {
			require.Equal(m.t, bytes.Repeat(p[:1], SectorSize), p[:SectorSize], "sector %d is mixed", len(got))
			got = append(got, p[0])
		}
	}
	return got
}

// check compares the layer and what it commits to with the model.
func (m *crashRun) check(when string) {
	m.t.Helper()
	sameBytes(m.t, m.now, m.read(), when)
	b := commit(m.t, m.w, CommitOptions{})
	got := slices.Clone(m.lower)
	for s := range openLayer(m.t, b).Index().All() {
		for at := s.Off; at < s.End(); at += SectorSize {
			got[at/SectorSize] = 0
			if s.Kind == Data {
				got[at/SectorSize] = b[s.LayerOff+at-s.Off]
			}
		}
	}
	sameBytes(m.t, m.now, got, when+": committed")
}

func (m *crashRun) open(data, log *os.File) {
	w, err := OpenSparse(data, log)
	require.NoError(m.t, err)
	m.use(w, data, log)
}

// kill opens the files again; the old layer just stops.
func (m *crashRun) kill() {
	old := m.w
	data, log := m.data, m.log
	m.open(reopen(m.t, data.f), reopen(m.t, log.f))
	data.f, log.f = m.data.f, m.log.f
	m.data, m.log = data, log
	m.check("killed")
	require.NoError(m.t, old.Close())
}

// powerCut opens what the disk has.
func (m *crashRun) powerCut() {
	m.cuts++
	old := m.w
	m.open(m.data.cut(m.t, m.r), m.log.cut(m.t, m.r))
	require.NoError(m.t, old.Close())
	got := m.read()
	for s, b := range got {
		require.True(m.t, m.may[s][b], "power cut %d: sector %d is filled with %d, was %d, below is %d", m.cuts, s, b, m.now[s], m.lower[s])
	}
	m.now = got
	m.data.synced(m.t)
	m.log.synced(m.t)
	m.settled()
	m.check("power cut")
}

// TestCrashes: nothing that was acknowledged is lost when the process is
// killed, and nothing that was synced by a power cut. Writes are as small as a
// sector, over a lower layer with data.
func TestCrashes(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newCrashRun(t, seed)
			for range *crashSteps {
				switch p := m.r.IntN(100); {
				case p < 50:
					m.change(byte(1 + m.r.IntN(199)))
				case p < 80:
					m.change(0)
				case p < 88:
					require.NoError(t, m.w.Sync())
					m.settled()
				case p < 92:
					m.kill()
				case p < 96:
					m.powerCut()
				default:
					m.check("in between")
				}
			}
			m.check("at the end")
			require.NoError(t, m.w.Close())
		})
	}
}

// TestConcurrentChanges: overlapping calls are safe, and what they leave is what
// a reopening finds.
func TestConcurrentChanges(t *testing.T) {
	m := newCrashRun(t, 1)
	m.w.fdatasync = fdatasync
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for range 150 {
				off := r.Int64N(modelSectors)
				n := min(1+r.Int64N(24), modelSectors-off)
				p := bytes.Repeat([]byte{byte(1 + i)}, int(n*SectorSize))
				var err error
				switch r.IntN(5) {
				case 0:
					err = m.w.Discard(off*SectorSize, n*SectorSize)
				case 1:
					_, err = m.w.ReadAt(p, off*SectorSize)
				case 2:
					err = m.w.Sync()
				default:
					_, err = m.w.WriteAt(p, off*SectorSize)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	m.now = m.read()
	m.kill()
	require.NoError(t, m.w.Close())
}

func TestDiscardLogIsCompacted(t *testing.T) {
	m := newCrashRun(t, 2)
	m.w.fdatasync = fdatasync
	for range 3 * compactAbove {
		require.NoError(t, m.w.Discard(0, 8*SectorSize))
	}
	clear(m.now[:8])
	end := m.w.discards.end
	require.EqualValues(t, recordsAt+3*compactAbove*recordSize, end)
	m.kill()
	l := m.w.discards
	require.Equal(t, end, l.start)
	require.Equal(t, end+recordSize, l.end)
	require.EqualValues(t, 2, l.seq)
	m.kill()
	require.NoError(t, m.w.Close())
}

// A data file and a log that do not belong together are not opened.
func TestDiscardLogBelongsToItsData(t *testing.T) {
	a, b := newCrashRun(t, 3), newCrashRun(t, 4)
	require.NoError(t, b.w.Discard(0, 4096))
	for _, m := range []*crashRun{a, b} {
		require.NoError(t, m.w.Close())
	}
	_, err := OpenSparse(reopen(t, a.data.f), reopen(t, b.log.f))
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = OpenSparse(reopen(t, a.data.f), newFile(t))
	require.ErrorIs(t, err, ErrCorrupt)
	_, err = OpenSparse(reopen(t, a.data.f), nil)
	require.ErrorContains(t, err, "discard log")
	_, err = CreateSparse(newFile(t), &WritableOptions{VirtualSize: 4096, Discards: reopen(t, b.log.f)})
	require.ErrorIs(t, err, os.ErrExist)

	old := newFile(t)
	w, err := CreateSparse(old, &WritableOptions{VirtualSize: 8192})
	require.NoError(t, err)
	require.NoError(t, w.Close())
	_, err = OpenSparse(reopen(t, old), reopen(t, b.log.f))
	require.ErrorIs(t, err, ErrCorrupt)
	log := newFile(t)
	w, err = OpenSparse(reopen(t, old), log)
	require.NoError(t, err, "a layer without a log gets one")
	require.NoError(t, w.Discard(0, 4096))
	require.NoError(t, w.Close())
	w, err = OpenSparse(reopen(t, old), reopen(t, log))
	require.NoError(t, err)
	require.Equal(t, []Segment{{Len: 4096, Kind: Zero, Layer: -1}, {Off: 4096, Len: 4096, Layer: -1}}, w.Lookup(nil, 0, 8192))
	require.NoError(t, w.Close())
}

// A discard whose record cannot be made durable takes nothing away.
func TestDiscardNeedsItsRecord(t *testing.T) {
	m := newCrashRun(t, 5)
	_, err := m.w.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
	require.NoError(t, err)
	broken := errors.New("broken")
	m.w.fdatasync = func(*os.File) error { return broken }
	require.ErrorIs(t, m.w.Discard(0, 4096), broken)
	require.EqualValues(t, 1, m.read()[0])
	require.ErrorIs(t, m.w.Sync(), broken, "and no sync is promised any more")
	m.w.fdatasync = fdatasync
	require.ErrorIs(t, m.w.Sync(), broken)
	require.NoError(t, m.w.Close())
}

func FuzzDiscardLog(f *testing.F) {
	log, err := os.Create(filepath.Join(f.TempDir(), "log"))
	require.NoError(f, err)
	l, err := createDiscards(log)
	require.NoError(f, err)
	for i := range int64(5) {
		_, err := l.add(extent{i * 10, 5, 0})
		require.NoError(f, err)
	}
	p, err := os.ReadFile(log.Name())
	require.NoError(f, err)
	f.Add(p)
	f.Add(p[:len(p)-7])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 1<<20 {
			return
		}
		l, said, err := openDiscards(memFile(t, p), 1000)
		require.NoError(t, err)
		for _, x := range said {
			require.True(t, x.off >= 0 && x.n > 0 && x.end() <= 1000, "%+v", x)
		}
		require.LessOrEqual(t, l.end, max(l.start, int64(len(p))))
	})
}

// TestAppendCrashes is TestCrashes for append-only layers, whose writes are
// whole blocks of the file system. A power cut may lose any of what was not
// synced, in any order.
func TestAppendCrashes(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newAppendRun(t, seed)
			for range *crashSteps {
				switch p := m.r.IntN(100); {
				case p < 75:
					m.changeBlocks()
				case p < 83:
					require.NoError(t, m.w.Sync())
					m.settled()
				case p < 88:
					m.killAppend()
				case p < 96:
					m.powerCutAppend()
				default:
					m.check("in between")
				}
			}
			m.check("at the end")
			require.NoError(t, m.w.Close())
		})
	}
}

func newAppendRun(t *testing.T, seed uint64) *crashRun {
	m := &crashRun{t: t, r: rand.New(rand.NewPCG(seed, 10)), lower: bytes.Repeat([]byte{200}, modelSectors)}
	m.now = slices.Clone(m.lower)
	data, log := newFile(t), newFile(t)
	w, err := CreateAppend(data, log, &WritableOptions{VirtualSize: modelSectors * SectorSize})
	require.NoError(t, err)
	m.use(w, data, log)
	require.NoError(t, w.Sync())
	m.settled()
	return m
}

func (m *crashRun) changeBlocks() {
	off := m.r.Int64N(modelSectors/8) * 8
	n := min(8+m.r.Int64N(5)*8, modelSectors-off)
	fill := byte(max(0, m.r.IntN(250)-50))
	for s := off; s < off+n; s++ {
		m.now[s] = fill
		m.may[s][fill] = true
	}
	if fill == 0 {
		require.NoError(m.t, m.w.Discard(off*SectorSize, n*SectorSize))
	} else {
		_, err := m.w.WriteAt(bytes.Repeat([]byte{fill}, int(n*SectorSize)), off*SectorSize)
		require.NoError(m.t, err)
	}
	m.data.note(m.t)
	m.log.note(m.t)
}

func (m *crashRun) openAppend(data, log *os.File) {
	w, err := OpenAppend(data, log)
	require.NoError(m.t, err)
	m.use(w, data, log)
}

func (m *crashRun) killAppend() {
	old, data, log := m.w, m.data, m.log
	m.openAppend(reopen(m.t, data.f), reopen(m.t, log.f))
	data.f, log.f = m.data.f, m.log.f
	m.data, m.log = data, log
	require.Zero(m.t, m.w.Dropped())
	m.check("killed")
	require.NoError(m.t, old.Close())
}

func (m *crashRun) powerCutAppend() {
	m.cuts++
	old := m.w
	data, log := m.data.cut(m.t, m.r), m.log.cut(m.t, m.r)
	boot, end, err := readSynced(log)
	require.NoError(m.t, err)
	require.NotZero(m.t, boot)
	boot[0] ^= 1 // the machine has booted since
	require.NoError(m.t, (&Writable{log: log, boot: boot}).writeSynced(end))
	m.openAppend(data, log)
	require.NoError(m.t, old.Close())
	got := m.read()
	for s, b := range got {
		require.True(m.t, m.may[s][b], "power cut %d: sector %d is filled with %d, was %d", m.cuts, s, b, m.now[s])
	}
	m.now = got
	m.data.synced(m.t)
	m.log.synced(m.t)
	m.settled()
	m.check("power cut")
}
