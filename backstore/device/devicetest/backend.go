package devicetest

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/reprise-project/reprise/backstore/device"
)

const pageSize = 64 << 10

// Memory is a sparse backend in memory. The zero Memory is all zeros and
// endless. Safe for concurrent use.
type Memory struct {
	Syncs, Discards atomic.Int64 // calls

	mu    sync.RWMutex // guards pages and their bytes
	pages map[int64]*[pageSize]byte
}

// NewMemory returns a Memory that begins with data.
func NewMemory(data []byte) *Memory {
	m := new(Memory)
	m.WriteAt(data, 0)
	return m
}

// ReadAt reads zeros where nothing was written. It never fails.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	eachPage(off, int64(len(p)), func(page, in, at, n int64) {
		if b := m.pages[page]; b != nil {
			copy(p[at:at+n], b[in:])
		} else {
			clear(p[at : at+n])
		}
	})
	return len(p), nil
}

// WriteAt never fails.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pages == nil {
		m.pages = map[int64]*[pageSize]byte{}
	}
	eachPage(off, int64(len(p)), func(page, in, at, n int64) {
		if m.pages[page] == nil {
			m.pages[page] = new([pageSize]byte)
		}
		copy(m.pages[page][in:], p[at:at+n])
	})
	return len(p), nil
}

// Discard makes the range zeros.
func (m *Memory) Discard(off, n int64) error {
	m.Discards.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	for page, b := range m.pages {
		from := max(off-page*pageSize, 0)
		to := min(off+n-page*pageSize, pageSize)
		if from < to {
			clear(b[from:to])
		}
	}
	return nil
}

// Sync counts.
func (m *Memory) Sync() error {
	m.Syncs.Add(1)
	return nil
}

// eachPage calls f for each page of [off, off+n): the page, where in the page,
// where in the caller's bytes, how many.
func eachPage(off, n int64, f func(page, in, at, n int64)) {
	for at := int64(0); at < n; {
		page, in := (off+at)/pageSize, (off+at)%pageSize
		c := min(pageSize-in, n-at)
		f(page, in, at, c)
		at += c
	}
}

// Faulty is a Memory with a hook before each call. An error of the hook is the
// call's; the hook may block.
type Faulty struct {
	*Memory
	hook atomic.Pointer[Hook]
}

// Hook is told op ("read", "write", "discard", "sync") and the range.
type Hook func(op string, off, n int64) error

// SetHook replaces the hook; nil is none.
func (f *Faulty) SetHook(h Hook) { f.hook.Store(&h) }

func (f *Faulty) before(op string, off, n int64) error {
	if h := f.hook.Load(); h != nil && *h != nil {
		return (*h)(op, off, n)
	}
	return nil
}

// ReadAt is Memory's, or the hook's error; a hook's io.EOF is a short read.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	err := f.before("read", off, int64(len(p)))
	switch {
	case err == nil:
		return f.Memory.ReadAt(p, off)
	case errors.Is(err, io.EOF):
		n, _ := f.Memory.ReadAt(p[:len(p)/2], off)
		return n, io.EOF
	}
	return 0, err
}

// WriteAt is Memory's, or the hook's error.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := f.before("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	return f.Memory.WriteAt(p, off)
}

// Discard is Memory's, or the hook's error.
func (f *Faulty) Discard(off, n int64) error {
	if err := f.before("discard", off, n); err != nil {
		return err
	}
	return f.Memory.Discard(off, n)
}

// Sync is Memory's, or the hook's error.
func (f *Faulty) Sync() error {
	if err := f.before("sync", 0, 0); err != nil {
		return err
	}
	return f.Memory.Sync()
}

// readOnly hides all methods of a backend but ReadAt.
type readOnly struct{ device.Backend }

// writeOnly hides Discard and Sync.
type writeOnly struct {
	io.ReaderAt
	io.WriterAt
}
