package device

import (
	"errors"
	"io"
)

// backend gives a [Backend] all methods that the FUSE server calls.
type backend struct {
	io.ReaderAt
	writer    io.WriterAt
	discarder Discarder
	syncer    Syncer
}

func newBackend(b Backend) *backend {
	be := &backend{ReaderAt: b}
	be.writer, _ = b.(io.WriterAt)
	be.discarder, _ = b.(Discarder)
	be.syncer, _ = b.(Syncer)
	return be
}

func (b *backend) WriteAt(p []byte, off int64) (int, error) {
	if b.writer == nil {
		return 0, errors.ErrUnsupported
	}
	return b.writer.WriteAt(p, off)
}

func (b *backend) Discard(off, n int64) error {
	if b.discarder == nil {
		return errors.ErrUnsupported
	}
	return b.discarder.Discard(off, n)
}

func (b *backend) Sync() error {
	if b.syncer == nil {
		return errors.ErrUnsupported
	}
	return b.syncer.Sync()
}
