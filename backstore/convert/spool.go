package convert

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
)

// A spool is a layer on its way from the source: one goroutine copies it to a
// nameless file, a reader follows behind.
type spool struct {
	f      *os.File
	done   chan struct{}
	cancel context.CancelFunc

	mu     sync.Mutex // guards what follows
	grown  *sync.Cond
	size   int64
	err    error // io.EOF once it is complete
	closed bool
	off    int64 // of the reader; used by it alone
}

// newSpool starts copying; open is called on the new goroutine. ctx stops it.
func newSpool(ctx context.Context, dir string, open func(context.Context) (io.ReadCloser, error)) (*spool, error) {
	f, err := tempFile(dir)
	if err != nil {
		return nil, err
	}
	s := &spool{f: f, done: make(chan struct{})}
	s.grown = sync.NewCond(&s.mu)
	ctx, s.cancel = context.WithCancel(ctx)
	go func() {
		defer close(s.done)
		s.finish(s.fetch(ctx, open))
	}()
	context.AfterFunc(ctx, func() { s.finish(context.Cause(ctx)) })
	return s, nil
}

func (s *spool) fetch(ctx context.Context, open func(context.Context) (io.ReadCloser, error)) error {
	rc, err := open(ctx)
	if err != nil {
		return err
	}
	defer rc.Close()
	buf := make([]byte, 256<<10)
	for off := int64(0); ; {
		n, err := rc.Read(buf)
		if n > 0 {
			if _, err := s.f.WriteAt(buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
			s.grow(off)
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func (s *spool) grow(size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = size
	s.grown.Broadcast()
}

func (s *spool) finish(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.grown.Broadcast()
}

// Read waits for bytes. Where the copying failed it returns that error, behind
// the bytes that had arrived.
func (s *spool) Read(p []byte) (int, error) {
	s.mu.Lock()
	for s.off == s.size && s.err == nil && !s.closed {
		s.grown.Wait()
	}
	size, err, closed := s.size, s.err, s.closed
	s.mu.Unlock()
	if closed {
		return 0, os.ErrClosed
	}
	if s.off == size {
		return 0, err
	}
	n, err := s.f.ReadAt(p[:min(int64(len(p)), size-s.off)], s.off)
	s.off += int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// stop ends the copying and makes Read return os.ErrClosed.
func (s *spool) stop() {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.grown.Broadcast()
}

// Close stops, waits for the copying to end and frees the file. No Read may be
// under way.
func (s *spool) Close() error {
	s.stop()
	<-s.done
	return s.f.Close()
}
