package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

// fetchAhead is how many layers are downloaded at a time, the one that is
// being applied among them.
const fetchAhead = 3

// A made layer has been applied and waits for its commit. Its writable layer
// is read by the layers above until the commit has ended.
type made struct {
	i         int
	w         *lsmt.Writable
	committed chan struct{} // closed when the commit has ended well
}

// makeLayers makes the layers that were not found, one after the other.
func (c *conversion) makeLayers(ctx context.Context, commits chan<- *made) error {
	n := len(c.layers)
	if c.found == n {
		return nil
	}
	inputs := make([]io.ReadCloser, n)
	defer func() {
		for _, in := range inputs {
			if in != nil {
				in.Close()
			}
		}
	}()
	for i, next := c.found, c.found; i < n; i++ {
		for ; next < min(i+fetchAhead, n); next++ {
			in, err := c.input(ctx, next)
			if err != nil {
				return c.layerError(next, err)
			}
			inputs[next] = in
		}
		m, err := c.makeLayer(ctx, i, inputs[i])
		if err != nil {
			return c.layerError(i, err)
		}
		inputs[i].Close()
		inputs[i] = nil
		c.lowers.made = append(c.lowers.made, m)
		select {
		case commits <- m:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// input opens a layer of the source: a file where it is, or a download.
func (c *conversion) input(ctx context.Context, i int) (io.ReadCloser, error) {
	d := c.image.layers[i].desc
	if l, ok := c.src.(*layout); ok {
		return l.Open(ctx, d)
	}
	return newSpool(ctx, c.o.Workdir, func(ctx context.Context) (rc io.ReadCloser, err error) {
		c.event(Event{Layer: i, Stage: Fetch})
		rc, err = c.src.Open(ctx, d)
		if err != nil && isForeign(d.MediaType) {
			err = fmt.Errorf("a foreign layer (%s), which registries need not have: %w", d.MediaType, err)
		}
		return &onEOF{rc, func() { c.event(Event{Layer: i, Stage: Fetch, Done: true, Bytes: d.Size}) }}, err
	})
}

// onEOF calls f when the stream has ended well.
type onEOF struct {
	io.ReadCloser
	f func()
}

func (o *onEOF) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) && o.f != nil {
		o.f()
		o.f = nil
	}
	return n, err
}

// makeLayer applies a layer of the source to the file system.
func (c *conversion) makeLayer(ctx context.Context, i int, in io.ReadCloser) (_ *made, err error) {
	base, err := c.lowerImage(ctx, i)
	if err != nil {
		return nil, err
	}
	w, err := c.newWritable(i)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	s := &stack{layers: append(c.lowers.writables(), w)}
	if base != nil {
		s.base, s.size = base, base.Size()
	}
	err = c.stage(i, Apply, func() (int64, error) { return c.apply(ctx, i, s, in) })
	if err != nil {
		return nil, err
	}
	if err := normalize(s); err != nil {
		return nil, fmt.Errorf("normalize file system: %w", err)
	}
	return &made{i: i, w: w, committed: make(chan struct{})}, nil
}

func (c *conversion) newWritable(i int) (*lsmt.Writable, error) {
	f, err := tempFile(c.o.Workdir)
	if err != nil {
		return nil, err
	}
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: c.o.DeviceSize, UUID: uuid(c.image.layers[i].chain)})
	if err != nil {
		f.Close()
	}
	return w, err
}

// apply attaches s and lets a child process write the layer. When it returns
// the device is gone.
func (c *conversion) apply(ctx context.Context, i int, s *stack, in io.ReadCloser) (n int64, err error) {
	dev, err := device.Attach(ctx, s, c.o.DeviceSize, &device.Options{Name: deviceName(), SectorSize: 4096})
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			err = errNotRoot
		}
		return 0, err
	}
	r, err := c.applyTo(ctx, dev.Path(), i, in)
	if err != nil {
		// The child may have been killed with its mount.
		err = errors.Join(err, waitUnused(dev.Path()))
	}
	err = errors.Join(err, dev.Close())
	if cause := s.failure(); cause != nil {
		return 0, cause // what the kernel made of it says less
	}
	if err != nil {
		return 0, err
	}
	for _, w := range r.Applied.Warnings {
		c.event(Event{Layer: i, Stage: Apply, Warning: w})
	}
	if want := c.image.layers[i].diffID; r.DiffID != want {
		return 0, fmt.Errorf("the uncompressed layer has digest %s, the image's config says %s", r.DiffID, want)
	}
	return r.Applied.Bytes, nil
}

// deviceName is what losetup shows of the device.
func deviceName() string { return fmt.Sprintf("reprise-convert-%d", os.Getpid()) }

func (c *conversion) applyTo(ctx context.Context, dev string, i int, in io.ReadCloser) (report, error) {
	if i == 0 {
		if err := mkfs(ctx, dev); err != nil {
			return report{}, err
		}
	}
	return runChild(ctx, task{Device: dev, First: i == 0}, in)
}

// commit makes the blob of a layer.
func (c *conversion) commit(ctx context.Context, m *made) error {
	err := c.stage(m.i, Commit, func() (int64, error) {
		f, err := tempFile(c.o.Workdir)
		if err != nil {
			return 0, err
		}
		c.layers[m.i].blob = f
		d, size, err := c.writeBlob(ctx, m, f)
		if err != nil {
			return 0, err
		}
		tail, err := backstore.TailOf(f, size)
		if err != nil {
			return 0, err
		}
		c.layers[m.i].desc = c.image.layerDescriptor(d, size, tail, c.image.layers[m.i].key)
		return size, c.keep(ctx, m.i)
	})
	if err != nil {
		return c.layerError(m.i, fmt.Errorf("commit: %w", err))
	}
	return nil
}

// writeBlob commits a layer into f and hashes that. Blocks of 64 KiB are read
// by no reader when they grow by being compressed: such a layer gets smaller
// ones.
func (c *conversion) writeBlob(ctx context.Context, m *made, f *os.File) (digest.Digest, int64, error) {
	err := c.commitTo(ctx, m, f, c.o.BlockSize)
	if errors.Is(err, zfile.ErrIncompressible) {
		if err = f.Truncate(0); err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
		if err == nil {
			err = c.commitTo(ctx, m, f, c.o.BlockSize/2)
		}
	}
	if err != nil {
		return "", 0, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "", 0, err
	}
	// The header holds the length, so that hashing has to come last.
	d, err := digest.Canonical.FromReader(io.NewSectionReader(f, 0, size))
	return d, size, err
}

func (c *conversion) commitTo(ctx context.Context, m *made, f *os.File, blockSize int) error {
	z, err := zfile.NewWriter(f, &zfile.Options{
		Algo: c.o.Algo, BlockSize: blockSize, Level: c.o.Level, Tar: true, Concurrency: runtime.GOMAXPROCS(0),
	})
	if err != nil {
		return err
	}
	o := lsmt.CommitOptions{UUID: uuid(c.image.layers[m.i].chain)}
	if m.i > 0 {
		o.ParentUUID = uuid(c.image.layers[m.i-1].chain)
	}
	err = m.w.Commit(ctx, z, o)
	return errors.Join(err, z.Close())
}

// keep puts a new layer and its chain into the store.
func (c *conversion) keep(ctx context.Context, i int) error {
	descs := c.descriptors(i + 1)
	if err := c.store.add(ctx, descs[i], c.layers[i].blob); err != nil {
		return err
	}
	if c.store.haveAll(descs) {
		return c.store.remember(ctx, descs)
	}
	return nil
}

// lowers is what a new layer stands on: an image of the committed layers, and
// writable layers above that.
type lowers struct {
	image *backstore.Image
	n     int     // layers of image
	made  []*made // on top of image, bottom first; the commit may be under way
	cache *backstore.Cache
	dir   string // of cache
}

func (l *lowers) writables() []*lsmt.Writable {
	ws := make([]*lsmt.Writable, len(l.made))
	for i, m := range l.made {
		ws[i] = m.w
	}
	return ws
}

// lowerImage opens the layers below layer i that are committed, in place of
// their writable layers, whose space is freed. No device may be attached.
func (c *conversion) lowerImage(ctx context.Context, i int) (*backstore.Image, error) {
	l := &c.lowers
	done := 0
	for done < len(l.made) && l.made[done].isCommitted() {
		done++
	}
	n := i - len(l.made) + done
	if n == l.n {
		return l.image, nil
	}
	if l.image != nil {
		if err := l.image.Close(); err != nil {
			return nil, err
		}
		l.image = nil
	}
	sources, err := c.sources(n)
	if err != nil {
		return nil, err
	}
	if l.image, err = backstore.OpenImage(ctx, sources); err != nil {
		return nil, fmt.Errorf("open lower layers: %w", err)
	}
	for _, m := range l.made[:done] {
		if err := m.w.Close(); err != nil {
			return nil, err
		}
	}
	l.made, l.n = l.made[done:], n
	return l.image, nil
}

func (m *made) isCommitted() bool {
	select {
	case <-m.committed:
		return true
	default:
		return false
	}
}

// sources opens the n lowest layers. Those that are at the destination only
// are fetched as they are read, which is little: metadata of the file system.
func (c *conversion) sources(n int) (_ []backstore.LayerSource, err error) {
	sources := make([]backstore.LayerSource, n)
	defer func() {
		for _, s := range sources {
			if err != nil && s.Blob != nil {
				s.Blob.Close()
			}
		}
	}()
	for k := range sources {
		l := &c.layers[k]
		sources[k].Digest = l.desc.Digest
		switch {
		case l.blob != nil:
			sources[k].Path = fdPath(l.blob)
		case l.kept || c.store.has(l.desc):
			sources[k].Path = c.store.blob(l.desc.Digest)
		default:
			if err := c.remoteSource(&sources[k], k); err != nil {
				return nil, fmt.Errorf("layer %d: %w", k, err)
			}
		}
	}
	return sources, nil
}

func (c *conversion) remoteSource(s *backstore.LayerSource, k int) error {
	d := c.layers[k].desc
	path, origin, err := c.dst.Lower(d)
	if err != nil || path != "" {
		s.Path = path
		return err
	}
	l := &c.lowers
	if l.cache == nil {
		if l.dir, err = os.MkdirTemp(c.o.Workdir, "reprise-convert-"); err != nil {
			return err
		}
		// A conversion fails where its source stays away.
		if l.cache, err = backstore.OpenCache(l.dir, &backstore.CacheOptions{Outage: time.Minute}); err != nil {
			return err
		}
	}
	s.Blob, err = l.cache.Blob(d.Digest, d.Size, origin)
	return err
}

// close frees the layers below. No device may be attached and no commit be
// under way.
func (l *lowers) close() error {
	var err error
	for _, m := range l.made {
		err = errors.Join(err, m.w.Close())
	}
	if l.image != nil {
		err = errors.Join(err, l.image.Close())
	}
	if l.cache != nil {
		err = errors.Join(err, l.cache.Close())
	}
	if l.dir != "" {
		err = errors.Join(err, os.RemoveAll(l.dir))
	}
	return err
}
