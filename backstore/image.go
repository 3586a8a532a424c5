package backstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

// An Image is a stack of layers as one block device. It satisfies the back end
// interfaces of the device package. All methods are safe for concurrent use.
type Image struct {
	layers []*layer
	index  *lsmt.Index
	upper  *lsmt.Writable // nil for a read-only image
	size   int64
	opened time.Time

	observer atomic.Pointer[Observer]
	counts   counters
	stall    stallClock

	closing sync.Once
	err     error
}

// OpenImage opens a stack of layers, bottom first, all at once. It takes the
// blobs of the sources over: it closes them when it fails, and the image does
// when it is closed. ctx bounds the opening only.
func OpenImage(ctx context.Context, sources []LayerSource) (*Image, error) {
	if len(sources) == 0 {
		return nil, errors.New("open image: it has no layers")
	}
	if len(sources) > lsmt.MaxLayers {
		return nil, fmt.Errorf("open image: %d layers, at most %d are supported", len(sources), lsmt.MaxLayers)
	}
	layers, err := openLayers(ctx, sources)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	sealed := make([]*lsmt.Layer, len(layers))
	for i, l := range layers {
		sealed[i] = l.sealed
	}
	im := &Image{layers: layers, opened: time.Now()}
	im.settle()
	if im.index, err = lsmt.Merge(sealed); err == nil {
		im.size = lsmt.VirtualSize(sealed)
	}
	if err == nil && im.size <= 0 {
		err = errors.New("no layer states the size of the device")
	}
	if err != nil {
		_ = im.Close()
		return nil, fmt.Errorf("open image: %w", err)
	}
	return im, nil
}

// Writable makes an image that reads from upper first and writes to it. The
// image takes upper over. It is to be called before the image is used.
func (im *Image) Writable(upper *lsmt.Writable) {
	upper.SetBelow(below{im})
	im.upper = upper
}

// Size returns the size of the device in bytes.
func (im *Image) Size() int64 { return im.size }

// Opened is the zero of [ReadEvent].At.
func (im *Image) Opened() time.Time { return im.opened }

// Layers describes the layers, bottom first.
func (im *Image) Layers() []LayerInfo {
	infos := make([]LayerInfo, len(im.layers))
	for i, l := range im.layers {
		infos[i] = l.info
	}
	return infos
}

// SetObserver makes o see every demand read from now on; nil ends it.
func (im *Image) SetObserver(o Observer) {
	if o == nil {
		im.observer.Store(nil)
		return
	}
	im.observer.Store(&o)
}

// Close ends reads that wait, with an error, and releases layers and blobs. It
// does not wait for a registry: only for the disk, and at most 2 s for fetches
// to notice that they are cancelled.
func (im *Image) Close() error {
	im.closing.Do(func() {
		var errs []error
		if im.upper != nil {
			errs = append(errs, im.upper.Close())
		}
		errs = append(errs, closeLayers(im.layers))
		if err := errors.Join(errs...); err != nil {
			im.err = fmt.Errorf("close image: %w", err)
		}
	})
	return im.err
}

// Extents gives the segments behind [off, off+n) of the device, holes left
// out. Segments of a writable upper layer have the layer number len(Layers()).
func (im *Image) Extents(off, n int64) []lsmt.Segment {
	var segs []lsmt.Segment
	for _, s := range im.lookup(nil, off, min(n, im.size-off)) {
		if s.Kind != lsmt.Hole {
			segs = append(segs, s)
		}
	}
	return segs
}

// BlobRange gives the blob bytes behind [off, off+n) of layer space.
func (im *Image) BlobRange(layer int, off, n int64) (blobOff, blobLen int64) {
	return im.layers[layer].blobRange(off, n)
}

// lookup resolves device space to layers, the upper one included.
func (im *Image) lookup(dst []lsmt.Segment, off, n int64) []lsmt.Segment {
	if im.upper == nil {
		return im.index.Lookup(dst, off, n)
	}
	var buf [16]lsmt.Segment
	for _, s := range im.upper.Lookup(buf[:0], off, n) {
		if s.Kind == lsmt.Hole {
			dst = im.index.Lookup(dst, s.Off, s.Len)
			continue
		}
		s.Layer = len(im.layers)
		dst = append(dst, s)
	}
	return dst
}

// scratch is what one read needs beside the caller's buffer.
type scratch struct {
	segs  []lsmt.Segment
	waits []segWait
}

// segWait is a data segment whose blob bytes are not on the node.
type segWait struct {
	seg  int
	b    *Blob
	off  int64
	n    int64
	ws   []waiting
	from Origin
	wait time.Duration
}

// disclaim gives up what is not waited for after all.
func (s *scratch) disclaim() {
	for _, w := range s.waits {
		disclaim(w.ws)
	}
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// ReadAt reads the device. off and len(p) need not be aligned.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > im.size {
		return 0, fmt.Errorf("read at %d: outside of the device of %d bytes", off, im.size)
	}
	short := int64(len(p)) > im.size-off
	if short {
		p = p[:im.size-off]
	}
	if err := im.readWith(im.lookup, p, off); err != nil {
		return 0, fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// readWith reads what lookup says is at off.
func (im *Image) readWith(lookup func([]lsmt.Segment, int64, int64) []lsmt.Segment, p []byte, off int64) error {
	s := scratches.Get().(*scratch)
	defer func() {
		s.segs, s.waits = s.segs[:0], s.waits[:0]
		scratches.Put(s)
	}()
	lo := off &^ (lsmt.SectorSize - 1)
	hi := (off + int64(len(p)) + lsmt.SectorSize - 1) &^ (lsmt.SectorSize - 1)
	s.segs = lookup(s.segs[:0], lo, min(hi, im.size)-lo)
	start := time.Since(im.opened)
	if err := im.gather(s); err != nil {
		return err
	}
	im.report(s, start)
	for _, g := range s.segs {
		if err := im.copySegment(p, off, g); err != nil {
			return err
		}
	}
	return nil
}

// gather brings the blob bytes of every segment onto the node: it starts what
// has to be fetched for all of them, then waits.
func (im *Image) gather(s *scratch) error {
	for i, g := range s.segs {
		if g.Kind != lsmt.Data || g.Layer >= len(im.layers) {
			continue
		}
		l := im.layers[g.Layer]
		if l.blob == nil {
			continue
		}
		bo, bn := l.blobRange(g.LayerOff, g.Len)
		if l.blob.has(bo, bn) {
			continue
		}
		ws, err := l.blob.begin(nil, bo, bn)
		if err != nil {
			disclaim(ws)
			s.disclaim()
			return err
		}
		s.waits = append(s.waits, segWait{seg: i, b: l.blob, off: bo, n: bn, ws: ws})
	}
	if len(s.waits) == 0 {
		return nil
	}
	defer im.stall.enter()()
	for i := range s.waits {
		w := &s.waits[i]
		begin := time.Now()
		from, err := w.b.finish(w.ws, w.off, w.n, newPatience(w.b.cache.o.Outage))
		w.from, w.wait, w.ws = from, time.Since(begin), nil
		if err != nil && !errors.Is(err, errNotKept) { // which is read around the cache
			s.disclaim()
			return err
		}
	}
	return nil
}

// report counts the data segments and tells the observer.
func (im *Image) report(s *scratch, start time.Duration) {
	o := im.observer.Load()
	waits := s.waits
	var wait time.Duration
	remote := false
	for i, g := range s.segs {
		if g.Kind != lsmt.Data || g.Layer >= len(im.layers) {
			continue
		}
		e := ReadEvent{At: start, Layer: g.Layer, Off: g.LayerOff, Len: g.Len}
		l := im.layers[g.Layer]
		if l.blob != nil || o != nil {
			e.BlobOff, e.BlobLen = l.blobRange(g.LayerOff, g.Len)
		}
		if l.blob != nil {
			remote = true
			e.Origin = l.blob.demanded(e.BlobOff, e.BlobLen)
			l.noteRead(g.LayerOff, g.Len)
			if len(waits) > 0 && waits[0].seg == i {
				e.Origin, e.Wait = waits[0].from, waits[0].wait
				wait += e.Wait // one was waited for after the other
				waits = waits[1:]
			}
		}
		im.counts.add(e)
		if o != nil {
			(*o).ObserveRead(e)
		}
	}
	if remote {
		im.counts.latency.add(wait)
	}
}

// demanded notes the demand for chunks that are here and says who brought
// them.
func (b *Blob) demanded(off, n int64) Origin {
	from, to := b.chunksOf(off, n)
	to = min(to, b.chunks)
	if !b.wanted.hasAll(from, to) {
		b.wanted.addAll(from, to)
		b.touch(off, n)
	}
	if off >= b.tailFrom.Load() || b.ahead.next(from, to, true) < to {
		return FromPrefetch
	}
	return FromCache
}

// copySegment fills the part of p, read at off, that a segment covers.
func (im *Image) copySegment(p []byte, off int64, g lsmt.Segment) error {
	lo, hi := max(g.Off, off), min(g.Off+g.Len, off+int64(len(p)))
	if lo >= hi {
		return nil
	}
	dst := p[lo-off : hi-off]
	switch {
	case g.Kind != lsmt.Data:
		clear(dst)
		return nil
	case g.Layer == len(im.layers):
		return im.readUpper(dst, lo)
	}
	return im.layers[g.Layer].readFull(dst, g.LayerOff+lo-g.Off)
}

// readUpper reads the upper layer, which knows whole sectors only.
func (im *Image) readUpper(p []byte, off int64) error {
	from := off &^ (lsmt.SectorSize - 1)
	to := (off + int64(len(p)) + lsmt.SectorSize - 1) &^ (lsmt.SectorSize - 1)
	if from == off && to == off+int64(len(p)) {
		_, err := im.upper.ReadAt(p, off)
		return err
	}
	whole := make([]byte, to-from)
	if _, err := im.upper.ReadAt(whole, from); err != nil {
		return err
	}
	copy(p, whole[off-from:])
	return nil
}

// attempts is how often a block that turns out to be bad is read.
const attempts = 3

// readFull reads layer space. A bad block of a remote layer is fetched again.
func (l *layer) readFull(p []byte, off int64) error {
	for try := 1; ; try++ {
		n, err := l.readAt(p, off)
		if n == len(p) {
			return nil
		}
		var bad *zfile.CorruptError
		if l.blob == nil || try == attempts || !errors.As(err, &bad) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("layer %s: %w", l.info.Name, err)
		}
		l.blob.cache.o.Log.Warn("bad block, fetching it again", "layer", l.info.Name, "err", bad)
		l.blob.Invalidate(bad.Off, bad.Len)
	}
}

var errReadOnly = fmt.Errorf("image is read-only: %w", errors.ErrUnsupported)

// WriteAt writes to the upper layer; off and len(p) are multiples of
// [lsmt.SectorSize].
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
	if im.upper == nil {
		return 0, errReadOnly
	}
	return im.upper.WriteAt(p, off)
}

// Discard makes [off, off+n) read as zeros.
func (im *Image) Discard(off, n int64) error {
	if im.upper == nil {
		return errReadOnly
	}
	return im.upper.Discard(off, n)
}

// Sync makes what was written durable.
func (im *Image) Sync() error {
	if im.upper == nil {
		return nil
	}
	return im.upper.Sync()
}

// Segments returns the number of segments of the merged index.
func (im *Image) Segments() int { return im.index.Len() }

// Verify reads every layer whole and checks its blocks; of blobs, which it
// downloads, also the digest.
func (im *Image) Verify(ctx context.Context) error {
	if err := im.Complete(ctx, nil); err != nil {
		return err
	}
	for i, l := range im.layers {
		if l.z == nil {
			continue
		}
		if err := l.z.Verify(ctx); err != nil {
			return fmt.Errorf("layer %d (%s): %w", i, l.info.Name, err)
		}
	}
	return nil
}
