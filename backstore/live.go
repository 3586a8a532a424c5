package backstore

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A liveMap is the mapped live map of a blob; its format is in mapfile.go. What
// is in it outlives the process, since the mapping is the file's page cache,
// but not the machine. A nil liveMap is empty and keeps nothing. The methods
// are safe for concurrent use, but not with unmap.
type liveMap struct {
	path string
	mem  []byte
	set  bitset // in mem
}

// liveKey is what a live map was made for: it must be the same to be trusted.
type liveKey struct {
	size, chunk int64
	dev, ino    uint64
	born        int64 // nanoseconds, 0 where the file system does not say
	boot        [16]byte
}

// bootID names this boot of the machine.
func bootID() (id [16]byte, err error) {
	p, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, err
	}
	raw, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(p)), "-", ""))
	if err != nil || len(raw) != len(id) {
		return id, fmt.Errorf("boot id %.60q: not a UUID", p)
	}
	return [16]byte(raw), nil
}

func newLiveKey(data *os.File, size, chunk int64) (liveKey, error) {
	k := liveKey{size: size, chunk: chunk}
	var err error
	if k.boot, err = bootID(); err != nil {
		return k, err
	}
	var st unix.Statx_t
	err = unix.Statx(int(data.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil {
		return k, fmt.Errorf("statx: %w", err)
	}
	k.dev, k.ino = unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino
	if st.Mask&unix.STATX_BTIME != 0 {
		k.born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return k, nil
}

func (k *liveKey) header() []byte {
	p := make([]byte, liveHeader)
	copy(p, liveMagic)
	le := binary.LittleEndian
	le.PutUint64(p[8:], uint64(k.size))
	le.PutUint64(p[16:], k.dev)
	le.PutUint64(p[24:], k.ino)
	le.PutUint64(p[32:], uint64(k.born))
	copy(p[40:], k.boot[:])
	le.PutUint32(p[56:], uint32(k.chunk))
	le.PutUint32(p[60:], crc32.Checksum(p[:60], castagnoli))
	return p
}

func (k *liveKey) fileSize() int64 {
	chunks := (k.size + k.chunk - 1) / k.chunk
	return liveHeader + (chunks+63)/64*8
}

// errNoLive is a live map that is not there, or was made for something else.
var errNoLive = errors.New("no live map")

// openLive maps the live map at path, if it is the one of k. Whether it still
// is when this returns is for the caller's lock to see to.
func openLive(path string, k liveKey) (*liveMap, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoLive
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	head := make([]byte, liveHeader)
	if _, err := f.ReadAt(head, 0); err != nil || string(head) != string(k.header()) {
		return nil, errNoLive
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != k.fileSize() {
		return nil, errNoLive
	}
	return mapLive(f, path, k)
}

func mapLive(f *os.File, path string, k liveKey) (*liveMap, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, int(k.fileSize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	m := &liveMap{path: path, mem: mem}
	if n := (len(mem) - liveHeader) / 8; n > 0 {
		m.set = unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&mem[liveHeader])), n)
	}
	return m, nil
}

// makeLive puts a new live map with what is present at path, in the place of
// what is there. Nobody may have that mapped. The file is written out and not
// left sparse, so that no store into the mapping meets a full disk.
func makeLive(path string, k liveKey, present bitset) (*liveMap, error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := k.header()
	for i := range present {
		p = binary.NativeEndian.AppendUint64(p, present[i].Load())
	}
	var m *liveMap
	if _, err = f.Write(p); err == nil {
		m, err = mapLive(f, path, k)
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		m.unmap()
		_ = os.Remove(f.Name())
		return nil, err
	}
	return m, nil
}

func (m *liveMap) unmap() {
	if m != nil {
		_ = unix.Munmap(m.mem)
	}
}

// errLiveLost is a fault in the mapping: the disk has failed, or somebody has
// cut the file.
var errLiveLost = errors.New("live map is lost")

// guarded runs f, which touches the mapping.
func (m *liveMap) guarded(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if _, fault := r.(interface{ Addr() uintptr }); !fault {
				panic(r)
			}
			err = fmt.Errorf("%s: %w: %v", m.path, errLiveLost, r)
		}
	}()
	f()
	return nil
}

// add puts chunks [from, to) in; their bytes have been written.
func (m *liveMap) add(from, to int64) error {
	if m == nil {
		return nil
	}
	return m.guarded(func() { m.set.addAll(from, to) })
}

// remove takes chunks [from, to) out. Where that cannot be done the whole map
// is removed.
func (m *liveMap) remove(from, to int64) error {
	if m == nil {
		return nil
	}
	err := m.guarded(func() { m.set.removeAll(from, to) })
	if err == nil {
		return nil
	}
	if e := os.Remove(m.path); e != nil && !errors.Is(e, os.ErrNotExist) {
		return errors.Join(err, e)
	}
	return nil
}

// addTo adds to present what others have put in of [from, to), and returns
// how much that was.
func (m *liveMap) addTo(present bitset, from, to int64) (added int64, err error) {
	if m == nil {
		return 0, nil
	}
	err = m.guarded(func() {
		for from < to {
			mask, next := wordMask(from, to)
			i := from >> 6
			if w := m.set[i].Load() & mask; w&^present[i].Load() != 0 {
				old := present[i].Or(w)
				added += int64(bits.OnesCount64(w &^ old))
			}
			from = next
		}
	})
	return added, err
}
