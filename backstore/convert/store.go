package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// A store keeps converted layers on this machine:
//
//	blobs/sha256/HEX    the layers
//	chains/KEY.json     the layers of one chain, bottom first
//
// A layer fits only the very layers that it was made on, so what is kept is
// chains, not single layers. Files appear whole; several processes may use the
// store. The zero store keeps nothing.
type store struct{ dir string }

func (s store) blob(d digest.Digest) string {
	return filepath.Join(s.dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

func (s store) chain(key string) string { return filepath.Join(s.dir, "chains", key+".json") }

// find returns the longest chain that is whole.
func (s store) find(keys []string) []ocispec.Descriptor {
	if s.dir == "" {
		return nil
	}
	for n := len(keys); n > 0; n-- {
		p, err := readLimited(s.chain(keys[n-1]))
		if err != nil {
			continue
		}
		if layers := matching(p, keys[:n]); len(layers) == n && s.haveAll(layers) {
			return layers
		}
	}
	return nil
}

func (s store) haveAll(layers []ocispec.Descriptor) bool {
	for _, d := range layers {
		if !s.has(d) {
			return false
		}
	}
	return true
}

func (s store) has(d ocispec.Descriptor) bool {
	if s.dir == "" {
		return false
	}
	fi, err := os.Stat(s.blob(d.Digest))
	return err == nil && fi.Size() == d.Size
}

// add keeps the blob in f, which may be a nameless file.
func (s store) add(ctx context.Context, d ocispec.Descriptor, f *os.File) error {
	if s.dir == "" || s.has(d) {
		return nil
	}
	file, err := os.Open(fdPath(f)) // with an offset of its own
	if err != nil {
		return err
	}
	defer file.Close()
	return placeFile(ctx, s.blob(d.Digest), file)
}

// remember keeps the chain that ends with the last of layers.
func (s store) remember(ctx context.Context, layers []ocispec.Descriptor) error {
	if s.dir == "" {
		return nil
	}
	p, err := json.Marshal(ocispec.Manifest{Layers: layers})
	if err != nil {
		return err
	}
	path := s.chain(layers[len(layers)-1].Annotations[annotationKey])
	return writeFile(ctx, path, bytes.NewReader(p))
}

// placeFile makes f, from its offset on, the file path: by giving it a name, if
// it has none yet and lies in the same file system, else by copying it.
func placeFile(ctx context.Context, path string, f *os.File) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if fi, err := f.Stat(); err == nil && fi.Sys().(*syscall.Stat_t).Nlink == 0 {
		err := unix.Linkat(unix.AT_FDCWD, fdPath(f), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
		if err == nil || errors.Is(err, unix.EEXIST) {
			return nil
		}
	}
	return writeFile(ctx, path, f)
}

// tempFile makes a file in dir that has no name, so that it goes when it is
// closed, however the process ends.
func tempFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(temporary)")), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, fmt.Errorf("temporary file in %s: %w", dir, err)
	}
	f, err := os.CreateTemp(dir, "reprise-convert-")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// fdPath is a path that leads to an open file, named or not.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
