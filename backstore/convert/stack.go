package convert

import (
	"fmt"
	"io"
	"sync"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// A stack is a block device during a conversion: writable layers, the topmost
// of which takes the writes, over the image of the layers that are committed
// already. It is safe for concurrent use.
type stack struct {
	base   io.ReaderAt // nil if there is none
	size   int64       // of base
	layers []*lsmt.Writable

	mu  sync.Mutex // guards err
	err error      // the first failure, which the kernel turns into a plain EIO
}

func (s *stack) top() *lsmt.Writable { return s.layers[len(s.layers)-1] }

// ReadAt reads whole sectors.
func (s *stack) ReadAt(p []byte, off int64) (int, error) {
	if err := s.read(len(s.layers), p, off); err != nil {
		s.fail(err)
		return 0, err
	}
	return len(p), nil
}

// read reads what the n lowest writable layers and the base show.
func (s *stack) read(n int, p []byte, off int64) error {
	if n == 0 {
		return s.readBase(p, off)
	}
	w := s.layers[n-1]
	var buf [8]lsmt.Segment
	for _, g := range w.Lookup(buf[:0], off, int64(len(p))) {
		q := p[g.Off-off:][:g.Len]
		var err error
		switch g.Kind {
		case lsmt.Hole:
			err = s.read(n-1, q, g.Off)
		case lsmt.Zero:
			clear(q)
		default:
			_, err = w.ReadAt(q, g.Off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *stack) readBase(p []byte, off int64) error {
	if s.base == nil || off >= s.size {
		clear(p)
		return nil
	}
	if n := s.size - off; n < int64(len(p)) {
		clear(p[n:])
		p = p[:n]
	}
	n, err := s.base.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return fmt.Errorf("read lower layers: %w", noEOF(err))
}

// WriteAt writes whole sectors to the topmost layer.
func (s *stack) WriteAt(p []byte, off int64) (int, error) {
	n, err := s.top().WriteAt(p, off)
	if err != nil {
		s.fail(err)
	}
	return n, err
}

// Sync does nothing: a layer under construction does not outlive the process.
func (s *stack) Sync() error { return nil }

func (s *stack) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// failure is the first error of any read or write.
func (s *stack) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
