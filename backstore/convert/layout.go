package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
)

// A layout is an image in an OCI image layout:
// https://github.com/opencontainers/image-spec/blob/main/image-layout.md
// Blobs and the index are written to a temporary file and renamed; the index
// is changed under a lock on the directory.
type layout struct {
	dir, tag string
}

const layoutFile, layoutIndex = ocispec.ImageLayoutFile, ocispec.ImageIndexFile

// newLayout reads DIR[:TAG]; a colon before the last slash belongs to DIR.
func newLayout(s string) (*layout, error) {
	l := &layout{dir: s}
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, '/') {
		l.dir, l.tag = s[:i], s[i+1:]
	}
	if l.dir == "" {
		return nil, fmt.Errorf("%s%s: name a directory: oci:DIR[:TAG]", layoutScheme, s)
	}
	return l, nil
}

func (l *layout) String() string {
	if l.tag == "" {
		return layoutScheme + l.dir
	}
	return layoutScheme + l.dir + ":" + l.tag
}

func (l *layout) blob(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%q: %w", d, err)
	}
	return filepath.Join(l.dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), nil
}

func (l *layout) index() (ocispec.Index, error) {
	var idx ocispec.Index
	p, err := readLimited(filepath.Join(l.dir, layoutIndex))
	if err != nil {
		return idx, err
	}
	if err := json.Unmarshal(p, &idx); err != nil {
		return idx, fmt.Errorf("%s: %w", filepath.Join(l.dir, layoutIndex), err)
	}
	return idx, nil
}

func readLimited(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err == nil && len(p) > maxManifest {
		err = fmt.Errorf("%s: more than %d bytes", path, maxManifest)
	}
	return p, err
}

// Manifest finds the image by its tag; without one, the only image there is.
func (l *layout) Manifest(ctx context.Context, platform ocispec.Platform) (ocispec.Descriptor, []byte, error) {
	fail := func(err error) (ocispec.Descriptor, []byte, error) {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", l, err)
	}
	if _, err := os.Stat(filepath.Join(l.dir, layoutFile)); err != nil {
		return fail(fmt.Errorf("not an OCI image layout: %w", err))
	}
	idx, err := l.index()
	if err != nil {
		return fail(err)
	}
	d, err := l.choose(idx.Manifests)
	if err != nil {
		return fail(err)
	}
	// An index may be nested in an index, but not for ever.
	for range 4 {
		p, err := l.Get(ctx, d)
		if err != nil {
			return fail(err)
		}
		if !isIndex(d.MediaType) {
			return d, p, nil
		}
		var inner ocispec.Index
		if err := json.Unmarshal(p, &inner); err != nil {
			return fail(fmt.Errorf("index %s: %w", d.Digest, err))
		}
		if d, err = choosePlatform(inner.Manifests, platform); err != nil {
			return fail(err)
		}
	}
	return fail(errors.New("indexes nested too deeply"))
}

func (l *layout) choose(manifests []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	var tags []string
	for _, d := range manifests {
		name := d.Annotations[ocispec.AnnotationRefName]
		tags = append(tags, name)
		if l.tag == "" || name == l.tag {
			found = append(found, d)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(manifests) == 0:
		return ocispec.Descriptor{}, errNoImage
	case len(found) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("no image with this tag; there are: %s", strings.Join(tags, " "))
	}
	return ocispec.Descriptor{}, fmt.Errorf("several images: choose one with oci:DIR:TAG; there are: %s", strings.Join(tags, " "))
}

// choosePlatform finds the best manifest of an index for a platform.
func choosePlatform(manifests []ocispec.Descriptor, p ocispec.Platform) (ocispec.Descriptor, error) {
	match := platforms.Only(p)
	best := -1
	var have []string
	for i, d := range manifests {
		switch {
		case d.Platform == nil:
			if len(manifests) == 1 {
				return d, nil
			}
			continue
		case !match.Match(*d.Platform):
			have = append(have, platforms.Format(*d.Platform))
			continue
		}
		if best < 0 || match.Less(*d.Platform, *manifests[best].Platform) {
			best = i
		}
	}
	if best < 0 {
		return ocispec.Descriptor{}, fmt.Errorf("no image for %s; there are: %s", platforms.Format(p), strings.Join(have, " "))
	}
	return manifests[best], nil
}

func (l *layout) Get(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	path, err := l.blob(d.Digest)
	if err != nil {
		return nil, err
	}
	p, err := readLimited(path)
	if err != nil {
		return nil, err
	}
	return p, checkBlob(d, p)
}

// Open returns the blob's file.
func (l *layout) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	path, err := l.blob(d.Digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != d.Size {
		f.Close()
		if err == nil {
			err = fmt.Errorf("%s: %d bytes instead of %d", path, fi.Size(), d.Size)
		}
		return nil, err
	}
	return f, nil
}

// Lower returns the blob's file.
func (l *layout) Lower(d ocispec.Descriptor) (string, backstore.Fetcher, error) {
	path, err := l.blob(d.Digest)
	return path, nil, err
}

// Find looks through the layers of all images of the layout.
func (l *layout) Find(ctx context.Context, keys []string) ([]ocispec.Descriptor, error) {
	idx, err := l.index()
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l, err)
	}
	var best []ocispec.Descriptor
	for _, d := range idx.Manifests {
		if isIndex(d.MediaType) {
			continue
		}
		p, err := l.Get(ctx, d)
		if err != nil {
			continue // somebody else's damage; nothing to reuse there
		}
		if found := matching(p, keys); len(found) > len(best) {
			best = found
		}
	}
	for i, d := range best {
		path, err := l.blob(d.Digest)
		if err != nil {
			return best[:i], nil
		}
		if fi, err := os.Stat(path); err != nil || fi.Size() != d.Size {
			return best[:i], nil
		}
	}
	return best, nil
}

// Remember has nothing to do: Find reads the images themselves.
func (l *layout) Remember(context.Context, []ocispec.Descriptor, int) error { return nil }

func (l *layout) Push(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	path, err := l.blob(d.Digest)
	if err != nil {
		return err
	}
	if fi, err := os.Stat(path); err == nil && fi.Size() == d.Size {
		return nil
	}
	rc, err := open()
	if err != nil {
		return err
	}
	defer rc.Close()
	if err := l.create(); err != nil {
		return err
	}
	if f, ok := rc.(*os.File); ok {
		return placeFile(ctx, path, f) // of this machine: its digest was just computed
	}
	return writeFile(ctx, path, newVerifier(rc, d))
}

// create makes an empty layout where there is nothing yet.
func (l *layout) create() error {
	if err := os.MkdirAll(filepath.Join(l.dir, ocispec.ImageBlobsDir, digest.SHA256.String()), 0o755); err != nil {
		return err
	}
	path := filepath.Join(l.dir, layoutFile)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	p, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return writeFile(context.Background(), path, bytes.NewReader(p))
}

// writeFile writes a file whole or not at all.
func writeFile(ctx context.Context, path string, r io.Reader) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := copyTo(ctx, f, r); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// copyTo copies in pieces, each of which the kernel may copy by itself if both
// are files.
func copyTo(ctx context.Context, f *os.File, r io.Reader) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := io.CopyN(f, r, 16<<20); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// PushManifest adds the manifest to the layout and to its index, in place of
// what has the same tag.
func (l *layout) PushManifest(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	if err := l.Push(ctx, d, opener(raw)); err != nil {
		return err
	}
	unlock, err := lockDir(l.dir)
	if err != nil {
		return err
	}
	defer unlock()
	idx, err := l.index()
	if errors.Is(err, os.ErrNotExist) {
		idx, err = ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}, nil
	}
	if err != nil {
		return err
	}
	if l.tag != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: l.tag}
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(old ocispec.Descriptor) bool {
		tag := old.Annotations[ocispec.AnnotationRefName]
		return tag == l.tag && (tag != "" || old.Digest == d.Digest)
	})
	idx.Manifests = append(idx.Manifests, d)
	p, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	return writeFile(ctx, filepath.Join(l.dir, layoutIndex), bytes.NewReader(p))
}

// lockDir waits for an exclusive lock on a directory.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
}
