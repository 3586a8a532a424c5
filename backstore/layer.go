package backstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

// What the first request for a remote layer asks for where its source does not
// say: enough of its tail for the ZFile index (4 bytes for each block: 1/450 of
// a blob of lz4 blocks of 4 KiB that became 40 % smaller, 1/1,000 with zstd and
// 16 KiB), the LSMT index before it (some 30 entries for a layer that a file
// system has written) and the end of the tar. A blob of up to wholeBlob comes
// whole: that costs less than another round trip.
const (
	tailBase  = 16 << 10
	tailShare = 256
	wholeBlob = 384 << 10
)

// A LayerSource is where a layer of an [Image] is read from: the file at Path,
// or Blob, which the image closes.
type LayerSource struct {
	Digest digest.Digest // of the blob; may be empty for a file
	Path   string
	Blob   *Blob
	// Tail is how many bytes at the end of Blob hold what opening it reads; 0
	// where that is not known. A wrong number costs a request.
	Tail int64
}

// LayerInfo describes an open layer.
type LayerInfo struct {
	Digest  digest.Digest // of the blob; empty where it is not known
	Size    int64         // of the blob, in bytes
	Decoded int64         // size of layer space: the LSMT file, in bytes
	Name    string        // digest or path, for messages
	Codec   string        // "lz4 4 KiB", "none"
}

// layer is one open layer of an image.
type layer struct {
	info LayerInfo
	blob *Blob    // nil for a file
	file *os.File // nil for a blob
	z    *zfile.Reader
	// opening is what raw reads, where that is a blob.
	opening *opening
	base    int64       // where a bare LSMT file starts in the blob
	raw     io.ReaderAt // layer space
	sealed  *lsmt.Layer
}

// openLayers opens all sources at once, bottom first.
func openLayers(ctx context.Context, sources []LayerSource) ([]*layer, error) {
	layers := make([]*layer, len(sources))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(lsmt.MaxLayers)
	for i, s := range sources {
		g.Go(func() error {
			l, err := openLayer(ctx, s)
			if err != nil {
				return fmt.Errorf("open layer %d: %w", i, err)
			}
			layers[i] = l
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		for i, l := range layers {
			if l != nil {
				_ = l.close()
			} else if b := sources[i].Blob; b != nil {
				_ = b.Close()
			}
		}
		return nil, err
	}
	return layers, nil
}

// openLayer takes the source over only when it succeeds.
func openLayer(ctx context.Context, s LayerSource) (*layer, error) {
	l := &layer{blob: s.Blob, info: LayerInfo{Digest: s.Digest}}
	var at io.ReaderAt
	if s.Blob != nil {
		l.info.Digest, l.info.Size = s.Blob.digest, s.Blob.size
		l.info.Name = string(s.Blob.digest)
		l.opening = &opening{b: s.Blob}
		at = l.opening
		if err := s.Blob.fetchTail(ctx, s.Tail); err != nil {
			return nil, fmt.Errorf("%s: %w", l.info.Name, err)
		}
	} else {
		f, err := os.Open(s.Path)
		if err != nil {
			return nil, err
		}
		fi, err := f.Stat()
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		l.file, l.info.Size, l.info.Name = f, fi.Size(), s.Path
		at = f
	}
	err := l.open(at)
	if err != nil && s.Blob != nil {
		err = l.reopen(ctx, s)
	}
	if err == nil && s.Blob != nil {
		l.pin()
	}
	if err != nil {
		if l.file != nil {
			_ = l.file.Close()
		}
		return nil, fmt.Errorf("%s: %w", l.info.Name, err)
	}
	return l, nil
}

// reopen opens a remote layer with bytes that are fetched anew: those in the
// cache were bad. They must not stay there for the next opening either.
func (l *layer) reopen(ctx context.Context, s LayerSource) error {
	s.Blob.Invalidate(0, s.Blob.size)
	err := s.Blob.fetchTail(ctx, s.Tail)
	if err == nil {
		err = l.open(l.opening)
	}
	if err != nil {
		s.Blob.Invalidate(0, s.Blob.size)
	}
	return err
}

// open finds out what the blob is: a ZFile or a bare LSMT file, each with or
// without the tar wrapper.
func (l *layer) open(at io.ReaderAt) error {
	z, err := zfile.Open(at, l.info.Size)
	if err == nil {
		i := z.Info()
		l.z, l.raw, l.info.Decoded = z, z, z.Size()
		l.info.Codec = fmt.Sprintf("%s %d KiB", i.Algo, i.BlockSize>>10)
	} else {
		if isZ, e := zfile.IsZFile(at, l.info.Size); e != nil || isZ {
			return err
		}
		off, n, _, e := zfile.Unwrap(at, l.info.Size)
		if e != nil {
			return e
		}
		l.base, l.raw, l.info.Decoded = off, io.NewSectionReader(at, off, n), n
		l.info.Codec = "none"
	}
	l.sealed, err = lsmt.OpenLayer(l.raw, l.info.Decoded)
	return err
}

// Ask begins to fetch what opening the layer reads, and returns at once. Who
// opens it, and who prefetches, meets that.
func (s LayerSource) Ask() {
	b := s.Blob
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	from, to := b.chunksOf(b.size-b.tail(s.Tail), b.tail(s.Tail))
	to = min(to, b.chunks)
	if first := b.nextMissing(from, to); first < to {
		b.tailFrom.Store(first * b.chunk)
		b.start(newFlight(b, first*b.chunk, min(b.nextHeld(first, to)*b.chunk, b.size), Demand))
	}
}

// tail is how many bytes at the end of the blob opening the layer asks for.
func (b *Blob) tail(known int64) int64 {
	n := b.size/tailShare + tailBase
	if known > 0 {
		n = known
	}
	if n > b.size || b.size <= wholeBlob {
		n = b.size
	}
	return n
}

// fetchTail asks for what opening a layer reads, in one request.
func (b *Blob) fetchTail(ctx context.Context, known int64) error {
	n := b.tail(known)
	if n == 0 || b.has(b.size-n, n) {
		return ctx.Err()
	}
	b.tailFrom.Store(min(b.tailFrom.Load(), b.size-n))
	// A running fetch is not tied to ctx: other openings may share it.
	done := make(chan error, 1)
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		_, err := b.ensureExact(b.size-n, n, newPatience(b.cache.o.RetryFor))
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// blobRange gives the blob bytes behind [off, off+n) of layer space.
func (l *layer) blobRange(off, n int64) (int64, int64) {
	if l.z != nil {
		return l.z.CompressedRange(off, n)
	}
	return l.base + off, n
}

// pin keeps what opening the layer reads, so that it can be opened again while
// its registry is away.
func (l *layer) pin() {
	off, _ := l.sealed.IndexRange() // the trailer is behind it
	at, _ := l.blobRange(off, l.info.Decoded-off)
	l.blob.pin(at, l.blob.size)
	if l.z == nil { // a bare LSMT file is told by its beginning
		l.blob.pin(0, l.base+1)
	}
}

// opening reads a blob for one that opens it, with the patience of that until
// it is done.
type opening struct {
	b    *Blob
	done atomic.Bool
}

func (o *opening) ReadAt(p []byte, off int64) (int, error) {
	if o.done.Load() {
		return o.b.ReadAt(p, off)
	}
	return o.b.readAt(p, off, o.b.cache.o.RetryFor)
}

// settle ends the opening of the layers.
func (im *Image) settle() {
	for _, l := range im.layers {
		if l.opening != nil {
			l.opening.done.Store(true)
		}
	}
}

// closeLayers closes all at once.
func closeLayers(layers []*layer) error {
	errs := make([]error, len(layers))
	var wg sync.WaitGroup
	for i, l := range layers {
		wg.Go(func() { errs[i] = l.close() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (l *layer) close() error {
	if l.file != nil {
		return l.file.Close()
	}
	return l.blob.Close()
}

// AnnotationTail is the annotation of a layer's descriptor that gives
// [LayerSource].Tail, in decimal.
const AnnotationTail = "dev.reprise.tail"

// TailOf returns how many bytes at the end of a layer's blob, of size bytes,
// are read when the layer is opened.
func TailOf(blob io.ReaderAt, size int64) (int64, error) {
	l := &layer{info: LayerInfo{Size: size}}
	if err := l.open(blob); err != nil {
		return 0, err
	}
	off, _ := l.sealed.IndexRange() // the trailer is behind it
	at, _ := l.blobRange(off, l.info.Decoded-off)
	return size - at, nil
}
