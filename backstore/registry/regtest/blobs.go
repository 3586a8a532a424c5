package regtest

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// blobs are the registry's blobs as files, named by their digest. The library's
// own disk handler hashes the whole file for each request, a ranged one too,
// and leaves failed uploads behind.
type blobs struct {
	dir, tmp string
}

var (
	_ registry.BlobStatHandler   = (*blobs)(nil)
	_ registry.BlobPutHandler    = (*blobs)(nil)
	_ registry.BlobDeleteHandler = (*blobs)(nil)
)

// path is safe: a v1.Hash that was parsed has a known algorithm and hex digits.
func (b *blobs) path(h v1.Hash) string { return filepath.Join(b.dir, h.Algorithm+"-"+h.Hex) }

func notFound(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return registry.ErrNotFound
	}
	return err
}

func (b *blobs) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(b.path(h))
	if err != nil {
		return nil, notFound(err)
	}
	return f, nil
}

func (b *blobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	fi, err := os.Stat(b.path(h))
	if err != nil {
		return 0, notFound(err)
	}
	return fi.Size(), nil
}

// Put keeps the bytes if they have the digest, which rc checks at its end.
func (b *blobs) Put(_ context.Context, _ string, h v1.Hash, rc io.ReadCloser) error {
	f, err := os.CreateTemp(b.tmp, "blob-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, rc)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), b.path(h))
}

func (b *blobs) Delete(_ context.Context, _ string, h v1.Hash) error {
	return notFound(os.Remove(b.path(h)))
}
