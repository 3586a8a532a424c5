package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	maxPages     = 32
	maxReferrers = 10_000
	// maxUntyped is how many referrers whose type the list leaves open are
	// looked into.
	maxUntyped = 1000
	// fallbackTries is how often an entry is put into a fallback tag's index
	// that others keep overwriting, and fallbackWait the longest pause between.
	fallbackTries = 20
	fallbackWait  = 5 * time.Second
	// refusedTries is how often an index that the registry refuses is put again.
	refusedTries = 5
)

var errNotIndex = errors.New("the referrers API gave something else than an index")

// FallbackTag is the tag under which referrers of subject are listed where the
// registry lacks the Referrers API.
// https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#referrers-tag-schema
func FallbackTag(subject digest.Digest) string {
	alg := subject.Algorithm().String()
	enc := subject.Encoded()
	return alg[:min(len(alg), 32)] + "-" + enc[:min(len(enc), 64)]
}

// Referrers lists the manifests in the repository of ref that have that
// subject, of one artifact type or, with "", of all. The API and the fallback
// tag are asked at the same time, and count both. No referrers is no error.
func (c *Client) Referrers(ctx context.Context, ref string, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	if err := subject.Validate(); err != nil {
		return nil, fmt.Errorf("referrers of %q in %s: %w", subject, r.Name(), err)
	}
	var (
		api, tag       []ocispec.Descriptor
		apiErr, tagErr error
		g              errgroup.Group
	)
	g.Go(func() error {
		api, _, apiErr = c.referrersAPI(ctx, r, subject, artifactType)
		return nil
	})
	g.Go(func() error {
		var idx ocispec.Index
		idx, tagErr = c.fallbackIndex(ctx, r, subject, docker.HostCapabilityResolve)
		tag = idx.Manifests
		return nil
	})
	g.Wait()
	all := merge(api, tag)
	if len(all) == 0 {
		if err := errors.Join(apiErr, tagErr); err != nil {
			return nil, fmt.Errorf("referrers of %s: %w", subject, err)
		}
	}
	return c.ofType(ctx, r, all, artifactType)
}

// merge joins lists, without what is not a manifest or is there twice.
func merge(lists ...[]ocispec.Descriptor) []ocispec.Descriptor {
	var out []ocispec.Descriptor
	seen := map[digest.Digest]bool{}
	for _, d := range slices.Concat(lists...) {
		if checkDescriptor(d) == nil && isManifest(d) && !seen[d.Digest] {
			seen[d.Digest] = true
			out = append(out, d)
		}
	}
	return out
}

// ofType keeps the descriptors of that artifact type. Some registries report
// the config's media type instead, which for most artifacts is the empty one:
// those manifests are looked into.
func (c *Client) ofType(ctx context.Context, r Reference, all []ocispec.Descriptor, artifactType string) ([]ocispec.Descriptor, error) {
	if artifactType == "" {
		return all, nil
	}
	var g errgroup.Group
	g.SetLimit(8)
	keep := make([]bool, len(all))
	untyped := 0
	for i := range all {
		d := &all[i]
		keep[i] = d.ArtifactType == artifactType
		if d.ArtifactType != "" && d.ArtifactType != ocispec.MediaTypeEmptyJSON {
			continue
		}
		if untyped++; untyped > maxUntyped {
			continue
		}
		g.Go(func() error {
			raw, err := c.Get(ctx, r.Name(), *d)
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			m, err := readReferrer(*d, raw)
			if err != nil {
				return nil // not ours
			}
			d.ArtifactType, d.Annotations = m.ArtifactType, m.Annotations
			keep[i] = d.ArtifactType == artifactType
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []ocispec.Descriptor
	for i, d := range all {
		if keep[i] {
			out = append(out, d)
		}
	}
	return out, nil
}

// A referrer is what a list of referrers says of a manifest, and its subject.
type referrer struct {
	ArtifactType string
	Annotations  map[string]string
	Subject      *ocispec.Descriptor
}

func readReferrer(d ocispec.Descriptor, raw []byte) (referrer, error) {
	var m ocispec.Manifest // an index has the same fields, as far as they go
	if err := json.Unmarshal(raw, &m); err != nil {
		return referrer{}, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	t := m.ArtifactType
	if t == "" {
		t = m.Config.MediaType
	}
	return referrer{ArtifactType: t, Annotations: m.Annotations, Subject: m.Subject}, nil
}

// referrersAPI asks the API; supported is false, without error, where there is
// none.
func (c *Client) referrersAPI(ctx context.Context, r Reference, subject digest.Digest, artifactType string) (list []ocispec.Descriptor, supported bool, err error) {
	query := url.Values{}
	if artifactType != "" {
		query.Set("artifactType", artifactType)
	}
	for range maxPages {
		var (
			idx  ocispec.Index
			next url.Values
		)
		q := newRequest(r, http.MethodGet, "referrers", subject.String())
		q.query = query
		q.caps = docker.HostCapabilityReferrers
		q.header.Set("Accept", ocispec.MediaTypeImageIndex)
		q.use = func(_ *host, resp *http.Response) error {
			next = nextPage(resp)
			raw, err := readSmall(resp)
			if err != nil {
				return err
			}
			idx = ocispec.Index{}
			if err := json.Unmarshal(raw, &idx); err != nil || idx.SchemaVersion != 2 {
				return &finalError{errNotIndex}
			}
			return nil
		}
		if err := c.call(ctx, q); err != nil {
			if noAPI(err) {
				return list, supported, nil
			}
			return list, supported, err
		}
		supported = true
		list = append(list, idx.Manifests...)
		if next == nil || len(list) >= maxReferrers {
			break
		}
		query = next
	}
	return list, supported, nil
}

// noAPI tells a registry without the API from one that is in trouble. The spec
// has 404 for it; older ones know neither the path nor, some, that code.
func noAPI(err error) bool {
	if errors.Is(err, errNotIndex) || errors.Is(err, errdefs.ErrFailedPrecondition) {
		return true
	}
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Status {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusBadRequest,
		http.StatusNotAcceptable, http.StatusNotImplemented:
		return true
	}
	return false
}

var linkNextRE = regexp.MustCompile(`<([^>]*)>\s*;\s*rel="?next"?`)

// nextPage is the query of the Link to the next page, or nil.
func nextPage(resp *http.Response) url.Values {
	m := linkNextRE.FindStringSubmatch(strings.Join(resp.Header.Values("Link"), ","))
	if m == nil {
		return nil
	}
	u, err := url.Parse(m[1])
	if err != nil || u.RawQuery == "" {
		return nil
	}
	return u.Query()
}

// fallbackIndex reads the index under the fallback tag; without one, it is
// empty.
func (c *Client) fallbackIndex(ctx context.Context, r Reference, subject digest.Digest, caps docker.HostCapabilities) (ocispec.Index, error) {
	q := newRequest(r, http.MethodGet, "manifests", FallbackTag(subject))
	q.caps = caps
	d, raw, err := c.readManifest(ctx, q, "")
	if errors.Is(err, os.ErrNotExist) {
		return emptyIndex(), nil
	}
	if err != nil {
		return ocispec.Index{}, err
	}
	idx := emptyIndex()
	if d.MediaType != ocispec.MediaTypeImageIndex {
		return idx, fmt.Errorf("%s:%s: is a %q, not an index of referrers: delete that tag", r.Name(), FallbackTag(subject), d.MediaType)
	}
	if err := json.Unmarshal(raw, &idx); err != nil {
		return idx, fmt.Errorf("%s:%s: %w", r.Name(), FallbackTag(subject), err)
	}
	if len(idx.Manifests) > maxReferrers {
		return idx, fmt.Errorf("%s:%s: more than %d referrers", r.Name(), FallbackTag(subject), maxReferrers)
	}
	return idx, nil
}

// PutReferrer writes the manifest raw, which has a subject, by its digest into
// the repository of ref, and lists it under the fallback tag where the registry
// does not list it by itself. Its blobs are to be there before. Calls at the
// same time do not lose each other's entries: on one machine they take turns,
// and each looks again whether another machine has overwritten its entry.
func (c *Client) PutReferrer(ctx context.Context, ref string, d ocispec.Descriptor, raw []byte) error {
	r, err := ParseReference(ref)
	if err != nil {
		return err
	}
	if err := checkDescriptor(d); err != nil {
		return fmt.Errorf("referrer in %s: %w", r.Name(), err)
	}
	if d.Digest.Algorithm().FromBytes(raw) != d.Digest || int64(len(raw)) != d.Size || len(raw) > MaxObject {
		return fmt.Errorf("referrer %s in %s: other bytes than its descriptor says", d.Digest, r.Name())
	}
	m, err := readReferrer(d, raw)
	if err != nil {
		return err
	}
	if m.Subject == nil || checkDescriptor(*m.Subject) != nil {
		return fmt.Errorf("manifest %s: has no subject, so it refers to nothing", d.Digest)
	}
	listed, err := c.putComplete(ctx, r, d.Digest.String(), d.MediaType, raw)
	if err != nil || listed {
		return err
	}
	subject := m.Subject.Digest
	if _, supported, err := c.referrersAPI(ctx, r, subject, m.ArtifactType); err != nil || supported {
		return err
	}
	entry := ocispec.Descriptor{
		MediaType:    d.MediaType,
		Digest:       d.Digest,
		Size:         d.Size,
		ArtifactType: m.ArtifactType,
		Annotations:  m.Annotations,
	}
	return c.updateFallback(ctx, r, subject, d.Digest, &entry)
}

// DeleteReferrer removes a referrer of subject: its manifest, and its entry
// under the fallback tag. It is os.ErrNotExist where there was neither.
func (c *Client) DeleteReferrer(ctx context.Context, ref string, subject, dgst digest.Digest) error {
	r, err := ParseReference(ref)
	if err != nil {
		return err
	}
	if err := errors.Join(subject.Validate(), dgst.Validate()); err != nil {
		return fmt.Errorf("referrer %q of %q in %s: %w", dgst, subject, r.Name(), err)
	}
	// The entry first, so that the list never names what is gone.
	idx, err := c.fallbackIndex(ctx, r, subject, docker.HostCapabilityPush)
	if err != nil {
		return err
	}
	had := find(idx.Manifests, dgst) >= 0
	if had {
		if err := c.updateFallback(ctx, r, subject, dgst, nil); err != nil {
			return err
		}
	}
	err = c.delete(ctx, r, dgst.String())
	if had && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func find(list []ocispec.Descriptor, d digest.Digest) int {
	return slices.IndexFunc(list, func(x ocispec.Descriptor) bool { return x.Digest == d })
}

// updateFallback puts an entry into the index under the fallback tag, or with
// nil takes it out. A registry has no compare-and-swap, so another machine may
// write an index that does not know of it: after a random while the entry is
// looked up again, and once more after a longer one, which is past what any write
// takes that was under way. Who was overwritten waits longer the next time, so
// that many machines get out of each other's way.
func (c *Client) updateFallback(ctx context.Context, r Reference, subject, dgst digest.Digest, entry *ocispec.Descriptor) error {
	var gone []digest.Digest // of the index, seen to be missing
	for try := range fallbackTries {
		took, changed, err := c.rewriteFallback(ctx, r, subject, dgst, entry, gone)
		wait := min(max(2*took, 40*time.Millisecond)<<min(try, 8), fallbackWait)
		switch {
		case refusesIndex(err) && try < refusedTries:
			gone, err = c.goneFor(ctx, r, subject, wait)
			if err != nil {
				return err
			}
			continue
		case err != nil || !changed && try == 0:
			return err
		}
		if held, err := c.holds(ctx, r, subject, dgst, entry != nil, wait); held || err != nil {
			return err
		}
	}
	return fmt.Errorf("%s:%s: others keep overwriting the list of referrers: try again", r.Name(), FallbackTag(subject))
}

// refusesIndex recognises the answer to an index of a manifest that the registry
// does not have, since somebody deleted it who did not say so in the index; or that
// it did not find in a moment when it was just being written.
func refusesIndex(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Method == http.MethodPut && (e.Status == http.StatusBadRequest || e.Status == http.StatusNotFound)
}

// goneFor lists what the index names that is missing now and after a while.
func (c *Client) goneFor(ctx context.Context, r Reference, subject digest.Digest, wait time.Duration) ([]digest.Digest, error) {
	idx, err := c.fallbackIndex(ctx, r, subject, docker.HostCapabilityPush)
	if err != nil {
		return nil, err
	}
	gone := c.missing(ctx, r, &idx)
	if err := c.sleep(ctx, wait/2+rand.N(wait)); err != nil {
		return nil, err
	}
	still := c.missing(ctx, r, &idx)
	return slices.DeleteFunc(gone, func(d digest.Digest) bool { return !slices.Contains(still, d) }), nil
}

// holds looks twice, after a random while about wait and one about three times as
// long, whether the index still lists the entry, or still does not.
func (c *Client) holds(ctx context.Context, r Reference, subject, dgst digest.Digest, listed bool, wait time.Duration) (bool, error) {
	for _, d := range []time.Duration{wait, 3 * wait} {
		if err := c.sleep(ctx, d/2+rand.N(d)); err != nil {
			return false, err
		}
		idx, err := c.fallbackIndex(ctx, r, subject, docker.HostCapabilityPush)
		if err != nil {
			return false, err
		}
		if (find(idx.Manifests, dgst) >= 0) != listed {
			return false, nil
		}
	}
	return true, nil
}

// rewriteFallback is one turn at the index, and how long that took. changed is
// false where it already says what it should. What is gone is left out.
func (c *Client) rewriteFallback(ctx context.Context, r Reference, subject, dgst digest.Digest, entry *ocispec.Descriptor, gone []digest.Digest) (took time.Duration, changed bool, err error) {
	unlock, err := c.lock(ctx, r.Name()+"@"+subject.String())
	if err != nil {
		return 0, false, err
	}
	defer unlock()
	began := c.now()
	idx, err := c.fallbackIndex(ctx, r, subject, docker.HostCapabilityPush)
	if err != nil {
		return 0, false, err
	}
	i := find(idx.Manifests, dgst)
	switch {
	case i >= 0 && entry == nil:
		idx.Manifests = slices.Delete(idx.Manifests, i, i+1)
	case i < 0 && entry != nil:
		idx.Manifests = append(idx.Manifests, *entry)
	default:
		return 0, false, nil
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
		return d.Digest != dgst && slices.Contains(gone, d.Digest)
	})
	err = c.putIndex(ctx, r, FallbackTag(subject), &idx)
	return c.now().Sub(began), true, err
}

func (c *Client) putIndex(ctx context.Context, r Reference, tag string, idx *ocispec.Index) error {
	raw, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	_, err = c.putManifest(ctx, r, tag, ocispec.MediaTypeImageIndex, raw)
	return err
}

// missing are the manifests of an index that the registry does not have, in order.
func (c *Client) missing(ctx context.Context, r Reference, idx *ocispec.Index) (gone []digest.Digest) {
	for _, d := range idx.Manifests {
		if there, err := c.exists(ctx, r, d, docker.HostCapabilityPush); err == nil && !there {
			gone = append(gone, d.Digest)
		}
	}
	return gone
}

// Tags lists the tags in the repository of ref that begin with prefix. Registries
// list tags in lexical order, so that those before them are left out; without
// the repository there are none.
// https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#listing-tags
func (c *Client) Tags(ctx context.Context, ref, prefix string) ([]string, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	var all []string
	query := url.Values{"n": {"1000"}, "last": {prefix}}
	for range maxPages {
		page, next, err := c.tagPage(ctx, r, query)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("tags of %s: %w", r.Name(), err)
		}
		for _, t := range page {
			if strings.HasPrefix(t, prefix) && tagRE.MatchString(t) {
				all = append(all, t)
			}
		}
		past := len(page) > 0 && page[len(page)-1] > prefix && !strings.HasPrefix(page[len(page)-1], prefix)
		if next == nil || past || len(all) >= maxReferrers {
			break
		}
		query = next
	}
	return all, nil
}

func (c *Client) tagPage(ctx context.Context, r Reference, query url.Values) (tags []string, next url.Values, err error) {
	q := newRequest(r, http.MethodGet, "tags", "list")
	q.query = query
	q.caps = docker.HostCapabilityResolve
	q.use = func(_ *host, resp *http.Response) error {
		next = nextPage(resp)
		raw, err := readSmall(resp)
		if err != nil {
			return err
		}
		var list struct {
			Tags []string `json:"tags"`
		}
		if err := json.Unmarshal(raw, &list); err != nil {
			return finalf("is not a list of tags: %w", err)
		}
		tags = list.Tags
		return nil
	}
	err = c.call(ctx, q)
	return tags, next, err
}
