package backstore

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	minChunk = 512
	maxChunk = 1 << 20

	// DefaultChunkSize is the unit in which the cache knows what it has.
	// Requests are as long as demand or a plan makes them; a small chunk only
	// keeps their ends from being rounded far. A replay of the demo's trace
	// without gaps fetches 18.0 MiB with chunks of 512 B, 18.6 with 4 KiB,
	// 20.1 with 16 KiB and 23.7 with 64 KiB.
	DefaultChunkSize = 512

	// DefaultCacheBytes bounds what the cache keeps on disk.
	DefaultCacheBytes = 32 << 30

	// DefaultDecodedBytes bounds the decoded blocks that are kept in memory.
	DefaultDecodedBytes = 32 << 20
)

// CacheOptions are the settings of a [Cache]. A zero field means its default.
type CacheOptions struct {
	// MaxBytes bounds the bytes kept on disk, [DefaultCacheBytes] by default.
	// Chunks that are in use may exceed it for a while.
	MaxBytes int64
	// ChunkSize in bytes, a power of two, 512 B to 1 MiB,
	// [DefaultChunkSize] by default. A cache directory made with another
	// chunk size starts empty.
	ChunkSize int64
	// DecodedBytes bounds the memory for decoded blocks of layers that are
	// compressed in blocks of more than 4 KiB, [DefaultDecodedBytes] by
	// default; negative for none. It is given back when it has not been used
	// for a while.
	DecodedBytes int64
	// FlushEvery is how often presence is written down, 3 s by default.
	FlushEvery time.Duration
	// RetryFor is how long opening an image goes on after failing fetches,
	// 60 s by default.
	RetryFor time.Duration
	// Outage is how long a read of an open image goes on trying while its
	// registry cannot be reached, hangs, or answers that it is overloaded or
	// broken: 0, the default, for ever, which is until the image is closed; a
	// negative time for no longer than it takes to be sure, some seconds.
	Outage time.Duration
	// Background bounds what replay and completion take, of all images
	// together. PerMinute is for each registry host, and counts the requests of
	// readers, too, who do not wait for it.
	Background Limits
	// Log receives warnings, slog.Default() by default.
	Log *slog.Logger
}

func (o *CacheOptions) fill() (CacheOptions, error) {
	var c CacheOptions
	if o != nil {
		c = *o
	}
	c.MaxBytes = cmp.Or(c.MaxBytes, DefaultCacheBytes)
	c.ChunkSize = cmp.Or(c.ChunkSize, DefaultChunkSize)
	c.DecodedBytes = cmp.Or(c.DecodedBytes, DefaultDecodedBytes)
	c.FlushEvery = cmp.Or(c.FlushEvery, 3*time.Second)
	c.RetryFor = cmp.Or(c.RetryFor, time.Minute)
	c.Log = cmp.Or(c.Log, slog.Default())
	if c.ChunkSize < minChunk || c.ChunkSize > maxChunk || c.ChunkSize&(c.ChunkSize-1) != 0 {
		return c, fmt.Errorf("chunk size %d: not a power of two from %d to %d", c.ChunkSize, minChunk, maxChunk)
	}
	return c, nil
}

// A Cache keeps the chunks of remote blobs in a directory, one sparse data
// file and two maps a blob digest, and owns the fetch schedule of the process.
// A process that is killed loses nothing of what it has fetched: the live map
// is the kernel's. After a crash of the machine only the presence map is
// trusted, which is written in batches after the data was synced.
type Cache struct {
	dir     string
	o       CacheOptions
	decoded *decoded // nil if none are kept

	mu     sync.Mutex // guards the fields below
	blobs  map[digest.Digest]*Blob
	opened uint64 // blobs, ever
	links  map[string]*link
	node   *node
	past   map[string]HostStats // by host, of blobs that were closed
	closed bool

	stop    chan struct{}
	stopped chan struct{}
}

// OpenCache opens, and makes if need be, the cache in dir.
func OpenCache(dir string, o *CacheOptions) (*Cache, error) {
	opts, err := o.fill()
	if err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	c := &Cache{
		dir: dir, o: opts, decoded: newDecoded(opts.DecodedBytes),
		blobs: map[digest.Digest]*Blob{}, links: map[string]*link{}, node: newNode(opts.Background),
		stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	go c.maintain()
	return c, nil
}

// Close writes down what the cache has and releases it. Every blob must have
// been closed.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	open := len(c.blobs)
	c.mu.Unlock()
	close(c.stop)
	<-c.stopped
	c.decoded.close()
	if open > 0 {
		return fmt.Errorf("close cache %s: %d blobs are still open", c.dir, open)
	}
	return nil
}

// Blob opens the blob of the given digest and size, which f fetches from where
// the cache does not have it. Opening an open blob again shares it, with the
// first Fetcher; each opening needs its own Close.
func (c *Cache) Blob(d digest.Digest, size int64, f Fetcher) (*Blob, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("open blob %q: %w", d, err)
	}
	if size < 0 || size > maxBlobSize {
		return nil, fmt.Errorf("open blob %s: size %d is out of range", d, size)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("open blob %s: cache: %w", d, os.ErrClosed)
	}
	if b := c.blobs[d]; b != nil {
		if b.size != size {
			return nil, fmt.Errorf("open blob %s: size %d, but it is open with size %d", d, size, b.size)
		}
		b.refs++
		return b, nil
	}
	b, err := c.open(d, size, f)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", d, err)
	}
	c.blobs[d] = b
	return b, nil
}

func (c *Cache) open(d digest.Digest, size int64, f Fetcher) (*Blob, error) {
	dir := filepath.Join(c.dir, d.Algorithm().String())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, d.Encoded())
	file, making, err := openShared(path + dataSuffix)
	if err != nil {
		return nil, err
	}
	b := newBlob(c, d, size, f, file, path)
	c.opened++
	b.number = c.opened
	err = b.load(making)
	if err == nil && making {
		err = lockByte(file, lockMaking, unix.F_UNLCK, 1)
	}
	if err != nil {
		b.live.unmap()
		_ = file.Close()
		return nil, err
	}
	return b, nil
}

// link returns what the process knows of a host. c.mu is held.
func (c *Cache) link(host string) *link {
	l := c.links[host]
	if l == nil {
		l = newLink(host, c.node, c.o.Log, c.o.Background.PerMinute)
		c.links[host] = l
	}
	return l
}

// Estimate tells what was measured of the link to a host, as named by
// [Fetcher].Host.
func (c *Cache) Estimate(host string) Estimate {
	c.mu.Lock()
	l := c.link(host)
	c.mu.Unlock()
	return l.estimate()
}

// release is the last Close of a blob.
func (c *Cache) release(b *Blob) (last bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b.refs--; b.refs > 0 {
		return false
	}
	delete(c.blobs, b.digest)
	c.retire(b)
	return true
}

// maintain writes presence down now and then, and keeps the size bound.
func (c *Cache) maintain() {
	defer close(c.stopped)
	t := time.NewTicker(c.o.FlushEvery)
	defer t.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-t.C:
		}
		for _, b := range c.openBlobs() {
			if !b.hold() {
				continue
			}
			if err := b.flush(); err != nil {
				c.o.Log.Warn("cache: write presence map", "blob", b.digest, "err", err)
			}
			b.markUsed()
			b.wg.Done()
		}
		c.decoded.sweep()
		if err := c.trim(); err != nil {
			c.o.Log.Warn("cache: keep the size bound", "dir", c.dir, "err", err)
		}
	}
}

func (c *Cache) openBlobs() []*Blob {
	c.mu.Lock()
	defer c.mu.Unlock()
	bs := make([]*Blob, 0, len(c.blobs))
	for _, b := range c.blobs {
		bs = append(bs, b)
	}
	return bs
}

// trim brings the directory under its bound: first blobs that nobody has open,
// the one unused for longest first, then the coldest parts of open ones.
func (c *Cache) trim() error {
	total, idle, err := c.usage()
	if err != nil || total <= c.o.MaxBytes {
		return err
	}
	for _, f := range idle {
		if total <= c.o.MaxBytes {
			return nil
		}
		if c.remove(f.path) {
			total -= f.bytes
		}
	}
	return c.trimOpen(total - c.o.MaxBytes)
}

type idleFile struct {
	path  string // without suffix
	bytes int64  // allocated
	used  time.Time
}

// usage sums what the cache has on disk and lists the blobs that are not open
// in this process, the longest unused first.
func (c *Cache) usage() (total int64, idle []idleFile, err error) {
	open := map[string]bool{}
	for _, b := range c.openBlobs() {
		open[b.file.Name()] = true
	}
	files, err := filepath.Glob(filepath.Join(c.dir, "*", "*"+dataSuffix))
	if err != nil {
		return 0, nil, err
	}
	for _, name := range files {
		var st unix.Stat_t
		if unix.Stat(name, &st) != nil {
			continue
		}
		total += st.Blocks * 512
		if open[name] {
			continue
		}
		base := name[:len(name)-len(dataSuffix)]
		f := idleFile{path: base, bytes: st.Blocks * 512}
		for _, suffix := range []string{mapSuffix, liveSuffix} {
			if fi, err := os.Stat(base + suffix); err == nil && fi.ModTime().After(f.used) {
				f.used = fi.ModTime()
			}
		}
		idle = append(idle, f)
	}
	slices.SortFunc(idle, func(a, b idleFile) int { return a.used.Compare(b.used) })
	return total, idle, nil
}

// remove deletes a blob that no process has open.
func (c *Cache) remove(path string) bool {
	f, err := os.OpenFile(path+dataSuffix, os.O_RDWR, 0)
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	if lockFile(f, unix.F_WRLCK) != nil {
		return false
	}
	// The data last: no map may be left for data that are not there.
	return removeFiles(path+liveSuffix, path+mapSuffix, path+dataSuffix) == nil
}

// trimOpen frees about n bytes from open blobs, their coldest regions first.
func (c *Cache) trimOpen(n int64) error {
	type region struct {
		b    *Blob
		i    int64
		used uint32
	}
	var all []region
	for _, b := range c.openBlobs() {
		for i := range b.used {
			if u := b.used[i].Load(); u != 0 {
				all = append(all, region{b, int64(i), u})
			}
		}
	}
	slices.SortFunc(all, func(a, b region) int { return cmp.Compare(a.used, b.used) })
	for _, r := range all {
		if n <= 0 {
			break
		}
		freed, err := r.b.evict(r.i)
		if err != nil {
			return err
		}
		n -= freed
	}
	return nil
}
