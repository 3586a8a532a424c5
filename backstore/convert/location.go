package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry"
)

// A Source is an image that is to be converted. It is safe for concurrent use.
type Source interface {
	// String names the image in messages.
	String() string
	// Manifest returns the image manifest for a platform and its descriptor.
	Manifest(ctx context.Context, platform ocispec.Platform) (ocispec.Descriptor, []byte, error)
	// Get returns a small blob, checked against its descriptor.
	Get(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
	// Open streams a blob. A stream that is not an *os.File ends with an error
	// in place of io.EOF if its bytes are not those of the digest.
	Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
}

// A Dest is where the converted image goes. It is safe for concurrent use.
type Dest interface {
	// String names the image in messages.
	String() string
	// Find returns the layers of an earlier conversion, bottom first: those of
	// the longest prefix of keys for which all blobs are still there. Layer i
	// is annotated with keys[i].
	Find(ctx context.Context, keys []string) ([]ocispec.Descriptor, error)
	// Remember makes known to Find the chains that end with each of layers but
	// the n lowest. The layers are there already.
	Remember(ctx context.Context, layers []ocispec.Descriptor, n int) error
	// Lower tells where ranges of a blob that is there are read: from a file,
	// or from its origin.
	Lower(d ocispec.Descriptor) (path string, origin backstore.Fetcher, err error)
	// Push writes a blob unless it is there. The readers that open makes are
	// closed by Push; a retry opens another one.
	Push(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error
	// PushManifest writes a manifest, under the image's own name.
	PushManifest(ctx context.Context, d ocispec.Descriptor, raw []byte) error
}

// A Location is either.
type Location interface {
	Source
	Dest
}

const layoutScheme = "oci:"

// At returns the image that ref names: oci:DIR[:TAG], an OCI image layout on
// disk, or a reference REGISTRY/NAME[:TAG][@DIGEST], for which client is asked.
func At(ref string, client *registry.Client) (Location, error) {
	if dir, ok := strings.CutPrefix(ref, layoutScheme); ok {
		return newLayout(dir)
	}
	if client == nil {
		return nil, fmt.Errorf("%s: no registry client", ref)
	}
	return newRemote(ref, client)
}

// maxManifest bounds what is read into memory of a manifest or config.
const maxManifest = 8 << 20

// checkBlob compares bytes with their descriptor.
func checkBlob(d ocispec.Descriptor, p []byte) error {
	if int64(len(p)) != d.Size {
		return fmt.Errorf("%s: %d bytes instead of %d", d.Digest, len(p), d.Size)
	}
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("%q: %w", d.Digest, err)
	}
	if got := d.Digest.Algorithm().FromBytes(p); got != d.Digest {
		return fmt.Errorf("%s: the content has digest %s", d.Digest, got)
	}
	return nil
}

// A verifier ends a stream with an error where its bytes are not those that
// the descriptor tells.
type verifier struct {
	io.ReadCloser
	d    ocispec.Descriptor
	n    int64
	hash digest.Verifier
}

func newVerifier(rc io.ReadCloser, d ocispec.Descriptor) *verifier {
	return &verifier{ReadCloser: rc, d: d, hash: d.Digest.Verifier()}
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.ReadCloser.Read(p)
	v.n += int64(n)
	_, _ = v.hash.Write(p[:n])
	switch {
	case v.n > v.d.Size:
		return 0, fmt.Errorf("%s: more than the %d bytes that the manifest says", v.d.Digest, v.d.Size)
	case !errors.Is(err, io.EOF):
	case v.n < v.d.Size:
		err = fmt.Errorf("%s: %d bytes instead of %d: %w", v.d.Digest, v.n, v.d.Size, io.ErrUnexpectedEOF)
	case !v.hash.Verified():
		err = fmt.Errorf("%s: the content has another digest", v.d.Digest)
	}
	return n, err
}

var errNoImage = errors.New("no image manifest")
