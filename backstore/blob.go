package backstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// regionSize is the unit in which use is tracked for eviction.
const regionSize = 1 << 20

// closePatience is how long Close waits for fetches that it has cancelled.
const closePatience = 2 * time.Second

// errNotKept is a chunk that could not be kept, for want of disk space mostly.
// Reads go around the cache then.
var errNotKept = errors.New("the chunk cache cannot be written")

// A Blob is the bytes of one remote layer, read through the chunk cache. Its
// ReadAt fetches what is not there. All methods are safe for concurrent use.
type Blob struct {
	cache  *Cache
	number uint64 // among all that the cache has opened
	digest digest.Digest
	size   int64
	chunk  int64
	chunks int64
	origin Fetcher
	link   *link
	file   *os.File
	base   string // path of the files, without suffix
	refs   int    // guarded by cache.mu

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // flights, checks and holds

	present bitset // readable chunks
	ahead   bitset // of these, fetched by background lanes in this process
	wanted  bitset // of these, read by demand in this process
	read    blocksRead
	used    []atomic.Uint32
	opened  time.Time
	// tailFrom is where the bytes begin that this process has fetched to open
	// the layer, size if none.
	tailFrom atomic.Int64
	touched  time.Time // the live map, by Cache.maintain

	// live is nil while there is none. It is set and unset under mu, and is
	// there for as long as wg is held.
	live     *liveMap
	liveLost sync.Once

	unkept sync.Once
	waited atomic.Int64 // when a read last missed, in Unix nanoseconds

	mu       sync.Mutex // guards the fields below
	flights  []*flight
	asides   []*flight  // around the cache
	plans    []*planned // of running replays
	runs     readahead
	pins     []span // what opening the blob's layer reads: not evicted
	dirty    bool
	verified bool
	closed   bool

	stats blobStats
}

type blobStats struct {
	demandRequests, demandBytes         atomic.Int64
	backgroundRequests, backgroundBytes atomic.Int64
	corrupt                             atomic.Int64
}

func newBlob(c *Cache, d digest.Digest, size int64, f Fetcher, file *os.File, base string) *Blob {
	chunks := (size + c.o.ChunkSize - 1) / c.o.ChunkSize
	b := &Blob{
		cache: c, digest: d, size: size, chunk: c.o.ChunkSize, chunks: chunks,
		origin: f, link: c.link(f.Host()), file: file, base: base, refs: 1,
		present: newBitset(chunks), ahead: newBitset(chunks), wanted: newBitset(chunks),
		used:   make([]atomic.Uint32, (size+regionSize-1)/regionSize),
		opened: time.Now(),
	}
	b.tailFrom.Store(size)
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// load makes the data file as long as the blob and finds out what is in it.
// With making, nobody else does that at the same time.
func (b *Blob) load(making bool) error {
	fi, err := b.file.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != b.size { // not what the maps were made for
		if err := removeFiles(b.base+liveSuffix, b.base+mapSuffix); err != nil {
			return err
		}
		if err := b.file.Truncate(b.size); err != nil {
			return fmt.Errorf("make cache file: %w", err)
		}
	}
	saved := newBitset(b.chunks)
	flags, err := loadMap(b.base+mapSuffix, b.size, b.chunk, saved)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.cache.o.Log.Warn("cache: ignore presence map", "file", b.base+mapSuffix, "err", err)
	}
	if err := b.loadLive(saved, making); err != nil {
		b.cache.o.Log.Warn("cache: without a live map, a killed process loses what it has fetched",
			"file", b.base+liveSuffix, "err", err)
	}
	if b.live == nil {
		b.present = saved
	} else if _, err := b.live.addTo(b.present, 0, b.chunks); err != nil {
		return err
	}
	b.dirty = b.present.count() > saved.count()
	b.verified = flags&mapVerified != 0 && b.Complete()
	return nil
}

// loadLive maps the live map. With making, it makes it of what was saved if need
// be.
func (b *Blob) loadLive(saved bitset, making bool) error {
	path := b.base + liveSuffix
	single := making && alone(b.file)
	if single {
		b.sweep()
	}
	k, err := newLiveKey(b.file, b.size, b.chunk)
	if err != nil {
		return err
	}
	if b.live, err = openLive(path, k); !errors.Is(err, errNoLive) {
		return err
	}
	if _, err := os.Stat(path); err == nil && !single || !making {
		return errors.New("other processes have another one, or are making it")
	}
	b.live, err = makeLive(path, k, saved)
	return err
}

// sweep removes what killed processes have left half-written.
func (b *Blob) sweep() {
	left, _ := filepath.Glob(b.base + ".*.tmp")
	_ = removeFiles(left...)
}

func removeFiles(paths ...string) error {
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// learn adds to present what other processes have fetched of chunks [from, to).
func (b *Blob) learn(from, to int64) {
	if _, err := b.live.addTo(b.present, from, min(to, b.chunks)); err != nil {
		b.lost(err)
	}
}

// forget takes chunks [from, to) away, from everybody who looks from now on.
// b.mu is held.
func (b *Blob) forget(from, to int64) (removed int64, err error) {
	b.dirty, b.verified = true, false
	removed = b.present.removeAll(from, to)
	if err := b.live.remove(from, to); err != nil {
		return removed, fmt.Errorf("forget chunks [%d, %d) of blob %s: %w", from, to, b.digest, err)
	}
	return removed, nil
}

// lost says that the live map does not work; the cache goes on without.
func (b *Blob) lost(err error) {
	b.liveLost.Do(func() {
		b.cache.o.Log.Warn("cache: a killed process will lose what it has fetched", "blob", b.digest, "err", err)
	})
}

// Close gives up this opening of the blob. The last one ends its flights,
// wakes its readers with an error and writes presence down. It waits for no
// longer than [closePatience] where a Fetcher does not heed its cancelling, and
// says so.
func (b *Blob) Close() error {
	if !b.cache.release(b) {
		return nil
	}
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.cache.decoded.drop(b.number)
	ended := make(chan error, 1)
	quiet := make(chan struct{})
	go func() {
		b.wg.Wait()
		close(quiet)
		ended <- b.end()
	}()
	t := time.NewTimer(closePatience)
	defer t.Stop()
	var err error
	select {
	case <-quiet:
		err = <-ended
	case <-t.C:
		err = fmt.Errorf("a fetch from %s does not end: %w", b.origin.Host(), os.ErrDeadlineExceeded)
	}
	if err != nil {
		return fmt.Errorf("close blob %s: %w", b.digest, err)
	}
	return nil
}

// end writes presence down and closes the files; nobody uses them any more.
func (b *Blob) end() error {
	err := b.flush()
	b.mu.Lock()
	live := b.live
	b.live = nil
	b.mu.Unlock()
	live.unmap()
	if e := b.file.Close(); err == nil {
		err = e
	}
	return err
}

// Digest returns the digest of the whole blob.
func (b *Blob) Digest() digest.Digest { return b.digest }

// Size returns the size of the blob in bytes.
func (b *Blob) Size() int64 { return b.size }

// Present returns how many of the blob's bytes are on this node.
func (b *Blob) Present() int64 { return min(b.present.count()*b.chunk, b.size) }

// Complete reports whether the whole blob is on this node.
func (b *Blob) Complete() bool { return b.present.hasAll(0, b.chunks) }

// Verified reports whether the whole blob is on this node and its digest was
// found right.
func (b *Blob) Verified() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.verified
}

// chunksOf gives the chunks that hold [off, off+n).
func (b *Blob) chunksOf(off, n int64) (from, to int64) {
	return off / b.chunk, (off + n + b.chunk - 1) / b.chunk
}

// has reports whether [off, off+n) is on this node.
func (b *Blob) has(off, n int64) bool { return b.present.hasAll(b.chunksOf(off, n)) }

// ReadAt reads from the cache, and from the origin what is not there. It is
// demand.
func (b *Blob) ReadAt(p []byte, off int64) (int, error) {
	return b.readAt(p, off, b.cache.o.Outage)
}

// readAt is ReadAt with a limit to the patience; see newPatience.
func (b *Blob) readAt(p []byte, off int64, limit time.Duration) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read blob %s: negative offset", b.digest)
	}
	if off >= b.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > b.size-off
	if short {
		p = p[:b.size-off]
	}
	if !b.has(off, int64(len(p))) {
		wait := newPatience(limit)
		if _, err := b.ensure(off, int64(len(p)), wait); err != nil {
			if !errors.Is(err, errNotKept) {
				return 0, err
			}
			return b.readAround(p, off, wait)
		}
	}
	n, err := b.file.ReadAt(p, off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// readAround reads from the origin without keeping anything.
func (b *Blob) readAround(p []byte, off int64, wait patience) (int, error) {
	buf := make([]byte, len(p)) // the flight may outlive the read
	f, err := b.startAside(buf, off)
	if err != nil {
		return 0, err
	}
	if _, err := f.wait(b.ctx, f.end, wait); err != nil {
		return 0, err
	}
	return copy(p, buf), nil
}

// touch notes the use of [off, off+n) for eviction.
func (b *Blob) touch(off, n int64) {
	now := uint32(time.Since(b.opened)/time.Second) + 1
	for i := off / regionSize; i*regionSize < off+n; i++ {
		if b.used[i].Load() != now {
			b.used[i].Store(now)
		}
	}
}

// Invalidate forgets [off, off+n), whose bytes were found to be bad, so that
// the next read fetches them again.
func (b *Blob) Invalidate(off, n int64) {
	from, to := b.chunksOf(off, n)
	to = min(to, b.chunks)
	b.stats.corrupt.Add(1)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	if _, err := b.forget(from, to); err != nil {
		b.lost(err)
	}
}

// pin keeps [off, end) from being evicted while the blob is open.
func (b *Blob) pin(off, end int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pins = append(b.pins, span{off, end})
}

func (b *Blob) pinned(off, end int64) bool {
	return slices.ContainsFunc(b.pins, func(s span) bool { return s.off < end && off < s.end })
}

// evict frees one region, unless it is pinned, another process has the blob
// open or a flight passes through. It returns the bytes freed.
func (b *Blob) evict(region int64) (int64, error) {
	off := region * regionSize
	n := min(regionSize, b.size-off)
	from, to := b.chunksOf(off, n)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.pinned(off, off+n) || b.inFlight(off, off+n) || lockFile(b.file, unix.F_WRLCK) != nil {
		return 0, nil
	}
	defer func() { _ = lockFile(b.file, unix.F_RDLCK) }()
	b.used[region].Store(0)
	// No map may promise what the hole takes away.
	freed, err := b.forget(from, to)
	if err != nil {
		return 0, err
	}
	if b.live == nil {
		if err := removeFiles(b.base + liveSuffix); err != nil {
			return 0, err
		}
	}
	if err := b.writeMap(); err != nil {
		return 0, err
	}
	err = unix.Fallocate(int(b.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil {
		return 0, fmt.Errorf("free %d bytes of %s: %w", n, b.file.Name(), err)
	}
	return freed * b.chunk, nil
}

func (b *Blob) inFlight(off, end int64) bool {
	for _, f := range b.flights {
		if f.off < end && off < f.end {
			return true
		}
	}
	return false
}

// hold keeps the files open until b.wg is done once more; not if b is being
// closed.
func (b *Blob) hold() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.wg.Add(1)
	}
	return !b.closed
}

// usedEvery is how often an open blob is marked as used, for the order in which
// the blobs of killed processes are removed.
const usedEvery = time.Minute

// markUsed is for Cache.maintain.
func (b *Blob) markUsed() {
	if now := time.Now(); now.Sub(b.touched) >= usedEvery {
		b.touched = now
		_ = os.Chtimes(b.base+liveSuffix, time.Time{}, now)
	}
}

// flush writes presence down, if it changed, after the data. What other
// processes have written down meanwhile is kept.
func (b *Blob) flush() error {
	b.mu.Lock()
	dirty := b.dirty
	b.dirty = false
	b.mu.Unlock()
	if !dirty {
		return nil
	}
	b.learn(0, b.chunks)
	// Chunks that arrive from here on are not promised by this map: take the
	// picture first, then sync.
	snap := newBitset(b.chunks)
	for i := range snap {
		snap[i].Store(b.present[i].Load())
	}
	if err := unix.Fdatasync(int(b.file.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", b.file.Name(), err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range snap { // less what was taken away in between
		snap[i].And(b.present[i].Load())
	}
	return replaceFile(b.base+mapSuffix, encodeMap(b.size, b.chunk, b.flags(), snap))
}

func (b *Blob) flags() uint32 {
	if b.verified {
		return mapVerified
	}
	return 0
}

// writeMap writes presence down without syncing the data, which is right only
// when chunks were taken away. b.mu is held.
func (b *Blob) writeMap() error {
	return replaceFile(b.base+mapSuffix, encodeMap(b.size, b.chunk, b.flags(), b.present))
}

// ErrDigest is the error of a blob whose bytes are not what its digest says.
var ErrDigest = errors.New("digest mismatch")

// Verify reads the whole blob, which must be complete, and checks its digest.
// Where it is wrong everything the cache has of the blob is forgotten.
func (b *Blob) Verify(ctx context.Context) error {
	if b.Verified() {
		return nil
	}
	if !b.Complete() {
		return fmt.Errorf("verify blob %s: only %d of %d bytes are here", b.digest, b.Present(), b.size)
	}
	if b.digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("verify blob %s: %w", b.digest, errors.ErrUnsupported)
	}
	h := sha256.New()
	r := io.NewSectionReader(b.file, 0, b.size)
	for buf := make([]byte, 1<<20); ; {
		n, err := r.Read(buf)
		h.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("verify blob %s: %w", b.digest, err)
		}
	}
	got := hex.EncodeToString(h.Sum(nil))
	b.mu.Lock()
	defer b.mu.Unlock()
	if got != b.digest.Encoded() {
		if !b.closed {
			if _, err := b.forget(0, b.chunks); err != nil {
				b.lost(err)
			}
			b.cache.decoded.drop(b.number)
		}
		return fmt.Errorf("verify blob %s: %w: the registry's bytes are sha256:%s; its cache was dropped", b.digest, ErrDigest, got)
	}
	b.dirty = true
	b.verified = true
	return nil
}
