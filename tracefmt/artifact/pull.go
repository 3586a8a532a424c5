package artifact

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

// Pull reads the trace of a workload of an image. Without one the error is
// os.ErrNotExist. A trace that is carried inline costs one request. One without
// a tag, in a repository that was copied without tags say, costs two round trips
// more.
func (s *Store) Pull(ctx context.Context, subject digest.Digest, workload string) (*tracefmt.Trace, Entry, error) {
	err := check(subject, workload)
	var f found
	if err == nil {
		if f = s.byTag(ctx, subject, workload); f.err != nil {
			f = s.listed(ctx, subject, f.err, func(all []Entry) *Entry { return ofWorkload(all, workload) })
		}
		err = f.err
	}
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace of %s of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return f.trace, f.entry, nil
}

// Auto reads the trace of a workload or else the one that is marked as the
// default. Without either the error is os.ErrNotExist. It needs to know nothing
// else of the image. The tags of both are asked for at once:
//
//	trace                       requests  of them serial
//	of the workload             2         1
//	the default                 2         1
//	listed, without a tag       5         3
//	none                        4         2
//
// and one more, serial, if the trace is too large to be carried inline.
func (s *Store) Auto(ctx context.Context, subject digest.Digest, workload string) (*tracefmt.Trace, Entry, error) {
	err := check(subject, workload)
	var f found
	if err == nil {
		f = s.auto(ctx, subject, workload)
		err = f.err
	}
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace of %s, or a default, of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return f.trace, f.entry, nil
}

func (s *Store) auto(ctx context.Context, subject digest.Digest, workload string) found {
	beside, cancel := context.WithCancel(ctx)
	defer cancel()
	byDefault := make(chan found, 1)
	go func() { byDefault <- s.byDefaultTag(beside, subject) }()
	own := s.byTag(ctx, subject, workload)
	if own.err == nil {
		cancel()
		<-byDefault
		return own
	}
	other := <-byDefault
	if other.err == nil && errors.Is(own.err, os.ErrNotExist) {
		return other
	}
	f := s.listed(ctx, subject, own.err, func(all []Entry) *Entry {
		if own := ofWorkload(all, workload); own != nil {
			return own
		}
		return defaultOf(all)
	})
	if f.err != nil && other.err == nil {
		return other
	}
	return f
}

// found is a trace, or why there is none.
type found struct {
	trace *tracefmt.Trace
	entry Entry
	err   error
}

func check(subject digest.Digest, workload string) error {
	if err := subject.Validate(); err != nil {
		return err
	}
	return checkWorkload(workload)
}

// PullDigest reads the trace whose manifest has that digest.
func (s *Store) PullDigest(ctx context.Context, d digest.Digest) (*tracefmt.Trace, Entry, error) {
	m, err := s.c.Manifest(ctx, s.ref.WithDigest(d).String(), nil)
	if err != nil {
		return nil, Entry{}, err
	}
	f := s.read(ctx, &m)
	if f.err != nil {
		return nil, Entry{}, fmt.Errorf("trace %s@%s: %w", s.ref.Name(), d, f.err)
	}
	return f.trace, f.entry, nil
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

// listed reads the trace that choose picks from the list. Without one the error
// is that of the tag.
func (s *Store) listed(ctx context.Context, subject digest.Digest, tagErr error, choose func([]Entry) *Entry) found {
	all, err := s.list(ctx, subject)
	if best := choose(latest(all)); best != nil {
		return s.readListed(ctx, subject, best)
	}
	return found{err: cmp.Or(err, tagErr)}
}

func (s *Store) byTag(ctx context.Context, subject digest.Digest, workload string) found {
	m, err := s.tagged(ctx, subject, Tag(subject, workload))
	if err == nil {
		err = checkIsOf(m, workload)
	}
	if err != nil {
		return found{err: err}
	}
	return s.read(ctx, m)
}

// byDefaultTag reads the default, unless it has been attached again as something
// else since.
func (s *Store) byDefaultTag(ctx context.Context, subject digest.Digest) found {
	m, err := s.tagged(ctx, subject, DefaultTag(subject))
	if err == nil && m.Annotations[AnnotationDefault] != "true" {
		err = fmt.Errorf("%s: it is not the default", m.Descriptor.Digest)
	}
	if err != nil {
		return found{err: err}
	}
	return s.read(ctx, m)
}

// tagged reads the manifest of a trace of subject under a tag.
func (s *Store) tagged(ctx context.Context, subject digest.Digest, tag string) (*registry.Manifest, error) {
	m, err := s.c.ManifestByTag(ctx, s.ref.Name(), tag)
	if err != nil {
		return nil, err
	}
	return &m, checkSubject(&m, subject)
}

func checkIsOf(m *registry.Manifest, workload string) error {
	if got := m.Annotations[AnnotationWorkload]; got != workload {
		return fmt.Errorf("%s: it is of the workload %.200q", m.Descriptor.Digest, got)
	}
	return nil
}

func (s *Store) readListed(ctx context.Context, subject digest.Digest, e *Entry) found {
	m, err := s.c.Manifest(ctx, s.ref.WithDigest(e.Descriptor.Digest).String(), nil)
	if err == nil {
		err = checkSubject(&m, subject)
	}
	if err != nil {
		return found{err: err}
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
func (s *Store) read(ctx context.Context, m *registry.Manifest) found {
	fail := func(err error) found { return found{err: fmt.Errorf("%s: %w", m.Descriptor.Digest, err)} }
	if m.ArtifactType != ArtifactType || len(m.Layers) == 0 || m.Layers[0].MediaType != LayerType {
		return fail(errNotTrace)
	}
	blob, err := s.c.Get(ctx, s.ref.Name(), m.Layers[0])
	if errors.Is(err, os.ErrNotExist) {
		// There is a trace, so this is not the error of a caller who asks whether there is.
		return fail(fmt.Errorf("its layer is missing: %v", err)) //nolint:errorlint
	}
	if err != nil {
		return found{err: err}
	}
	t, err := tracefmt.Read(bytes.NewReader(blob))
	if err != nil {
		return fail(err)
	}
	d := m.Descriptor
	d.ArtifactType, d.Annotations = m.ArtifactType, m.Annotations
	return found{trace: t, entry: entry(d)}
}

var errNotTrace = errors.New("it is not a trace of a kind that this program knows")
