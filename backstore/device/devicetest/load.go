package devicetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Load is readers and a writer on a file system, which check every byte that
// they get: readers the files that [WriteTree] has made, with direct I/O, so
// that each read reaches the device; the writer its own, which it writes, syncs
// and reads back.
type Load struct {
	dir  string
	stop atomic.Bool
	wg   sync.WaitGroup

	mu     sync.Mutex // guards result and errs
	result LoadResult
	errs   []error
}

// LoadOptions say what a Load does. A zero field means its default.
type LoadOptions struct {
	Readers int  // default 6
	Writer  bool // whether there is one; it needs a writable file system
}

// LoadResult is what a Load has seen.
type LoadResult struct {
	Reads, Writes, Syncs       int64
	LongestRead, LongestSync   time.Duration // of one call
	LongestWrite, LongestCheck time.Duration // of one call; a check reads back what was written
}

// Longest is the longest of all calls.
func (r LoadResult) Longest() time.Duration {
	return max(r.LongestRead, r.LongestSync, r.LongestWrite, r.LongestCheck)
}

func (r LoadResult) String() string {
	return fmt.Sprintf("%d reads (longest %v), %d writes (%v, read back %v), %d syncs (%v)",
		r.Reads, r.LongestRead.Round(time.Millisecond), r.Writes, r.LongestWrite.Round(time.Millisecond),
		r.LongestCheck.Round(time.Millisecond), r.Syncs, r.LongestSync.Round(time.Millisecond))
}

const (
	loadBlock   = 4096
	treePrefix  = "read-"
	writePrefix = "written-"
	writeFileN  = 4
	writeBlocks = 512 // in each of the writer's files
	maxLoadRead = 64  // blocks
)

// fillBlock makes the content of a block: the same for the same file, block and
// version, and different from all others.
func fillBlock(p []byte, file, block, version int) {
	x := uint64(file)<<52 ^ uint64(block)<<24 ^ uint64(version)
	for i := 0; i < len(p); i += 8 {
		x += 0x9e3779b97f4a7c15 // splitmix64
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(p[i:], z^z>>31)
	}
}

// WriteTree makes the files that readers read: n of blocks blocks of 4 KiB each.
func WriteTree(dir string, n, blocks int) error {
	p := make([]byte, blocks*loadBlock)
	for i := range n {
		for b := range blocks {
			fillBlock(p[b*loadBlock:][:loadBlock], i, b, 0)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(treePrefix, i)), p, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// StartLoad begins to read the files that WriteTree has made in dir, and to
// write there if that was asked for.
func StartLoad(dir string, o LoadOptions) (*Load, error) {
	l := &Load{dir: dir}
	names, err := filepath.Glob(filepath.Join(dir, treePrefix+"*"))
	if err != nil || len(names) == 0 {
		return nil, errors.Join(err, fmt.Errorf("%s holds no files to read", dir))
	}
	readers := o.Readers
	if readers == 0 {
		readers = 6
	}
	for i := range readers {
		l.start(func() error { return l.read(names, rand.New(rand.NewPCG(uint64(i), 1))) })
	}
	if o.Writer {
		l.start(l.write)
	}
	return l, nil
}

func (l *Load) start(f func() error) {
	l.wg.Go(func() {
		if err := f(); err != nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.errs = append(l.errs, err)
			l.stop.Store(true)
		}
	})
}

// Failed tells whether something was wrong already.
func (l *Load) Failed() bool { return l.stop.Load() }

// Stop ends the load and returns what it has seen, and what was wrong.
func (l *Load) Stop() (LoadResult, error) {
	l.stop.Store(true)
	l.wg.Wait()
	return l.result, errors.Join(l.errs...)
}

// note adds to the result.
func (l *Load) note(f func(*LoadResult)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.result)
}

func (l *Load) read(names []string, r *rand.Rand) error {
	buf, err := directBuffer(maxLoadRead * loadBlock)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	want := make([]byte, loadBlock)
	for !l.stop.Load() {
		name := names[r.IntN(len(names))]
		if err := l.readSome(name, r, buf, want); err != nil {
			return err
		}
	}
	return nil
}

// readSome reads a few ranges of one file.
func (l *Load) readSome(name string, r *rand.Rand, buf, want []byte) error {
	var file int
	if _, err := fmt.Sscan(strings.TrimPrefix(filepath.Base(name), treePrefix), &file); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	blocks := int(st.Size() / loadBlock)
	for range 32 {
		n := 1 + r.IntN(maxLoadRead)>>r.IntN(7)
		at := r.IntN(max(blocks-n, 1))
		n = min(n, blocks-at)
		begin := time.Now()
		_, err := f.ReadAt(buf[:n*loadBlock], int64(at)*loadBlock)
		took := time.Since(begin)
		l.note(func(r *LoadResult) { r.Reads++; r.LongestRead = max(r.LongestRead, took) })
		if err != nil {
			return fmt.Errorf("read %s at block %d after %v: %w", name, at, took, err)
		}
		for i := range n {
			if fillBlock(want, file, at+i, 0); !bytes.Equal(want, buf[i*loadBlock:][:loadBlock]) {
				return fmt.Errorf("%s: block %d has wrong bytes", name, at+i)
			}
		}
		if l.stop.Load() {
			break
		}
	}
	return nil
}

// written is one of the writer's files.
type written struct {
	id       int
	f        *os.File
	blocks   int // its size
	versions [writeBlocks]int
}

func (l *Load) write() error {
	buf, err := directBuffer(writeBlocks * loadBlock)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	var files []*written
	for i := range writeFileN {
		f, err := os.OpenFile(filepath.Join(l.dir, fmt.Sprint(writePrefix, i)), os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_DIRECT, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		files = append(files, &written{id: 1000 + i, f: f})
	}
	r := rand.New(rand.NewPCG(7, 7))
	for round := 1; !l.stop.Load(); round++ {
		w := files[r.IntN(len(files))]
		if err := l.writeSome(w, round, r, buf); err != nil {
			return err
		}
	}
	for _, w := range files {
		if err := l.check(w, buf, 0, writeBlocks); err != nil {
			return err
		}
	}
	return nil
}

// writeSome writes a few ranges, syncs, and reads one of them back.
func (l *Load) writeSome(w *written, version int, r *rand.Rand, buf []byte) error {
	var at, n int
	for range 1 + r.IntN(4) {
		n = 1 + r.IntN(32)
		at = r.IntN(writeBlocks - n)
		for i := range n {
			fillBlock(buf[i*loadBlock:][:loadBlock], w.id, at+i, version)
			w.versions[at+i] = version
		}
		w.blocks = max(w.blocks, at+n)
		begin := time.Now()
		_, err := w.f.WriteAt(buf[:n*loadBlock], int64(at)*loadBlock)
		took := time.Since(begin)
		if err != nil {
			return fmt.Errorf("write %s after %v: %w", w.f.Name(), took, err)
		}
		l.note(func(r *LoadResult) { r.Writes++; r.LongestWrite = max(r.LongestWrite, took) })
	}
	begin := time.Now()
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", w.f.Name(), err)
	}
	took := time.Since(begin)
	l.note(func(r *LoadResult) { r.Syncs++; r.LongestSync = max(r.LongestSync, took) })
	return l.check(w, buf, at, n)
}

// check reads blocks back.
func (l *Load) check(w *written, buf []byte, at, n int) error {
	st, err := w.f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != int64(w.blocks)*loadBlock {
		return fmt.Errorf("%s has %d bytes, not %d blocks", w.f.Name(), st.Size(), w.blocks)
	}
	if n = min(n, w.blocks-at); n <= 0 {
		return nil
	}
	begin := time.Now()
	if _, err := w.f.ReadAt(buf[:n*loadBlock], int64(at)*loadBlock); err != nil {
		return fmt.Errorf("read back %s: %w", w.f.Name(), err)
	}
	took := time.Since(begin)
	l.note(func(r *LoadResult) { r.LongestCheck = max(r.LongestCheck, took) })
	want := make([]byte, loadBlock)
	for i := range n {
		clear(want)
		if v := w.versions[at+i]; v != 0 {
			fillBlock(want, w.id, at+i, v)
		}
		if !bytes.Equal(want, buf[i*loadBlock:][:loadBlock]) {
			return fmt.Errorf("%s: block %d, written in round %d, has wrong bytes", w.f.Name(), at+i, w.versions[at+i])
		}
	}
	return nil
}

// directBuffer is memory that direct I/O can use.
func directBuffer(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}
