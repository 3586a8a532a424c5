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

	// Created is the time of attaching. Default: now, and later than that of the
	// trace that is replaced.
	Created time.Time

	// New refuses to replace a trace: where the workload has one, the error is
	// os.ErrExist.
	New bool
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
	if err := errors.Join(checkAttachable(t), checkWorkload(o.Workload)); err != nil {
		return Entry{}, err
	}
	// What is replaced is listed before the new one is there: two who attach
	// the same workload at once can then not remove each other's.
	old, err := s.replaced(ctx, subject.Digest, o)
	if err != nil {
		return Entry{}, err
	}
	if o.Created.IsZero() {
		o.Created = after(old)
	}
	p, err := pack(subject, t, o)
	if err != nil {
		return Entry{}, err
	}
	if err := s.upload(ctx, p); err != nil {
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

// replaced lists what is of the workload.
func (s *Store) replaced(ctx context.Context, subject digest.Digest, o *PushOptions) ([]Entry, error) {
	all, err := s.list(ctx, subject)
	if err != nil {
		return nil, err
	}
	old := slices.DeleteFunc(all, func(e Entry) bool { return e.Workload != o.Workload })
	if !o.New {
		return old, nil
	}
	there := len(latest(slices.Clone(old))) > 0
	if !there {
		m, err := s.tagged(ctx, subject, Tag(subject, o.Workload))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		there = err == nil && checkIsOf(m, o.Workload) == nil
	}
	if there {
		return nil, fmt.Errorf("it has one: %w", os.ErrExist)
	}
	return old, nil
}

// after is now, or a moment after the newest of the entries: another machine's
// clock may be ahead.
func after(old []Entry) time.Time {
	now := time.Now()
	for _, e := range old {
		if !e.Created.Before(now) {
			now = e.Created.Add(1)
		}
	}
	return now
}

// upload sends the blobs.
func (s *Store) upload(ctx context.Context, p *packed) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.c.Push(ctx, s.ref.Name(), p.layer, opener(p.blob)) })
	g.Go(func() error { return s.pushEmpty(ctx) })
	return g.Wait()
}

func (s *Store) pushEmpty(ctx context.Context) error {
	return s.c.Push(ctx, s.ref.Name(), ocispec.DescriptorEmptyJSON, opener(ocispec.DescriptorEmptyJSON.Data))
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
	p := &packed{
		blob:        blob.Bytes(),
		layer:       ocispec.Descriptor{MediaType: LayerType, Digest: digest.FromBytes(blob.Bytes()), Size: int64(blob.Len())},
		annotations: annotations(&c, o),
	}
	layer := p.layer
	if len(p.blob) <= maxInline {
		layer.Data = p.blob
	}
	return p, p.build(subject, layer)
}

// packGone is the manifest that takes a workload off the list.
func packGone(subject ocispec.Descriptor, workload string, created time.Time) (*packed, error) {
	p := &packed{annotations: map[string]string{
		ocispec.AnnotationCreated: created.UTC().Format(time.RFC3339Nano),
		AnnotationWorkload:        workload,
		AnnotationRemoved:         "true",
	}}
	return p, p.build(subject, ocispec.DescriptorEmptyJSON)
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

func (p *packed) build(subject, layer ocispec.Descriptor) (err error) {
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

// List returns the traces of an image, one for each workload, sorted by name. One
// at most is the default. Those that a list of referrers has lost it finds by their tags, where the
// registry lists tags.
func (s *Store) List(ctx context.Context, subject digest.Digest) ([]Entry, error) {
	all, err := s.listTagged(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("list traces of %s@%s: %w", s.ref.Name(), subject, err)
	}
	all = latest(all)
	if d := defaultOf(all); d != nil {
		for i := range all {
			all[i].Default = &all[i] == d
		}
	}
	return all, nil
}

// listTagged returns all traces that refer to subject or have a tag of it.
func (s *Store) listTagged(ctx context.Context, subject digest.Digest) ([]Entry, error) {
	if err := subject.Validate(); err != nil {
		return nil, err
	}
	var all []Entry
	var tags []string
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		all, err = s.list(gctx, subject)
		return err
	})
	g.Go(func() error {
		tags, _ = s.c.Tags(gctx, s.ref.Name(), tagPrefix(subject)) // not all registries do that
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	listed := map[string]bool{DefaultTag(subject): true}
	for _, e := range all {
		listed[Tag(subject, e.Workload)] = true
	}
	tags = slices.DeleteFunc(tags, func(t string) bool { return listed[t] })
	more, err := s.readTags(ctx, subject, tags[:min(len(tags), maxEntries)])
	return append(all, more...), err
}

// readTags returns the entries of traces under tags of their own.
func (s *Store) readTags(ctx context.Context, subject digest.Digest, tags []string) ([]Entry, error) {
	each := make([]Entry, len(tags))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, tag := range tags {
		g.Go(func() error {
			m, err := s.c.ManifestByTag(ctx, s.ref.Name(), tag)
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if m.ArtifactType == ArtifactType && checkSubject(&m, subject) == nil && Tag(subject, m.Annotations[AnnotationWorkload]) == tag {
				each[i] = manifestEntry(&m)
			}
			return nil
		})
	}
	err := g.Wait()
	return slices.DeleteFunc(each, func(e Entry) bool { return checkWorkload(e.Workload) != nil }), err
}

func manifestEntry(m *registry.Manifest) Entry {
	d := m.Descriptor
	d.ArtifactType, d.Annotations = m.ArtifactType, m.Annotations
	e := entry(d)
	if len(m.Layers) > 0 {
		e.Size = m.Layers[0].Size
	}
	return e
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
