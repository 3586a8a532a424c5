package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"sort"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxObject is the size that Get reads at most, in bytes, and so that of a
// manifest or config.
const MaxObject = 8 << 20

// maxIndexDepth is how many indexes may stand between a tag and an image.
const maxIndexDepth = 3

var manifestTypes = strings.Join([]string{
	ocispec.MediaTypeImageIndex,
	ocispec.MediaTypeImageManifest,
	images.MediaTypeDockerSchema2ManifestList,
	images.MediaTypeDockerSchema2Manifest,
	"*/*",
}, ", ")

// A Manifest is one image, or one artifact, as the registry has it.
type Manifest struct {
	ocispec.Manifest
	Descriptor ocispec.Descriptor  // of Raw
	Raw        []byte              // not to be changed
	Index      *ocispec.Descriptor // what the reference named, if that is an index
}

// Resolve asks what ref (latest, where it has neither tag nor digest) is: the
// descriptor of a manifest or an index. One request; a Get of the descriptor
// needs no further one.
func (c *Client) Resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, _, err := c.manifest(ctx, r)
	return d, err
}

// Manifest reads the image that ref names, for the platform where ref names an
// index; nil is the platform of this machine. Of a single-platform image it
// costs one request, of an index two, unless that carries the manifest inline.
func (c *Client) Manifest(ctx context.Context, ref string, platform *ocispec.Platform) (Manifest, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return Manifest{}, err
	}
	match := platforms.Default()
	if platform != nil {
		match = platforms.Only(*platform)
	}
	d, raw, err := c.manifest(ctx, r)
	if err != nil {
		return Manifest{}, err
	}
	var index *ocispec.Descriptor
	for range maxIndexDepth {
		if !images.IsIndexType(d.MediaType) {
			break
		}
		if index == nil {
			top := d
			index = &top
		}
		var child ocispec.Descriptor
		if child, err = choose(r.WithDigest(d.Digest), raw, match, platform); err != nil {
			return Manifest{}, err
		}
		if d, raw, err = c.child(ctx, r, child); err != nil {
			return Manifest{}, fmt.Errorf("index %s: %w", index.Digest, err)
		}
	}
	m, err := decodeManifest(r, d, raw)
	m.Index = index
	return m, err
}

// child reads what an index names; of one that carries its data nobody is asked.
func (c *Client) child(ctx context.Context, r Reference, d ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	if raw, ok := inline(d); ok {
		if got, err := describe(http.Header{"Content-Type": {d.MediaType}}, raw, d.Digest); err == nil {
			return got, raw, nil
		}
	}
	return c.manifest(ctx, r.WithDigest(d.Digest))
}

// inline gives the data that a descriptor carries, if it is what it describes.
func inline(d ocispec.Descriptor) ([]byte, bool) {
	if len(d.Data) == 0 || int64(len(d.Data)) != d.Size || d.Digest.Algorithm().FromBytes(d.Data) != d.Digest {
		return nil, false
	}
	return bytes.Clone(d.Data), true
}

// ManifestByTag reads the manifest under a tag in the repository of ref, with
// one request. Without such a tag the error is os.ErrNotExist.
func (c *Client) ManifestByTag(ctx context.Context, ref, tag string) (Manifest, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return Manifest{}, err
	}
	if !tagRE.MatchString(tag) {
		return Manifest{}, fmt.Errorf("%s: %q is not a tag", r.Name(), tag)
	}
	d, raw, err := c.manifest(ctx, r.WithTag(tag))
	if err != nil {
		return Manifest{}, err
	}
	return decodeManifest(r, d, raw)
}

func decodeManifest(r Reference, d ocispec.Descriptor, raw []byte) (Manifest, error) {
	m := Manifest{Descriptor: d, Raw: raw}
	if !images.IsManifestType(d.MediaType) {
		return m, fmt.Errorf("%s@%s: is a %q, not an image manifest", r.Name(), d.Digest, d.MediaType)
	}
	if err := json.Unmarshal(raw, &m.Manifest); err != nil {
		return m, fmt.Errorf("%s@%s: %w", r.Name(), d.Digest, err)
	}
	for _, l := range append(m.Layers, m.Config) {
		if err := checkDescriptor(l); err != nil {
			return m, fmt.Errorf("%s@%s: %w", r.Name(), d.Digest, err)
		}
	}
	return m, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("descriptor %.80q: %w", d.Digest, err)
	}
	if d.Size < 0 {
		return fmt.Errorf("descriptor %s: size %d", d.Digest, d.Size)
	}
	return nil
}

// choose picks the platform's manifest out of an index.
func choose(r Reference, raw []byte, match platforms.MatchComparer, want *ocispec.Platform) (ocispec.Descriptor, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: index: %w", r, err)
	}
	var fit, open []ocispec.Descriptor
	var have []string
	for _, d := range idx.Manifests {
		if checkDescriptor(d) != nil || !images.IsManifestType(d.MediaType) && !images.IsIndexType(d.MediaType) {
			continue
		}
		if d.Platform == nil {
			open = append(open, d)
			continue
		}
		have = append(have, platforms.Format(*d.Platform))
		if match.Match(*d.Platform) {
			fit = append(fit, d)
		}
	}
	sort.SliceStable(fit, func(i, j int) bool { return match.Less(*fit[i].Platform, *fit[j].Platform) })
	if fit = append(fit, open...); len(fit) > 0 {
		return fit[0], nil
	}
	name := platforms.Format(platforms.DefaultSpec())
	if want != nil {
		name = platforms.Format(*want)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s: no image for %s, only for %s: %w",
		r, name, strings.Join(have, ", "), errdefs.ErrNotFound)
}

// manifest reads a manifest or index, by digest from the cache if it can.
func (c *Client) manifest(ctx context.Context, r Reference) (ocispec.Descriptor, []byte, error) {
	if r.Digest != "" {
		if e, ok := c.manifests.get(r.Digest); ok {
			return ocispec.Descriptor{MediaType: e.mediaType, Digest: r.Digest, Size: int64(len(e.raw))}, e.raw, nil
		}
	}
	q := newRequest(r, http.MethodGet, "manifests", r.object())
	if r.Digest == "" {
		q.caps = docker.HostCapabilityResolve
	}
	return c.readManifest(ctx, q, r.Digest)
}

func (c *Client) readManifest(ctx context.Context, q *request, want digest.Digest) (d ocispec.Descriptor, raw []byte, err error) {
	q.header.Set("Accept", manifestTypes)
	q.use = func(_ *host, resp *http.Response) (err error) {
		if raw, err = readSmall(resp); err == nil {
			d, err = describe(resp.Header, raw, want)
		}
		return err
	}
	if err := c.call(ctx, q); err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	c.manifests.put(d.Digest, cached{mediaType: d.MediaType, raw: raw})
	return d, raw, nil
}

// readSmall reads a body of at most MaxObject bytes and closes it.
func readSmall(resp *http.Response) ([]byte, error) {
	defer resp.Body.Close()
	if resp.ContentLength > MaxObject {
		return nil, finalf("%d bytes are too many for a manifest or config: the limit is %d", resp.ContentLength, MaxObject)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxObject+1))
	if err != nil {
		return nil, unexpected(err)
	}
	if len(raw) > MaxObject {
		return nil, finalf("too long for a manifest or config: the limit is %d bytes", MaxObject)
	}
	return raw, nil
}

// describe makes the descriptor of a manifest that was received, and checks it
// against the digest asked for, or else against the one in the header.
func describe(h http.Header, raw []byte, want digest.Digest) (ocispec.Descriptor, error) {
	if want == "" {
		want = digest.Digest(h.Get("Docker-Content-Digest"))
	}
	if want.Validate() != nil {
		want = digest.FromBytes(raw)
	} else if want.Algorithm().FromBytes(raw) != want {
		return ocispec.Descriptor{}, finalf("the bytes received have another digest than %s: the registry or a mirror is damaged", want)
	}
	mediaType, err := manifestType(h.Get("Content-Type"), raw)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: want, Size: int64(len(raw))}, nil
}

// manifestType decides what a document is. One that can be read in two ways is
// refused, as everybody must see the same image in it.
// https://github.com/advisories/GHSA-77vh-xpmg-72qh
func manifestType(header string, raw []byte) (string, error) {
	var doc struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Config    json.RawMessage `json:"config"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return "", finalf("is not a manifest: %w", err)
	}
	if doc.Manifests != nil && (doc.Config != nil || doc.Layers != nil) {
		return "", finalf("is an image and an index at once")
	}
	t, _, _ := mime.ParseMediaType(header)
	switch {
	case doc.MediaType != "":
		return doc.MediaType, nil
	case images.IsManifestType(t) || images.IsIndexType(t):
		return t, nil
	case doc.Manifests != nil:
		return ocispec.MediaTypeImageIndex, nil
	case doc.Config != nil:
		return ocispec.MediaTypeImageManifest, nil
	}
	return "", finalf("is not a manifest: media type %.60q", header)
}

// Get reads a small object: a manifest, an index, a config. Size and digest are
// checked; a descriptor that carries its data is not asked for.
func (c *Client) Get(ctx context.Context, ref string, d ocispec.Descriptor) ([]byte, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	if err := checkDescriptor(d); err != nil {
		return nil, fmt.Errorf("%s: %w", r.Name(), err)
	}
	if d.Size > MaxObject {
		return nil, fmt.Errorf("%s@%s: %d bytes are too many: the limit is %d", r.Name(), d.Digest, d.Size, MaxObject)
	}
	if p, ok := inline(d); ok {
		return p, nil
	}
	var raw []byte
	if isManifest(d) {
		_, raw, err = c.manifest(ctx, r.WithDigest(d.Digest))
		raw = bytes.Clone(raw)
	} else {
		raw, err = c.small(ctx, r, d)
	}
	if err == nil && int64(len(raw)) != d.Size {
		err = fmt.Errorf("%s@%s: has %d bytes, its descriptor says %d", r.Name(), d.Digest, len(raw), d.Size)
	}
	if err != nil {
		return nil, err
	}
	return raw, nil
}

func isManifest(d ocispec.Descriptor) bool {
	return images.IsManifestType(d.MediaType) || images.IsIndexType(d.MediaType)
}

func (c *Client) small(ctx context.Context, r Reference, d ocispec.Descriptor) (raw []byte, err error) {
	q := newRequest(r, http.MethodGet, "blobs", d.Digest.String())
	q.use = func(_ *host, resp *http.Response) error {
		got, err := readSmall(resp)
		if err != nil {
			return err
		}
		if d.Digest.Algorithm().FromBytes(got) != d.Digest {
			return finalf("the bytes received have another digest: the registry or a mirror is damaged")
		}
		raw = got
		return nil
	}
	err = c.call(ctx, q)
	return raw, err
}

// emptyIndex is what a fallback tag starts as.
func emptyIndex() ocispec.Index {
	return ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
}
