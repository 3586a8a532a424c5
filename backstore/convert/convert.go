// Package convert turns an OCI or Docker image into an overlaybd image.
//
// The source and the destination are each an image at a registry or in an
// `oci:` layout on disk; [At] makes either. [Convert] makes of each layer, from
// the bottom up, a layer of a block device with an ext4 on it: a sparse
// writable layer over the layers made so far is attached as a device, the
// layer's tar is applied to the mounted file system, and what was written is
// committed, compressed, hashed and pushed. The image's config and manifest
// keep everything but the layers and their digests.
//
// Layers are downloaded ahead of their turn. A layer is committed and pushed
// while the next one is applied on top of it. A converted layer fits only the
// very layers that it was made on; chains of them are found again at the
// destination and in [Options.CacheDir], by their key: the OCI chain ID and
// the settings.
//
// The file systems are reproducible: the same layers and settings give the
// same bytes with the same kernel and e2fsprogs (see normalize). Times of
// inode change equal those of modification, creation times are 0.
//
// # Processes and privilege
//
// Mounting needs root (CAP_SYS_ADMIN); a conversion that finds all layers done
// does not. Each layer is mounted and applied by a child process, which is
// /proc/self/exe started again: a program that imports this package becomes
// such a child, before its main runs, when it is started under a name that
// only this package uses. Mounts and temporary files have no names, devices
// end with their server, and the child dies with its parent: a conversion that
// is killed leaves nothing behind, except that fetched parts of reused layers
// stay in a directory of Options.Workdir.
//
// # Concurrency
//
// Convert may be called concurrently, also for the same destination or
// CacheDir. It waits for all that it started. [Options.Progress] is called by
// one goroutine at a time.
package convert

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/zfile"
)

// errNotRoot is what a lack of privilege is reported as.
var errNotRoot = errors.New("convert needs root (CAP_SYS_ADMIN) to mount")

// Options of [Convert]. A nil *Options and a zero field mean the defaults.
type Options struct {
	// Algo, BlockSize and Level are those of [zfile.Options].
	// Default: lz4, 4 KiB.
	Algo      zfile.Algo
	BlockSize int
	Level     int
	// DeviceSize is the size of the block device in bytes, a multiple of
	// 4096 from 1 MiB to 16 TiB. It is sparse: 64 GiB of empty ext4 are a blob
	// of some 15 kB. Default: 64 GiB.
	DeviceSize int64
	// Platform chooses from an image index. Default: this machine's.
	Platform *ocispec.Platform
	// Workdir holds temporary files: the layers being made, uncompressed, and
	// those downloaded ahead. Its file system must keep holes in files.
	// Default: CacheDir if there is one, else the system's.
	Workdir string
	// CacheDir keeps converted layers for later conversions. It is never
	// cleaned. Default: none.
	CacheDir string
	// Progress is told of each step. Default: nobody.
	Progress func(Event)
}

// A Stage is a step in the life of a layer.
type Stage string

// The stages of a layer; a layer that was found has only Reuse and Push.
const (
	Reuse  Stage = "reuse"  // found at the destination or in the cache
	Fetch  Stage = "fetch"  // Bytes downloaded
	Apply  Stage = "apply"  // Bytes of file content
	Commit Stage = "commit" // Bytes of the blob
	Push   Stage = "push"   // Bytes of the blob
)

// An Event tells of progress.
type Event struct {
	Layer, Layers int // Layer from 0, the bottom
	Stage         Stage
	Done          bool  // the stage has ended; otherwise it begins
	Bytes         int64 // once it has ended
	// Warning tells what was left out, or not done, without harm to the image.
	Warning string
}

const (
	defaultDeviceSize = 64 << 30
	minDeviceSize     = 1 << 20
	maxDeviceSize     = 1 << 44
)

// formatVersion is part of every key. It changes whenever this package makes
// other bytes of the same layer.
const formatVersion = 1

// filled returns a checked copy with the defaults.
func (o *Options) filled() (*Options, error) {
	var f Options
	if o != nil {
		f = *o
	}
	if f.Algo == 0 {
		f.Algo = zfile.LZ4
	}
	if f.BlockSize == 0 {
		f.BlockSize = 4096
	}
	if f.Algo == zfile.Zstd && f.Level == 0 {
		f.Level = 3
	}
	if f.DeviceSize == 0 {
		f.DeviceSize = defaultDeviceSize
	}
	if f.DeviceSize < minDeviceSize || f.DeviceSize > maxDeviceSize || f.DeviceSize%4096 != 0 {
		return nil, fmt.Errorf("device size of %d bytes: use a multiple of 4096 from %d to %d", f.DeviceSize, minDeviceSize, int64(maxDeviceSize))
	}
	if f.Platform == nil {
		p := platforms.DefaultSpec()
		f.Platform = &p
	}
	if f.Workdir == "" {
		f.Workdir = os.TempDir()
		if f.CacheDir != "" {
			f.Workdir = f.CacheDir
		}
	}
	if f.Progress == nil {
		f.Progress = func(Event) {}
	}
	// The writer knows what it takes.
	z, err := zfile.NewWriter(io.Discard, &zfile.Options{
		Algo: f.Algo, BlockSize: f.BlockSize, Level: f.Level, Concurrency: 1, Stream: true,
	})
	if err != nil {
		return nil, err
	}
	return &f, z.Close()
}

// key names what a layer and those below become with these options.
func (o *Options) key(chain digest.Digest) string {
	p, err := json.Marshal(struct {
		Version    int
		Chain      digest.Digest
		FS         string
		DeviceSize int64
		Algo       string
		BlockSize  int
		Level      int
	}{formatVersion, chain, fsType, o.DeviceSize, o.Algo.String(), o.BlockSize, o.Level})
	if err != nil {
		panic(err) // plain values
	}
	h := sha256.Sum256(p)
	return hex.EncodeToString(h[:])
}

// Convert converts the image src and writes it to dst. It returns the
// descriptor of the new image manifest.
func Convert(ctx context.Context, src Source, dst Dest, o *Options) (ocispec.Descriptor, error) {
	opts, err := o.filled()
	if err == nil {
		err = os.MkdirAll(opts.Workdir, 0o755)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("convert: %w", err)
	}
	d, err := convert(ctx, src, dst, opts)
	switch {
	case errors.Is(err, errNotRoot):
		err = errNotRoot
	case err != nil:
		err = fmt.Errorf("convert %s: %w", src, err)
	}
	return d, err
}

func convert(ctx context.Context, src Source, dst Dest, o *Options) (_ ocispec.Descriptor, err error) {
	im, err := readImage(ctx, src, o)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	c := &conversion{
		src: src, dst: dst, o: o, image: im,
		store:  store{o.CacheDir},
		layers: make([]layer, len(im.layers)),
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := c.reuse(ctx); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := c.run(ctx); err != nil {
		return ocispec.Descriptor{}, err
	}
	return c.publish(ctx)
}

// A conversion is one call of Convert.
type conversion struct {
	src   Source
	dst   Dest
	o     *Options
	image *image
	store store
	found int // layers that were found, the lowest ones
	there int // of these, how many are at the destination: all or none

	layers []layer
	lowers lowers

	progress sync.Mutex // lets one goroutine call o.Progress at a time
}

// layer is one layer on its way.
type layer struct {
	desc ocispec.Descriptor // once it is committed
	blob *os.File           // nameless; nil where it was found
	kept bool               // found in the store, not at the destination
}

func (c *conversion) event(e Event) {
	e.Layers = len(c.layers)
	c.progress.Lock()
	defer c.progress.Unlock()
	c.o.Progress(e)
}

// stage runs one stage of a layer between its two events.
func (c *conversion) stage(i int, s Stage, f func() (int64, error)) error {
	c.event(Event{Layer: i, Stage: s})
	n, err := f()
	if err == nil {
		c.event(Event{Layer: i, Stage: s, Done: true, Bytes: n})
	}
	return err
}

// reuse finds the layers that need not be made again: those of the longest
// chain, the destination's before the store's.
func (c *conversion) reuse(ctx context.Context) error {
	keys := make([]string, len(c.image.layers))
	for i, l := range c.image.layers {
		keys[i] = l.key
	}
	there, err := c.dst.Find(ctx, keys)
	if err != nil {
		return fmt.Errorf("look for converted layers: %w", err)
	}
	kept := c.store.find(keys)
	found := there
	if len(kept) > len(there) {
		found = kept
	}
	c.found = len(found)
	if len(kept) <= len(there) {
		c.there = len(there)
	}
	for i, d := range found {
		tail, _ := strconv.ParseInt(d.Annotations[backstore.AnnotationTail], 10, 64)
		d := c.image.layerDescriptor(d.Digest, d.Size, tail, keys[i])
		c.layers[i] = layer{desc: d, kept: i >= c.there}
		c.event(Event{Layer: i, Stage: Reuse, Done: true, Bytes: d.Size})
	}
	return nil
}

// run makes the missing layers and pushes what the destination lacks.
func (c *conversion) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	push := errgroup.Group{}
	push.SetLimit(pushesAtOnce)
	commits := make(chan *made, 1)
	g.Go(func() error {
		defer close(commits)
		return c.makeLayers(ctx, commits)
	})
	g.Go(func() error {
		var failed error
		for i := range c.found {
			if c.layers[i].kept {
				push.Go(func() error { return c.push(ctx, i) })
			}
		}
		for m := range commits {
			if failed != nil {
				continue // makeLayers will notice
			}
			if failed = c.commit(ctx, m); failed != nil {
				cancel()
				continue
			}
			close(m.committed)
			push.Go(func() error { return c.push(ctx, m.i) })
		}
		return errors.Join(failed, push.Wait())
	})
	return g.Wait()
}

const pushesAtOnce = 3

// push sends a layer's blob to the destination, keeps it in the store, and
// makes its chain known there.
func (c *conversion) push(ctx context.Context, i int) error {
	l := &c.layers[i]
	err := c.stage(i, Push, func() (int64, error) {
		return l.desc.Size, c.dst.Push(ctx, l.desc, func() (io.ReadCloser, error) { return c.openBlob(i) })
	})
	if err != nil {
		return fmt.Errorf("push layer %d: %w", i, err)
	}
	return nil
}

func (c *conversion) openBlob(i int) (io.ReadCloser, error) {
	l := &c.layers[i]
	if l.blob == nil {
		return os.Open(c.store.blob(l.desc.Digest))
	}
	return os.Open(fdPath(l.blob)) // with an offset of its own
}

// publish writes config and manifest. All blobs are there by now, so that the
// tag never points to an image with something missing.
func (c *conversion) publish(ctx context.Context) (ocispec.Descriptor, error) {
	descs := c.descriptors(len(c.layers))
	im, err := c.image.converted(descs)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := c.dst.Push(ctx, im.configDesc, opener(im.config)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push config: %w", err)
	}
	if err := c.dst.PushManifest(ctx, im.desc, im.manifest); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("push manifest: %w", err)
	}
	c.remember(ctx, descs)
	return im.desc, nil
}

// descriptors are those of the n lowest layers, which are committed.
func (c *conversion) descriptors(n int) []ocispec.Descriptor {
	descs := make([]ocispec.Descriptor, n)
	for i := range descs {
		descs[i] = c.layers[i].desc
	}
	return descs
}

// remember makes the chains of all new layers known at the destination. The
// image is complete without that.
func (c *conversion) remember(ctx context.Context, descs []ocispec.Descriptor) {
	if err := c.dst.Remember(ctx, descs, c.there); err != nil {
		c.event(Event{Layer: len(descs) - 1, Stage: Push,
			Warning: fmt.Sprintf("the layers will not be found again at %s: %v", c.dst, err)})
	}
}

// close frees everything.
func (c *conversion) close() error {
	err := c.lowers.close()
	for i := range c.layers {
		if f := c.layers[i].blob; f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

// layerError names a layer of the source in an error.
func (c *conversion) layerError(i int, err error) error {
	return fmt.Errorf("layer %d (%s): %w", i, c.image.layers[i].desc.Digest, err)
}
