package backstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// regionSize is the unit in which use is tracked for eviction.
const regionSize = 1 << 20

// ErrNoSpace is a chunk that could not be kept for want of disk space. Reads
// go around the cache then.
var errNoSpace = errors.New("no space for the chunk cache")

// A Blob is the bytes of one remote layer, read through the chunk cache. Its
// ReadAt fetches what is not there. All methods are safe for concurrent use.
type Blob struct {
	cache  *Cache
	digest digest.Digest
	size   int64
	chunk  int64
	chunks int64
	origin Fetcher
	link   *link
	file   *os.File
	mapAt  string
	refs   int // guarded by cache.mu

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // flights, checks and holds

	present bitset // readable chunks
	ahead   bitset // of these, fetched by background lanes in this process
	wanted  bitset // of these, read by demand in this process
	used    []atomic.Uint32
	opened  time.Time

	mu       sync.Mutex // guards the fields below
	flights  []*flight
	planned  []span // what a running replay is going to fetch, sorted
	runs     readahead
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

func newBlob(c *Cache, d digest.Digest, size int64, f Fetcher, file *os.File, mapAt string) *Blob {
	chunks := (size + c.o.ChunkSize - 1) / c.o.ChunkSize
	b := &Blob{
		cache: c, digest: d, size: size, chunk: c.o.ChunkSize, chunks: chunks,
		origin: f, link: c.link(f.Host()), file: file, mapAt: mapAt, refs: 1,
		present: newBitset(chunks), ahead: newBitset(chunks), wanted: newBitset(chunks),
		used:   make([]atomic.Uint32, (size+regionSize-1)/regionSize),
		opened: time.Now(),
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b
}

// load makes the data file as long as the blob and trusts what the map says.
func (b *Blob) load() error {
	fi, err := b.file.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != b.size {
		if err := b.file.Truncate(b.size); err != nil {
			return fmt.Errorf("make cache file: %w", err)
		}
		if fi.Size() != 0 {
			return nil // not what the map was made for
		}
	}
	flags, err := loadMap(b.mapAt, b.size, b.chunk, b.present)
	switch {
	case err == nil:
		b.verified = flags&mapVerified != 0
	case !errors.Is(err, os.ErrNotExist):
		b.cache.o.Log.Warn("cache: ignore presence map", "file", b.mapAt, "err", err)
	}
	return nil
}

// Close gives up this opening of the blob. The last one ends its flights,
// wakes its readers with an error and writes presence down.
func (b *Blob) Close() error {
	if !b.cache.release(b) {
		return nil
	}
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.wg.Wait()
	err := b.flush()
	if e := b.file.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("close blob %s: %w", b.digest, err)
	}
	return nil
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
		if _, err := b.ensure(off, int64(len(p))); err != nil {
			if !errors.Is(err, errNoSpace) {
				return 0, err
			}
			return b.readAround(p, off)
		}
	}
	n, err := b.file.ReadAt(p, off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// readAround reads from the origin without keeping anything.
func (b *Blob) readAround(p []byte, off int64) (int, error) {
	body, err := b.origin.Fetch(b.ctx, off, int64(len(p)), Demand)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	b.stats.demandRequests.Add(1)
	n, err := io.ReadFull(body, p)
	b.stats.demandBytes.Add(int64(n))
	return n, err
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
	b.present.removeAll(from, to)
	b.dirty, b.verified = true, false
}

// evict frees one region, unless another process has the blob open or a
// flight passes through. It returns the bytes freed.
func (b *Blob) evict(region int64) (int64, error) {
	off := region * regionSize
	n := min(regionSize, b.size-off)
	from, to := b.chunksOf(off, n)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.inFlight(off, off+n) || lockFile(b.file, unix.F_WRLCK, false) != nil {
		return 0, nil
	}
	defer func() { _ = lockFile(b.file, unix.F_RDLCK, false) }()
	freed := b.present.removeAll(from, to) * b.chunk
	b.used[region].Store(0)
	b.verified = false
	// The map must not promise what the hole takes away.
	if err := b.writeMap(); err != nil {
		return 0, err
	}
	err := unix.Fallocate(int(b.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil {
		return 0, fmt.Errorf("free %d bytes of %s: %w", n, b.file.Name(), err)
	}
	return freed, nil
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
	return replaceFile(b.mapAt, encodeMap(b.size, b.chunk, b.flags(), snap))
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
	return replaceFile(b.mapAt, encodeMap(b.size, b.chunk, b.flags(), b.present))
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
	b.dirty = true
	if got != b.digest.Encoded() {
		b.present.removeAll(0, b.chunks)
		return fmt.Errorf("verify blob %s: %w: the registry's bytes are sha256:%s; its cache was dropped", b.digest, ErrDigest, got)
	}
	b.verified = true
	return nil
}
