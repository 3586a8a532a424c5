package artifact

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

// A Store is the traces in one repository.
type Store struct {
	c   *registry.Client
	ref registry.Reference
}

// New returns the store of the repository of ref. It asks nobody anything.
func New(c *registry.Client, ref string) (*Store, error) {
	r, err := registry.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	return &Store{c: c, ref: r}, nil
}

// PushOptions say how a trace is attached.
type PushOptions struct {
	// Workload is the name. Default: that in the trace, else DefaultWorkload
	// of its arguments.
	Workload string

	// Default marks the trace as the one for workloads without their own. Of
	// several the one attached last counts.
	Default bool

	// Created is the time of attaching. Default: now.
	Created time.Time
}

func (o *PushOptions) filled(t *tracefmt.Trace) PushOptions {
	var f PushOptions
	if o != nil {
		f = *o
	}
	if f.Workload == "" {
		f.Workload = t.Workload
	}
	if f.Workload == "" {
		f.Workload = DefaultWorkload(t.Args)
	}
	if f.Created.IsZero() {
		f.Created = time.Now()
	}
	return f
}

// Push attaches a trace to an image, subject being the manifest of the
// platform. It replaces the trace of the same workload; a registry that does
// not allow deletes keeps the old one, but List and Pull pass it over.
func (s *Store) Push(ctx context.Context, subject ocispec.Descriptor, t *tracefmt.Trace, o *PushOptions) (Entry, error) {
	opts := o.filled(t)
	e, err := s.push(ctx, subject, t, &opts)
	if err != nil {
		return Entry{}, fmt.Errorf("attach trace of %s to %s@%s: %w", opts.Workload, s.ref.Name(), subject.Digest, err)
	}
	return e, nil
}

func (s *Store) push(ctx context.Context, subject ocispec.Descriptor, t *tracefmt.Trace, o *PushOptions) (Entry, error) {
	p, err := pack(subject, t, o)
	if err != nil {
		return Entry{}, err
	}
	// What is replaced is listed before the new one is there: two who attach
	// the same workload at once can then not remove each other's.
	old, err := s.upload(ctx, subject.Digest, p, o.Workload)
	if err != nil {
		return Entry{}, err
	}
	if err := s.c.PutReferrer(ctx, s.ref.Name(), p.manifest, p.raw); err != nil {
		return Entry{}, err
	}
	tags := []string{Tag(subject.Digest, o.Workload)}
	if o.Default || slices.ContainsFunc(old, func(e Entry) bool { return e.Default }) {
		tags = append(tags, DefaultTag(subject.Digest)) // so that it is, or no longer
	}
	for _, tag := range tags {
		if err := s.c.Push(ctx, s.ref.WithTag(tag).String(), p.manifest, opener(p.raw)); err != nil {
			return Entry{}, err
		}
	}
	d := p.manifest
	d.Annotations = p.annotations
	return entry(d), s.remove(ctx, subject.Digest, old, d.Digest)
}

// upload sends the blobs, and meanwhile looks which traces p replaces.
func (s *Store) upload(ctx context.Context, subject digest.Digest, p *packed, workload string) (old []Entry, err error) {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return s.c.Push(gctx, s.ref.Name(), p.layer, opener(p.blob))
	})
	g.Go(func() error {
		return s.c.Push(gctx, s.ref.Name(), ocispec.DescriptorEmptyJSON, opener(ocispec.DescriptorEmptyJSON.Data))
	})
	g.Go(func() (err error) {
		old, err = s.list(gctx, subject)
		return err
	})
	err = g.Wait()
	return slices.DeleteFunc(old, func(e Entry) bool { return e.Workload != workload }), err
}

func opener(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

// remove deletes entries, but not the manifest keep, as far as the registry
// allows deletes.
func (s *Store) remove(ctx context.Context, subject digest.Digest, entries []Entry, keep digest.Digest) error {
	for _, e := range entries {
		if e.Descriptor.Digest == keep {
			continue
		}
		err := s.c.DeleteReferrer(ctx, s.ref.Name(), subject, e.Descriptor.Digest)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return nil
}

// A packed trace is what is pushed.
type packed struct {
	blob        []byte
	layer       ocispec.Descriptor
	raw         []byte // the manifest
	manifest    ocispec.Descriptor
	annotations map[string]string
}

func pack(subject ocispec.Descriptor, t *tracefmt.Trace, o *PushOptions) (*packed, error) {
	if err := checkAttachable(t); err != nil {
		return nil, err
	}
	if err := checkWorkload(o.Workload); err != nil {
		return nil, err
	}
	c := tracefmt.Trace{Header: t.Header, Events: t.Events, End: t.End}
	c.Workload = o.Workload
	c.Compact()
	var blob bytes.Buffer
	if err := tracefmt.Encode(&blob, &c); err != nil {
		return nil, err
	}
	if blob.Len() > maxBlob {
		return nil, fmt.Errorf("trace of %d bytes, compressed: at most %d; record with a shorter time", blob.Len(), maxBlob)
	}
	p := &packed{blob: blob.Bytes(), annotations: annotations(&c, o)}
	return p, p.build(subject)
}

// checkAttachable tells whether t can be of use to an image.
func checkAttachable(t *tracefmt.Trace) error {
	switch {
	case len(t.Events) == 0:
		return errors.New("the trace has no events")
	case t.Space == tracefmt.DeviceSpace:
		return errors.New("the trace is of a device: map it to the image's layers first")
	case len(t.Layers) == 0:
		return errors.New("the trace does not know its layers: import it together with its image")
	}
	return nil
}

func (p *packed) build(subject ocispec.Descriptor) (err error) {
	p.layer = ocispec.Descriptor{MediaType: LayerType, Digest: digest.FromBytes(p.blob), Size: int64(len(p.blob))}
	layer := p.layer
	if len(p.blob) <= maxInline {
		layer.Data = p.blob
	}
	p.raw, err = json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{layer},
		Subject:      &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations:  p.annotations,
	})
	p.manifest = ocispec.Descriptor{
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Digest:       digest.FromBytes(p.raw),
		Size:         int64(len(p.raw)),
	}
	return err
}

// List returns the traces of an image, one for each workload, sorted by name.
func (s *Store) List(ctx context.Context, subject digest.Digest) ([]Entry, error) {
	all, err := s.list(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("list traces of %s@%s: %w", s.ref.Name(), subject, err)
	}
	return latest(all), nil
}

// list returns all traces that refer to subject, replaced ones too.
func (s *Store) list(ctx context.Context, subject digest.Digest) ([]Entry, error) {
	ds, err := s.c.Referrers(ctx, s.ref.Name(), subject, ArtifactType)
	if err != nil {
		return nil, err
	}
	ds = ds[:min(len(ds), maxEntries)]
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range ds {
		if ds[i].Annotations[AnnotationWorkload] == "" {
			g.Go(func() error { return s.fill(gctx, &ds[i]) })
		}
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var all []Entry
	for _, d := range ds {
		if e := entry(d); checkWorkload(e.Workload) == nil {
			all = append(all, e)
		}
	}
	return all, nil
}

// fill gets the annotations from the manifest, where the list lacks them.
func (s *Store) fill(ctx context.Context, d *ocispec.Descriptor) error {
	raw, err := s.c.Get(ctx, s.ref.Name(), *d)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if json.Unmarshal(raw, &m) == nil {
		d.Annotations = m.Annotations
	}
	return nil
}

// Delete removes the trace of a workload. Without one the error is
// os.ErrNotExist; a registry that does not allow it gives
// errors.ErrUnsupported.
func (s *Store) Delete(ctx context.Context, subject digest.Digest, workload string) error {
	if err := s.delete(ctx, subject, workload); err != nil {
		return fmt.Errorf("delete trace of %s of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return nil
}

func (s *Store) delete(ctx context.Context, subject digest.Digest, workload string) error {
	if err := subject.Validate(); err != nil {
		return err
	}
	digests, err := s.digests(ctx, subject, workload)
	if err != nil {
		return err
	}
	if len(digests) == 0 {
		return os.ErrNotExist
	}
	for _, d := range digests {
		err := s.c.DeleteReferrer(ctx, s.ref.Name(), subject, d)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for _, tag := range []string{Tag(subject, workload), DefaultTag(subject)} {
		if err := s.untag(ctx, tag, workload); err != nil {
			return err
		}
	}
	return nil
}

// untag removes a tag, if it is of a trace of the workload. Most registries have
// dropped it together with its manifest.
func (s *Store) untag(ctx context.Context, tag, workload string) error {
	m, err := s.c.ManifestByTag(ctx, s.ref.Name(), tag)
	if errors.Is(err, os.ErrNotExist) || err == nil && checkIsOf(&m, workload) != nil {
		return nil
	}
	if err := s.c.Delete(ctx, s.ref.WithTag(tag).String()); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// digests are the manifests of a workload's traces, listed and tagged.
func (s *Store) digests(ctx context.Context, subject digest.Digest, workload string) ([]digest.Digest, error) {
	all, err := s.list(ctx, subject)
	if err != nil {
		return nil, err
	}
	var digests []digest.Digest
	for _, e := range all {
		if e.Workload == workload {
			digests = append(digests, e.Descriptor.Digest)
		}
	}
	m, err := s.tagged(ctx, subject, Tag(subject, workload))
	if errors.Is(err, os.ErrNotExist) {
		return digests, nil
	}
	if err == nil {
		err = checkIsOf(m, workload)
	}
	if err == nil && !slices.Contains(digests, m.Descriptor.Digest) {
		digests = append(digests, m.Descriptor.Digest)
	}
	return digests, err
}
