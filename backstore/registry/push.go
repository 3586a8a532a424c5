package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Exists asks whether the repository of ref has the blob or manifest d.
func (c *Client) Exists(ctx context.Context, ref string, d ocispec.Descriptor) (bool, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return false, err
	}
	return c.exists(ctx, r, d, docker.HostCapabilityPull)
}

func (c *Client) exists(ctx context.Context, r Reference, d ocispec.Descriptor, caps docker.HostCapabilities) (bool, error) {
	if err := checkDescriptor(d); err != nil {
		return false, fmt.Errorf("%s: %w", r.Name(), err)
	}
	kind := "blobs"
	if isManifest(d) {
		kind = "manifests"
	}
	q := newRequest(r, http.MethodHead, kind, d.Digest.String())
	q.caps = caps
	q.header.Set("Accept", manifestTypes)
	err := c.call(ctx, q)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound {
		return false, nil
	}
	return err == nil, err
}

// Push writes a blob or, by its media type, a manifest or index into the
// repository of ref. A blob that is there is not sent again. A manifest is
// written under ref's tag where ref has one, else under its digest alone. open
// gives the d.Size bytes from their start; it is called once for each attempt.
func (c *Client) Push(ctx context.Context, ref string, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	r, err := ParseReference(ref)
	if err != nil {
		return err
	}
	if err := checkDescriptor(d); err != nil {
		return fmt.Errorf("push to %s: %w", r.Name(), err)
	}
	if r.Digest != "" && r.Digest != d.Digest {
		return fmt.Errorf("push to %s: the digest is %s", r, d.Digest)
	}
	if isManifest(d) {
		return c.pushManifest(ctx, r, d, open)
	}
	return c.pushBlob(ctx, r, d, open)
}

func (c *Client) pushManifest(ctx context.Context, r Reference, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	if d.Size > MaxObject {
		return fmt.Errorf("push to %s: manifest %s: %d bytes are too many: the limit is %d", r.Name(), d.Digest, d.Size, MaxObject)
	}
	rc, err := open()
	if err != nil {
		return fmt.Errorf("push to %s: manifest %s: %w", r.Name(), d.Digest, err)
	}
	raw, err := io.ReadAll(io.LimitReader(rc, d.Size+1))
	rc.Close()
	if err == nil && (int64(len(raw)) != d.Size || d.Digest.Algorithm().FromBytes(raw) != d.Digest) {
		err = errors.New("other bytes than its descriptor says")
	}
	if err != nil {
		return fmt.Errorf("push to %s: manifest %s: %w", r.Name(), d.Digest, err)
	}
	object := r.Tag
	if object == "" {
		object = d.Digest.String()
	}
	_, err = c.putComplete(ctx, r, object, d.MediaType, raw)
	return err
}

// putComplete is putManifest for what refers only to what is there. A registry may
// deny that in a moment when somebody else writes one of these again.
func (c *Client) putComplete(ctx context.Context, r Reference, object, mediaType string, raw []byte) (subject bool, err error) {
	for failures := 1; ; failures++ {
		subject, err = c.putManifest(ctx, r, object, mediaType, raw)
		if err == nil || failures >= c.o.Attempts || !deniesContent(err) {
			return subject, err
		}
		if cause := c.sleep(ctx, c.backoff(failures)); cause != nil {
			return false, errors.Join(err, cause)
		}
	}
}

// deniesContent recognises the answer to a manifest of blobs, or an index of
// manifests, that the registry does not have.
// https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#error-codes
func deniesContent(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Method == http.MethodPut && strings.Contains(e.Message, "BLOB_UNKNOWN")
}

// putManifest writes a manifest under a tag or its digest. subject says whether
// the registry has listed it as a referrer.
func (c *Client) putManifest(ctx context.Context, r Reference, object, mediaType string, raw []byte) (subject bool, err error) {
	q := newRequest(r, http.MethodPut, "manifests", object)
	q.header.Set("Content-Type", mediaType)
	q.body = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }
	q.size = int64(len(raw))
	q.use = func(_ *host, resp *http.Response) error {
		subject = resp.Header.Get("OCI-Subject") != ""
		drain(resp.Body)
		return nil
	}
	err = c.call(ctx, q)
	return subject, err
}

// pushBlob starts an upload and sends the whole in one piece. An upload that
// fails starts anew, as not every registry can continue one.
func (c *Client) pushBlob(ctx context.Context, r Reference, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error {
	ctx, cancel := c.bound(ctx)
	defer cancel()
	for failures := 1; ; failures++ {
		ok, err := c.exists(ctx, r, d, docker.HostCapabilityPush)
		if err != nil || ok {
			return err
		}
		q := newRequest(r, http.MethodPost, "blobs/uploads", "")
		q.object = r.Repository + "@" + d.Digest.String()
		q.use = func(h *host, resp *http.Response) error {
			drain(resp.Body)
			return c.upload(q.scoped(ctx), r, d, h, resp, open)
		}
		hosts, err := c.hostsFor(q)
		if err != nil {
			return err
		}
		err = c.round(ctx, q, hosts)
		if err == nil || failures >= c.o.Attempts || !isTransient(err) {
			return err
		}
		if cause := c.sleep(ctx, c.backoff(failures)); cause != nil {
			return q.error(nil, cause)
		}
	}
}

// upload sends the blob to where the answer to the start of an upload points.
func (c *Client) upload(ctx context.Context, r Reference, d ocispec.Descriptor, h *host, started *http.Response, open func() (io.ReadCloser, error)) error {
	if started.StatusCode == http.StatusCreated {
		return nil // it was there after all
	}
	u, err := started.Location()
	if err != nil {
		return finalf("the upload has no location: %w", err)
	}
	query := u.Query()
	query.Set("digest", d.Digest.String())
	u.RawQuery = query.Encode()

	q := newRequest(r, http.MethodPut, "blobs", d.Digest.String())
	q.header.Set("Content-Type", "application/octet-stream")
	q.body, q.size = open, d.Size
	resp, err := c.send(ctx, q, h, u)
	if err != nil {
		return q.asError(h, err)
	}
	if resp.StatusCode/100 != 2 {
		e := q.statusError(h, resp, c.now())
		c.note(e, u.Host)
		return e
	}
	drain(resp.Body)
	return nil
}

// Mount makes the blob d of another repository of the same registry one of
// ref's repository. Where the registry does not do it, and the blob is to be
// pushed, the error is errors.ErrUnsupported.
func (c *Client) Mount(ctx context.Context, ref string, d ocispec.Descriptor, fromRepository string) error {
	r, err := ParseReference(ref)
	if err != nil {
		return err
	}
	if err := checkDescriptor(d); err != nil {
		return fmt.Errorf("mount in %s: %w", r.Name(), err)
	}
	if !repositoryRE.MatchString(fromRepository) {
		return fmt.Errorf("mount in %s: %q is not a repository", r.Name(), fromRepository)
	}
	q := newRequest(r, http.MethodPost, "blobs/uploads", "")
	q.object = r.Repository + "@" + d.Digest.String()
	q.query = url.Values{"mount": {d.Digest.String()}, "from": {fromRepository}}
	q.scopes = []string{"repository:" + fromRepository + ":pull"}
	q.use = func(h *host, resp *http.Response) error {
		drain(resp.Body)
		if resp.StatusCode == http.StatusCreated {
			return nil
		}
		c.abandon(q.scoped(ctx), r, h, resp)
		return finalf("the registry did not mount it from %s: push it: %w", fromRepository, errors.ErrUnsupported)
	}
	return c.call(ctx, q)
}

// abandon ends an upload that nobody wants. That it fails does no harm.
func (c *Client) abandon(ctx context.Context, r Reference, h *host, started *http.Response) {
	u, err := started.Location()
	if err != nil {
		return
	}
	q := newRequest(r, http.MethodDelete, "blobs/uploads", "")
	if resp, err := c.send(ctx, q, h, u); err == nil {
		drain(resp.Body)
	}
}

// Delete removes the manifest that ref names by digest or, without one, the
// tag. A registry that does not allow it gives errors.ErrUnsupported, one that
// does not have it os.ErrNotExist.
func (c *Client) Delete(ctx context.Context, ref string) error {
	r, err := ParseReference(ref)
	if err != nil {
		return err
	}
	if r.Digest == "" && r.Tag == "" {
		return fmt.Errorf("delete %s: name a digest or a tag", r)
	}
	return c.delete(ctx, r, r.object())
}

func (c *Client) delete(ctx context.Context, r Reference, object string) error {
	q := newRequest(r, http.MethodDelete, "manifests", object)
	if err := c.call(ctx, q); err != nil {
		return err
	}
	c.manifests.drop(digest.Digest(object))
	return nil
}
