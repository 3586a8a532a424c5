package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry"
)

// A remote is an image at a registry.
//
// What has been converted is remembered in the repository itself: each chain
// of layers, from the bottom up to some layer, is the layers of a small
// manifest under the tag reprise-layer-<key of its topmost layer>, which also
// keeps the registry from collecting them.
type remote struct {
	ref    registry.Reference
	client *registry.Client
}

const (
	chainTag      = "reprise-layer-"
	chainArtifact = "application/vnd.reprise.layers.v1"
	askAtOnce     = 16
)

func newRemote(ref string, client *registry.Client) (*remote, error) {
	r, err := registry.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	return &remote{ref: r, client: client}, nil
}

func (r *remote) String() string { return r.ref.String() }

func (r *remote) Manifest(ctx context.Context, platform ocispec.Platform) (ocispec.Descriptor, []byte, error) {
	m, err := r.client.Manifest(ctx, r.String(), &platform)
	return m.Descriptor, m.Raw, err
}

func (r *remote) Get(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return r.client.Get(ctx, r.String(), d)
}

func (r *remote) Open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	return r.client.Open(ctx, r.String(), d)
}

func (r *remote) Lower(d ocispec.Descriptor) (string, backstore.Fetcher, error) {
	b, err := r.client.Blob(r.String(), d)
	return "", b, err
}

// Find looks at the image that is there already, then at the chains.
func (r *remote) Find(ctx context.Context, keys []string) ([]ocispec.Descriptor, error) {
	best, err := r.findAt(ctx, r.object(), keys)
	if err != nil {
		return nil, err
	}
	if len(best) < len(keys) {
		chain, err := r.findChain(ctx, keys, len(best))
		if err != nil {
			return nil, err
		}
		if len(chain) > len(best) {
			best = chain
		}
	}
	return r.present(ctx, best)
}

func (r *remote) object() string {
	if r.ref.Tag == "" {
		return "latest"
	}
	return r.ref.Tag
}

func (r *remote) findAt(ctx context.Context, tag string, keys []string) ([]ocispec.Descriptor, error) {
	m, err := r.client.ManifestByTag(ctx, r.String(), tag)
	if err == nil {
		return matching(m.Raw, keys), nil
	}
	var refused *registry.Error
	if errors.Is(err, os.ErrNotExist) || !errors.As(err, &refused) {
		return nil, nil // nothing there, or something else, such as an index
	}
	return nil, err
}

// findChain asks for all chains longer than n at once.
func (r *remote) findChain(ctx context.Context, keys []string, n int) ([]ocispec.Descriptor, error) {
	found := make([][]ocispec.Descriptor, len(keys))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(askAtOnce)
	for i := n; i < len(keys); i++ {
		g.Go(func() (err error) {
			found[i], err = r.findAt(ctx, tagOf(keys[i]), keys[:i+1])
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i := len(keys) - 1; i >= n; i-- {
		if len(found[i]) == i+1 {
			return found[i], nil
		}
	}
	return nil, nil
}

func tagOf(key string) string { return chainTag + key[:32] }

// present cuts layers at the first whose blob is gone.
func (r *remote) present(ctx context.Context, layers []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	there := make([]bool, len(layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(askAtOnce)
	for i, d := range layers {
		g.Go(func() (err error) {
			there[i], err = r.client.Exists(ctx, r.String(), d)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i := range layers {
		if !there[i] {
			return layers[:i], nil
		}
	}
	return layers, nil
}

func (r *remote) Remember(ctx context.Context, layers []ocispec.Descriptor, n int) error {
	empty := ocispec.DescriptorEmptyJSON
	if n == len(layers) {
		return nil
	}
	if err := r.Push(ctx, empty, opener(empty.Data)); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(askAtOnce)
	for i := n; i < len(layers); i++ {
		g.Go(func() error { return r.pushChain(ctx, layers[:i+1]) })
	}
	return g.Wait()
}

func (r *remote) pushChain(ctx context.Context, layers []ocispec.Descriptor) error {
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: chainArtifact,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       layers,
	})
	if err != nil {
		return err
	}
	tag := tagOf(layers[len(layers)-1].Annotations[annotationKey])
	d := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest,
		Digest:    digest.FromBytes(raw),
		Size:      int64(len(raw)),
	}
	return r.client.Push(ctx, r.ref.WithTag(tag).String(), d, opener(raw))
}

// opener gives the same bytes again and again.
func opener(p []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }
}

func (r *remote) Push(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	return r.client.Push(ctx, r.String(), d, open)
}

func (r *remote) PushManifest(ctx context.Context, d ocispec.Descriptor, raw []byte) error {
	if r.ref.Digest != "" {
		return fmt.Errorf("%s: give the new image a tag, not a digest", r)
	}
	return r.client.Push(ctx, r.ref.WithTag(r.object()).String(), d, opener(raw))
}
