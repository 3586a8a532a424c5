package zfile

import (
	"context"
	"runtime"
	"sync"
)

// Verify reads the whole ZFile and checks all that can be checked: the tar
// header if there is one, header and trailer and that they agree, and that every
// block has its checksum and decodes to its length. Of several faults it reports
// the first in the blob, as a *CorruptError. It decodes on all processors and
// stops early when ctx is done.
func (r *Reader) Verify(ctx context.Context) error {
	if err := r.verifyMeta(); err != nil {
		return err
	}
	return r.verifyBlocks(ctx)
}

func (r *Reader) verifyMeta() error {
	f := &r.info
	if f.Base > 0 {
		off, n, _, err := Unwrap(r.src, r.blob)
		if err != nil {
			return err
		}
		if off != f.Base || n != f.Length {
			return &CorruptError{Off: 0, Len: f.Base, What: "tar header", Reason: "member is not the ZFile"}
		}
	}
	h, err := readHeader(r.src, f.Base, "header")
	if err != nil {
		return err
	}
	if !h.isHeader() || !h.sameFile(&r.meta) || h.complete() && !h.sameIndex(&r.meta) {
		return &CorruptError{Off: f.Base, Len: headerSize, What: "header", Reason: "does not agree with the trailer"}
	}
	off := f.IndexOffset + f.IndexLength
	t, err := readHeader(r.src, off, "trailer")
	if err != nil {
		return err
	}
	if !t.isTrailer() || !t.sameFile(&r.meta) || !t.sameIndex(&r.meta) {
		return &CorruptError{Off: off, Len: headerSize, What: "trailer", Reason: "does not agree with the header"}
	}
	return nil
}

// verifyChunk is how much a worker decodes at a time.
const verifyChunk = 1 << 20

// verifyBlocks hands out chunks in order, so that all before the first bad one
// are looked at.
func (r *Reader) verifyBlocks(ctx context.Context) error {
	var (
		mu       sync.Mutex // guards what follows
		next     int64
		firstBad error
		badOff   int64
		wg       sync.WaitGroup
	)
	take := func() (int64, bool) {
		mu.Lock()
		defer mu.Unlock()
		if next >= r.info.Size || firstBad != nil || ctx.Err() != nil {
			return 0, false
		}
		off := next
		next += verifyChunk
		return off, true
	}
	report := func(off int64, err error) {
		mu.Lock()
		defer mu.Unlock()
		if firstBad == nil || off < badOff {
			firstBad, badOff = err, off
		}
	}
	for range min(int64(runtime.GOMAXPROCS(0)), r.info.Size/verifyChunk+1) {
		wg.Go(func() {
			p := make([]byte, min(verifyChunk, r.info.Size))
			for off, ok := take(); ok; off, ok = take() {
				if _, err := r.read(p[:min(verifyChunk, r.info.Size-off)], off); err != nil {
					report(off, err)
				}
			}
		})
	}
	wg.Wait()
	if firstBad != nil {
		return firstBad
	}
	return ctx.Err()
}
