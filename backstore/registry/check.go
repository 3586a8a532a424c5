package registry

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A HostStatus is what one host of a registry has answered.
type HostStatus struct {
	Name   string // host[:port]
	Mirror bool   // of the registry, by hosts.toml
	// User is whom the repository's own credentials name for it, if it has any, else
	// whom Docker's configuration names; empty for nobody.
	User string
	Own  bool
	Err  error // nil if it has the image
}

// tokenUser is one whose name only the registry knows.
const tokenUser = "the owner of an identity token"

// Check asks each host of ref's registry that images may be pulled from, mirrors
// too, once whether it has ref. They come in the order in which they are asked
// otherwise.
func (c *Client) Check(ctx context.Context, ref string) ([]HostStatus, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	q := newRequest(r, http.MethodHead, "manifests", cmp.Or(string(r.Digest), r.Tag, "latest"))
	q.header.Set("Accept", manifestTypes)
	q.once = true
	hosts, err := c.hostsFor(q)
	if err != nil {
		return nil, err
	}
	ctx, cancel := c.bound(ctx)
	defer cancel()
	all := make([]HostStatus, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() { all[i] = c.checkHost(ctx, q, h) })
	}
	wg.Wait()
	return all, nil
}

func (c *Client) checkHost(ctx context.Context, q *request, h *host) HostStatus {
	s := HostStatus{Name: h.name, Mirror: !h.origin}
	user, token, err := c.credentials(h.name)
	if err != nil {
		s.Err = err
		return s
	}
	if s.User = user; user == "" && token != "" {
		s.User = tokenUser
	}
	if c.o.Credentials != nil {
		for _, own := range c.o.Credentials(q.ref.Name(), c.named(h.name)) {
			s.User, s.Own = cmp.Or(own.Username, tokenUser), true
			break
		}
	}
	if e := c.ask(q.scoped(ctx), q, h, true); e != nil {
		s.Err = e
	}
	return s
}

// HasReferrers tells whether ref's registry has the Referrers API. Where it has
// not, referrers are listed under the fallback tag.
func (c *Client) HasReferrers(ctx context.Context, ref string, subject digest.Digest) (bool, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return false, err
	}
	if err := subject.Validate(); err != nil {
		return false, err
	}
	_, has, err := c.referrersAPI(ctx, r, subject, "")
	return has, err
}

// HasRanges tells whether ref's registry, or where it redirects to, gives parts of
// the blob d, which is at least 2 bytes long.
func (c *Client) HasRanges(ctx context.Context, ref string, d ocispec.Descriptor) (has bool, err error) {
	r, err := ParseReference(ref)
	if err != nil {
		return false, err
	}
	if err := d.Digest.Validate(); err != nil {
		return false, err
	}
	q := newRequest(r, http.MethodGet, "blobs", d.Digest.String())
	q.header.Set("Range", fmt.Sprintf("bytes=%d-%d", d.Size-1, d.Size-1))
	q.use = func(_ *host, resp *http.Response) error {
		has = resp.StatusCode == http.StatusPartialContent
		return resp.Body.Close()
	}
	err = c.call(ctx, q)
	return has, err
}

// Hint says what to do about it; empty if there is nothing better than to look at
// the error.
func (e *Error) Hint() string { return e.hint() }
