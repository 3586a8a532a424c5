package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

// Pull reads the trace of a workload of an image. Without one the error is
// os.ErrNotExist. A small trace costs one request.
func (s *Store) Pull(ctx context.Context, subject digest.Digest, workload string) (*tracefmt.Trace, Entry, error) {
	t, e, err := s.find(ctx, subject, workload, func(all []Entry) *Entry { return ofWorkload(all, workload) })
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace of %s of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return t, e, nil
}

// Auto reads the trace of a workload or else the one that is marked as the
// default. Without either the error is os.ErrNotExist.
func (s *Store) Auto(ctx context.Context, subject digest.Digest, workload string) (*tracefmt.Trace, Entry, error) {
	t, e, err := s.find(ctx, subject, workload, func(all []Entry) *Entry {
		if own := ofWorkload(all, workload); own != nil {
			return own
		}
		return defaultOf(all)
	})
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace of %s, or a default, of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return t, e, nil
}

// PullDigest reads the trace whose manifest has that digest.
func (s *Store) PullDigest(ctx context.Context, d digest.Digest) (*tracefmt.Trace, Entry, error) {
	m, err := s.c.Manifest(ctx, s.ref.WithDigest(d).String(), nil)
	if err != nil {
		return nil, Entry{}, err
	}
	t, e, err := s.read(ctx, &m)
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace %s@%s: %w", s.ref.Name(), d, err)
	}
	return t, e, nil
}

func ofWorkload(all []Entry, workload string) *Entry {
	for i := range all {
		if all[i].Workload == workload {
			return &all[i]
		}
	}
	return nil
}

// defaultOf returns the newest entry that is marked as the default.
func defaultOf(all []Entry) *Entry {
	var best *Entry
	for i := range all {
		if e := &all[i]; e.Default && (best == nil || e.Created.After(best.Created)) {
			best = e
		}
	}
	return best
}

// find asks for the workload's own tag, which is one request where there is a
// trace, and only without it for the list, from which choose picks.
func (s *Store) find(ctx context.Context, subject digest.Digest, workload string, choose func([]Entry) *Entry) (*tracefmt.Trace, Entry, error) {
	if err := subject.Validate(); err != nil {
		return nil, Entry{}, err
	}
	if err := checkWorkload(workload); err != nil {
		return nil, Entry{}, err
	}
	t, e, tagErr := s.byTag(ctx, subject, workload)
	if tagErr == nil {
		return t, e, nil
	}
	all, err := s.list(ctx, subject)
	if best := choose(latest(all)); best != nil {
		return s.readListed(ctx, subject, best)
	}
	if err != nil {
		return nil, Entry{}, err
	}
	return nil, Entry{}, tagErr
}

func (s *Store) byTag(ctx context.Context, subject digest.Digest, workload string) (*tracefmt.Trace, Entry, error) {
	m, err := s.tagged(ctx, subject, workload)
	if err != nil {
		return nil, Entry{}, err
	}
	return s.read(ctx, m)
}

// tagged reads the manifest under a workload's own tag.
func (s *Store) tagged(ctx context.Context, subject digest.Digest, workload string) (*registry.Manifest, error) {
	m, err := s.c.ManifestByTag(ctx, s.ref.Name(), Tag(subject, workload))
	if err != nil {
		return nil, err
	}
	if err := checkSubject(&m, subject); err != nil {
		return nil, err
	}
	if got := m.Annotations[AnnotationWorkload]; got != workload {
		return nil, fmt.Errorf("%s: it is of the workload %.200q", m.Descriptor.Digest, got)
	}
	return &m, nil
}

func (s *Store) readListed(ctx context.Context, subject digest.Digest, e *Entry) (*tracefmt.Trace, Entry, error) {
	m, err := s.c.Manifest(ctx, s.ref.WithDigest(e.Descriptor.Digest).String(), nil)
	if err != nil {
		return nil, Entry{}, err
	}
	if err := checkSubject(&m, subject); err != nil {
		return nil, Entry{}, err
	}
	return s.read(ctx, &m)
}

func checkSubject(m *registry.Manifest, subject digest.Digest) error {
	if m.Subject == nil || m.Subject.Digest != subject {
		return fmt.Errorf("%s: it belongs to another image", m.Descriptor.Digest)
	}
	return nil
}

// read reads the trace of a manifest; what it carries inline costs nothing.
func (s *Store) read(ctx context.Context, m *registry.Manifest) (*tracefmt.Trace, Entry, error) {
	if m.ArtifactType != ArtifactType || len(m.Layers) == 0 || m.Layers[0].MediaType != LayerType {
		return nil, Entry{}, fmt.Errorf("%s: %w", m.Descriptor.Digest, errNotTrace)
	}
	blob, err := s.c.Get(ctx, s.ref.Name(), m.Layers[0])
	if errors.Is(err, os.ErrNotExist) {
		// There is a trace, so this is not the error of a caller who asks whether there is.
		return nil, Entry{}, fmt.Errorf("%s: its layer is missing: %v", m.Descriptor.Digest, err) //nolint:errorlint
	}
	if err != nil {
		return nil, Entry{}, err
	}
	t, err := tracefmt.Read(bytes.NewReader(blob))
	if err != nil {
		return nil, Entry{}, fmt.Errorf("%s: %w", m.Descriptor.Digest, err)
	}
	d := m.Descriptor
	d.ArtifactType, d.Annotations = m.ArtifactType, m.Annotations
	return t, entry(d), nil
}

var errNotTrace = errors.New("it is not a trace of a kind that this program knows")
