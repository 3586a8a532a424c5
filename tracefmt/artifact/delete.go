package artifact

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore/registry"
)

// Delete removes the trace of a workload of an image, and what it has replaced.
// kept tells that the registry does not allow deletes: the trace is no longer
// listed or found by its workload, but by its digest. Without a trace the error is
// os.ErrNotExist.
func (s *Store) Delete(ctx context.Context, subject ocispec.Descriptor, workload string) (kept bool, err error) {
	if err = check(subject.Digest, workload); err == nil {
		kept, err = s.delete(ctx, subject, workload)
	}
	if err != nil {
		return false, fmt.Errorf("delete trace of %s of %s@%s: %w", workload, s.ref.Name(), subject.Digest, err)
	}
	return kept, nil
}

func (s *Store) delete(ctx context.Context, subject ocispec.Descriptor, workload string) (kept bool, err error) {
	all, err := s.ofWorkload(ctx, subject.Digest, workload)
	if err != nil {
		return false, err
	}
	if len(latest(append([]Entry(nil), all...))) == 0 {
		return false, os.ErrNotExist
	}
	for _, e := range all {
		err := s.c.DeleteReferrer(ctx, s.ref.Name(), subject.Digest, e.Descriptor.Digest)
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			kept = true
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return false, err
		}
	}
	tags, err := s.tagsOf(ctx, subject.Digest, workload)
	if err != nil {
		return false, err
	}
	if kept {
		return true, s.pushGone(ctx, subject, workload, all, tags)
	}
	return false, s.untag(ctx, subject, workload, all, tags)
}

// ofWorkload lists the traces of a workload, the removed and the replaced ones
// too.
func (s *Store) ofWorkload(ctx context.Context, subject digest.Digest, workload string) (of []Entry, err error) {
	all, err := s.listTagged(ctx, subject)
	for _, e := range all {
		if e.Workload == workload {
			of = append(of, e)
		}
	}
	if err != nil {
		return nil, err
	}
	m, err := s.tagged(ctx, subject, Tag(subject, workload))
	if errors.Is(err, os.ErrNotExist) || err == nil && checkIsOf(m, workload) != nil {
		return of, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range of {
		if e.Descriptor.Digest == m.Descriptor.Digest {
			return of, nil
		}
	}
	return append(of, manifestEntry(m)), nil
}

// tagsOf are the tags that are left of a workload's traces. Most registries drop
// them together with the manifest.
func (s *Store) tagsOf(ctx context.Context, subject digest.Digest, workload string) (tags []string, err error) {
	for _, tag := range []string{Tag(subject, workload), DefaultTag(subject)} {
		m, err := s.c.ManifestByTag(ctx, s.ref.Name(), tag)
		switch {
		case err == nil && checkIsOf(&m, workload) == nil:
			tags = append(tags, tag)
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return nil, err
		}
	}
	return tags, nil
}

// untag removes tags. Where tags cannot be, they name what says that the trace is
// gone.
func (s *Store) untag(ctx context.Context, subject ocispec.Descriptor, workload string, all []Entry, tags []string) error {
	for i, tag := range tags {
		err := s.c.Delete(ctx, s.ref.WithTag(tag).String())
		if refusesTag(err) {
			return s.pushGone(ctx, subject, workload, all, tags[i:])
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// refusesTag recognises a registry that deletes manifests but not tags, as which
// some take anything but a digest for a wrong one.
func refusesTag(err error) bool {
	var e *registry.Error
	return errors.Is(err, errors.ErrUnsupported) || errors.As(err, &e) && e.Status == http.StatusBadRequest
}

// pushGone makes tags, and if there are none that of the workload, name what says
// that it has no trace any more. Where the registry lists referrers by itself, it
// lists that too.
func (s *Store) pushGone(ctx context.Context, subject ocispec.Descriptor, workload string, all []Entry, tags []string) error {
	p, err := packGone(subject, workload, after(all))
	if err != nil {
		return err
	}
	if err := s.pushEmpty(ctx); err != nil {
		return err
	}
	if len(tags) == 0 {
		tags = []string{Tag(subject.Digest, workload)}
	}
	for _, tag := range tags {
		if err := s.c.Push(ctx, s.ref.WithTag(tag).String(), p.manifest, opener(p.raw)); err != nil {
			return err
		}
	}
	return nil
}

// A Deleted trace is one that DeleteDigest has removed.
type Deleted struct {
	Workload string
	Kept     bool // see Delete
}

// DeleteDigest removes the trace of an image whose manifest has that digest. Of a
// trace that is listed it is Delete of its workload, so that none that it has
// replaced comes back; of one that was replaced it is the manifest alone, and
// errors.ErrUnsupported where the registry does not allow deletes.
func (s *Store) DeleteDigest(ctx context.Context, subject ocispec.Descriptor, d digest.Digest) (Deleted, error) {
	del, err := s.deleteDigest(ctx, subject, d)
	if err != nil {
		return Deleted{}, fmt.Errorf("delete trace %s of %s@%s: %w", d, s.ref.Name(), subject.Digest, err)
	}
	return del, nil
}

func (s *Store) deleteDigest(ctx context.Context, subject ocispec.Descriptor, d digest.Digest) (Deleted, error) {
	all, err := s.listTagged(ctx, subject.Digest)
	if err != nil {
		return Deleted{}, err
	}
	workload := ""
	for _, e := range all {
		if e.Descriptor.Digest == d && !e.removed {
			workload = e.Workload
		}
	}
	if workload == "" {
		return Deleted{}, fmt.Errorf("the image has no such trace: %w", os.ErrNotExist)
	}
	if e := ofWorkload(latest(all), workload); e != nil && e.Descriptor.Digest == d {
		kept, err := s.delete(ctx, subject, workload)
		return Deleted{workload, kept}, err
	}
	return Deleted{workload, false}, s.c.DeleteReferrer(ctx, s.ref.Name(), subject.Digest, d)
}
