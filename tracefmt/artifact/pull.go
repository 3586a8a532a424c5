package artifact

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

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
			f = s.listed(ctx, subject, workload, f.err)
		}
		err = f.err
	}
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace of %s of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return f.trace, f.entry, nil
}

// Auto reads the trace of a workload, or else the one that is marked as the
// default, or else it joins the newest traces of the image, of whatever workload;
// [Entry.Choice] says which. Without any the error is os.ErrNotExist. It needs to
// know nothing else of the image. The tags of the first two are asked for at once:
//
//	trace                       requests  of them serial
//	of the workload             2         1
//	the default                 2         1
//	listed, without a tag       5         3
//	a union of n                4+n       3
//	none                        4         2
//
// and one more, serial, if a trace is too large to be carried inline.
func (s *Store) Auto(ctx context.Context, subject digest.Digest, workload string) (*tracefmt.Trace, Entry, error) {
	err := check(subject, workload)
	var f found
	if err == nil {
		f = s.auto(ctx, subject, workload)
		err = f.err
	}
	if err != nil {
		return nil, Entry{}, fmt.Errorf("trace of %s, or another, of %s@%s: %w", workload, s.ref.Name(), subject, err)
	}
	return f.trace, f.entry, nil
}

func (s *Store) auto(ctx context.Context, subject digest.Digest, workload string) found {
	beside, cancel := context.WithCancel(ctx)
	defer cancel()
	byDefault := make(chan found, 1)
	go func() { byDefault <- s.byDefaultTag(beside, subject).as(ByDefault) }()
	own := s.byTag(ctx, subject, workload).as(Own)
	if own.err == nil {
		cancel()
		<-byDefault
		return own
	}
	other := <-byDefault
	if other.err == nil && errors.Is(own.err, os.ErrNotExist) {
		return other
	}
	f := s.autoListed(ctx, subject, workload, own.err)
	if f.err != nil && other.err == nil || f.entry.Choice == ByUnion && other.err == nil {
		return other
	}
	return f
}

// autoListed makes the choice from the list. Without anything there the error is
// that of the tag.
func (s *Store) autoListed(ctx context.Context, subject digest.Digest, workload string, tagErr error) found {
	all, err := s.list(ctx, subject)
	all = latest(all)
	if e := ofWorkload(all, workload); e != nil {
		return s.readListed(ctx, subject, e, maxBlob).as(Own)
	}
	if e := defaultOf(all); e != nil {
		return s.readListed(ctx, subject, e, maxBlob).as(ByDefault)
	}
	if len(all) > 0 {
		return s.union(ctx, subject, all)
	}
	return found{err: cmp.Or(err, tagErr)}
}

// What a union is made of, at most: the newest traces, and bytes of each,
// compressed.
const (
	maxUnion     = 16
	maxUnionBlob = 1 << 20
)

// union joins the newest of the entries. One that cannot be read is left out.
func (s *Store) union(ctx context.Context, subject digest.Digest, all []Entry) found {
	slices.SortStableFunc(all, func(a, b Entry) int { return b.Created.Compare(a.Created) })
	all = all[:min(len(all), maxUnion)]
	slices.SortFunc(all, func(a, b Entry) int { return cmp.Compare(a.Workload, b.Workload) })
	each := make([]found, len(all))
	var g errgroup.Group
	for i := range all {
		g.Go(func() error {
			each[i] = s.readListed(ctx, subject, &all[i], maxUnionBlob)
			return nil
		})
	}
	_ = g.Wait()
	var traces []*tracefmt.Trace
	var errs []error
	e := Entry{Choice: ByUnion}
	for i, f := range each {
		if f.err != nil {
			errs = append(errs, f.err)
			continue
		}
		traces = append(traces, f.trace)
		e.Union = append(e.Union, all[i].Workload)
	}
	if len(traces) == 0 {
		return found{err: errors.Join(errs...)}
	}
	t := traces[0]
	if len(traces) > 1 {
		var err error
		if t, _, err = tracefmt.Merge(traces, tracefmt.MergeUnion); err != nil {
			return found{err: fmt.Errorf("union of %d traces: %w", len(traces), err)}
		}
	}
	e.Bytes, e.Events = t.Bytes(), len(t.Events)
	return found{trace: t, entry: e}
}

// as notes why it was picked.
func (f found) as(c Choice) found {
	if f.err == nil {
		f.entry.Choice = c
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
	f := s.read(ctx, &m, maxBlob)
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

// listed reads the trace of a workload from the list. Without one the error is
// that of the tag.
func (s *Store) listed(ctx context.Context, subject digest.Digest, workload string, tagErr error) found {
	all, err := s.list(ctx, subject)
	if e := ofWorkload(latest(all), workload); e != nil {
		return s.readListed(ctx, subject, e, maxBlob)
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
	return s.read(ctx, m, maxBlob)
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
	return s.read(ctx, m, maxBlob)
}

// tagged reads the manifest of a trace of subject under a tag. That of a trace
// that was removed is os.ErrNotExist.
func (s *Store) tagged(ctx context.Context, subject digest.Digest, tag string) (*registry.Manifest, error) {
	m, err := s.c.ManifestByTag(ctx, s.ref.Name(), tag)
	if err == nil {
		err = checkSubject(&m, subject)
	}
	if err == nil && m.Annotations[AnnotationRemoved] == "true" {
		err = fmt.Errorf("%s: it was removed: %w", m.Descriptor.Digest, os.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	return &m, nil
}

func checkIsOf(m *registry.Manifest, workload string) error {
	if got := m.Annotations[AnnotationWorkload]; got != workload {
		return fmt.Errorf("%s: it is of the workload %.200q", m.Descriptor.Digest, got)
	}
	return nil
}

// readListed reads the trace of an entry, of at most limit bytes.
func (s *Store) readListed(ctx context.Context, subject digest.Digest, e *Entry, limit int64) found {
	m, err := s.c.Manifest(ctx, s.ref.WithDigest(e.Descriptor.Digest).String(), nil)
	if err == nil {
		err = checkSubject(&m, subject)
	}
	if err != nil {
		return found{err: err}
	}
	return s.read(ctx, &m, limit)
}

func checkSubject(m *registry.Manifest, subject digest.Digest) error {
	if m.Subject == nil || m.Subject.Digest != subject {
		return fmt.Errorf("%s: it belongs to another image", m.Descriptor.Digest)
	}
	return nil
}

// read reads the trace of a manifest, of at most limit bytes, compressed; what it
// carries inline costs nothing.
func (s *Store) read(ctx context.Context, m *registry.Manifest, limit int64) found {
	fail := func(err error) found { return found{err: fmt.Errorf("%s: %w", m.Descriptor.Digest, err)} }
	if m.ArtifactType != ArtifactType || len(m.Layers) == 0 || m.Layers[0].MediaType != LayerType {
		return fail(errNotTrace)
	}
	if n := m.Layers[0].Size; n > limit {
		return fail(fmt.Errorf("its layer has %d bytes, which are too many: the limit is %d", n, limit))
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
	return found{trace: t, entry: manifestEntry(m)}
}

var errNotTrace = errors.New("it is not a trace of a kind that this program knows")
