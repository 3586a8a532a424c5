package compare

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A writtenLayer is a layer whose blob is in the layout.
type writtenLayer struct {
	desc    ocispec.Descriptor
	diffID  digest.Digest
	tarSize int64
	files   int
}

// writeDemoLayers writes the layers' blobs, some at a time, largest first so that the last to finish is a small one.
func writeDemoLayers(ctx context.Context, layout string, layers []demoLayer, o *DemoImageOptions) ([]writtenLayer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &demoProgress{report: o.Progress}
	for _, l := range layers {
		p.total += l.size()
	}
	written := make([]writtenLayer, len(layers))
	work := make(chan int)
	var wg sync.WaitGroup
	for range min(o.Concurrency, len(layers)) {
		wg.Go(func() {
			for i := range work {
				if err := written[i].write(ctx, layout, o.Root, layers[i], p); err != nil {
					cancel(fmt.Errorf("layer %d (%s): %w", i, layers[i].name, err))
				}
			}
		})
	}
	for _, i := range bySize(layers) {
		work <- i
	}
	close(work)
	wg.Wait()
	return written, context.Cause(ctx)
}

// write makes the layer's blob: tar, gzip, and both digests in one pass.
func (w *writtenLayer) write(ctx context.Context, layout, root string, l demoLayer, p *demoProgress) (err error) {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	f, err := os.CreateTemp(blobDir(layout), ".layer-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	blob := &countingHash{w: f, h: sha256.New()}
	zw, err := gzip.NewWriterLevel(blob, gzip.BestSpeed)
	if err != nil {
		return err
	}
	plain := &countingHash{w: zw, h: sha256.New()}
	tw := &demoTar{tar.NewWriter(plain), root, p, make([]byte, 256<<10)}
	for _, e := range l.entries {
		if err := tw.add(ctx, e); err != nil {
			return err
		}
		if !e.mode.IsDir() {
			w.files++
		}
	}
	if err := errors.Join(tw.Close(), zw.Close()); err != nil {
		return err
	}
	w.desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: blob.digest(), Size: blob.n}
	w.diffID, w.tarSize = plain.digest(), plain.n
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	return os.Rename(f.Name(), blobPath(layout, w.desc.Digest))
}

// A demoTar writes entries as tar members.
type demoTar struct {
	*tar.Writer
	root string
	p    *demoProgress
	buf  []byte
}

func (t *demoTar) add(ctx context.Context, e demoEntry) error {
	h := &tar.Header{
		Name: e.path, Mode: int64(e.mode.Perm()), Uid: e.uid, Gid: e.gid, ModTime: time.Unix(e.mtime, 0),
		Typeflag: tar.TypeReg, Size: e.size,
	}
	for bit, m := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if e.mode&bit != 0 {
			h.Mode |= m
		}
	}
	switch {
	case e.mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, e.path+"/"
	case e.mode.Type() == fs.ModeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
	case e.hard != "":
		h.Typeflag, h.Linkname = tar.TypeLink, e.hard
	}
	if err := t.WriteHeader(h); err != nil {
		return fmt.Errorf("%s: %w", e.path, err)
	}
	if h.Size == 0 {
		return nil
	}
	if e.data != nil {
		t.p.add(e.size)
		_, err := t.Write(e.data)
		return err
	}
	return t.content(ctx, e)
}

// content copies a file of the machine; it must still have the size that was planned.
func (t *demoTar) content(ctx context.Context, e demoEntry) error {
	name := filepath.Join(t.root, e.path)
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for left := e.size; left > 0; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := io.ReadFull(f, t.buf[:min(left, int64(len(t.buf)))])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%s: it shrank while the image was made; try again", name)
		} else if err != nil {
			return err
		}
		if _, err := t.Write(t.buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
		t.p.add(int64(n))
	}
	return nil
}

// size is how many bytes of content the layer's names stand for.
func (l demoLayer) size() (n int64) {
	for _, e := range l.entries {
		n += e.size
	}
	return n
}

// bySize returns the layers' positions, largest first.
func bySize(layers []demoLayer) []int {
	order := make([]int, len(layers))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(layers[b].size(), layers[a].size()) })
	return order
}

// A demoProgress sums up what all layers report.
type demoProgress struct {
	report func(done, total int64)
	total  int64

	mu   sync.Mutex // guards done and calls of report
	done int64
}

func (p *demoProgress) add(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	p.report(p.done, p.total)
}

// A countingHash passes bytes on, counted and hashed.
type countingHash struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (c *countingHash) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.h.Write(p[:n])
	c.n += int64(n)
	return n, err
}

func (c *countingHash) digest() digest.Digest { return digest.NewDigest(digest.SHA256, c.h) }
