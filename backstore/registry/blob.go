package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore"
)

const (
	// maxSkip is how much of a blob is read and thrown away where a server
	// answers a range with the whole, in bytes.
	maxSkip = 4 << 20
	// progress is how many bytes since the last failure forgive it.
	progress = 1 << 20
)

// A Blob is one blob at its registry. It is safe for concurrent use and needs
// no closing.
type Blob struct {
	c      *Client
	ref    Reference
	d      ocispec.Descriptor
	stores stores
}

var _ backstore.Fetcher = (*Blob)(nil)

// Blob is the blob d in the repository of ref. Nothing is asked yet.
func (c *Client) Blob(ref string, d ocispec.Descriptor) (*Blob, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("blob %q of %s: %w", d.Digest, r.Name(), err)
	}
	if d.Size < 0 {
		return nil, fmt.Errorf("blob %s of %s: size %d", d.Digest, r.Name(), d.Size)
	}
	return &Blob{c: c, ref: r, d: d}, nil
}

// Host is the registry.
func (b *Blob) Host() string { return b.ref.Registry }

// Size is the blob's size in bytes, as its descriptor says.
func (b *Blob) Size() int64 { return b.d.Size }

// Digest is the blob's digest.
func (b *Blob) Digest() digest.Digest { return b.d.Digest }

// Fetch opens bytes [off, off+n) of the blob; see backstore.Fetcher. The bytes
// are not checked against the digest. The registry has answered when Fetch
// returns.
func (b *Blob) Fetch(ctx context.Context, off, n int64, lane backstore.Lane) (io.ReadCloser, error) {
	return b.fetch(ctx, off, n, lane, false)
}

// FetchOnce is Fetch without patience: each host is asked once, none that has
// asked for patience, and a body that ends early is an error. It is for callers
// who know better when to try again; see [Error.Permanent], [Error.Answered]
// and [Error.RetryAfter].
func (b *Blob) FetchOnce(ctx context.Context, off, n int64, lane backstore.Lane) (io.ReadCloser, error) {
	return b.fetch(ctx, off, n, lane, true)
}

func (b *Blob) fetch(ctx context.Context, off, n int64, lane backstore.Lane, once bool) (io.ReadCloser, error) {
	if off < 0 || n <= 0 || off > b.d.Size-n {
		return nil, fmt.Errorf("blob %s: range of %d bytes at %d is outside its %d", b.d.Digest, n, off, b.d.Size)
	}
	ctx, cancel := b.c.bound(ctx)
	s := &stream{b: b, ctx: ctx, cancel: cancel, lane: lane, once: once, start: off, off: off, end: off + n}
	if err := s.open(); err != nil {
		cancel()
		return nil, err
	}
	return s, nil
}

// Open streams the whole of a blob. The last Read fails where size or digest
// are not d's.
func (c *Client) Open(ctx context.Context, ref string, d ocispec.Descriptor) (io.ReadCloser, error) {
	b, err := c.Blob(ref, d)
	if err != nil {
		return nil, err
	}
	v := &verified{d: d, name: b.ref.Name(), verifier: d.Digest.Verifier()}
	if d.Size == 0 {
		v.ReadCloser = io.NopCloser(strings.NewReader(""))
		return v, nil
	}
	v.ReadCloser, err = b.Fetch(ctx, 0, d.Size, backstore.Demand)
	if err != nil {
		return nil, err
	}
	return v, nil
}

// verified checks the digest at the end.
type verified struct {
	io.ReadCloser
	d        ocispec.Descriptor
	name     string
	verifier digest.Verifier
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.ReadCloser.Read(p)
	v.verifier.Write(p[:n])
	if errors.Is(err, io.EOF) && !v.verifier.Verified() {
		return n, digestError(v.name, v.d.Digest)
	}
	return n, err
}

func digestError(name string, d digest.Digest) error {
	return finalf("%s@%s: the bytes received have another digest: the registry or a mirror is damaged", name, d)
}

// A stream is one Fetch: as many requests as it takes to get the bytes.
type stream struct {
	b         *Blob
	ctx       context.Context
	cancel    context.CancelFunc
	lane      backstore.Lane
	once      bool // see FetchOnce
	start     int64
	off, end  int64 // still to be read
	host      *host // that gave body
	body      io.ReadCloser
	failures  int
	sinceFail int64
	err       error // final
}

// open asks for the rest.
func (s *stream) open() error {
	q := newRequest(s.b.ref, http.MethodGet, "blobs", s.b.d.Digest.String())
	q.lane, q.once = s.lane, s.once
	q.stores = &s.b.stores
	if s.lane == backstore.Background {
		q.header.Set("Purpose", "prefetch") // as browsers say it
	}
	if s.off != 0 || s.end != s.b.d.Size {
		q.header.Set("Range", fmt.Sprintf("bytes=%d-%d", s.off, s.end-1))
	}
	q.use = func(h *host, resp *http.Response) error {
		if err := s.accept(resp); err != nil {
			resp.Body.Close()
			return err
		}
		s.host, s.body = h, resp.Body
		return nil
	}
	return s.b.c.do(s.ctx, q)
}

// accept checks the head of an answer, and reads up to the range where the
// answer is the whole blob.
func (s *stream) accept(resp *http.Response) error {
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return finalf("content encoding %q where none was asked for", enc)
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		return s.acceptRange(resp)
	case http.StatusOK:
		return s.acceptWhole(resp)
	}
	return finalf("%d is no answer to a read", resp.StatusCode)
}

func (s *stream) acceptRange(resp *http.Response) error {
	v := resp.Header.Get("Content-Range")
	first, last, total, ok := parseContentRange(v)
	switch {
	case !ok || first != s.off || last < first || last >= s.end:
		return finalf("asked for bytes %d-%d, got content range %.60q", s.off, s.end-1, v)
	case total >= 0 && total != s.b.d.Size:
		return finalf("the blob has %d bytes, its descriptor says %d", total, s.b.d.Size)
	case resp.ContentLength >= 0 && resp.ContentLength != last-first+1:
		return finalf("content range %.60q with content length %d", v, resp.ContentLength)
	}
	return nil
}

func (s *stream) acceptWhole(resp *http.Response) error {
	if resp.ContentLength >= 0 && resp.ContentLength != s.b.d.Size {
		return finalf("the blob has %d bytes, its descriptor says %d", resp.ContentLength, s.b.d.Size)
	}
	if s.off > maxSkip {
		return &finalError{fmt.Errorf("%w: it sent the whole blob instead of the bytes from %d on: "+
			"use another mirror, or pull the image as a whole", ErrNoRanges, s.off)}
	}
	if _, err := io.CopyN(io.Discard, resp.Body, s.off); err != nil {
		return fmt.Errorf("skip to %d: %w", s.off, unexpected(err))
	}
	return nil
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL"; total is -1 for "*".
func parseContentRange(v string) (first, last, total int64, ok bool) {
	v, ok = strings.CutPrefix(v, "bytes ")
	if !ok {
		return
	}
	span, size, ok := strings.Cut(v, "/")
	if !ok {
		return
	}
	a, b, ok := strings.Cut(span, "-")
	if !ok {
		return
	}
	total = -1
	if size != "*" {
		if total, ok = parseOffset(size); !ok {
			return
		}
	}
	if first, ok = parseOffset(a); !ok {
		return
	}
	last, ok = parseOffset(b)
	return
}

func parseOffset(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err == nil
}

func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if s.body == nil {
			if err := s.open(); err != nil {
				return 0, s.fail(err)
			}
		}
		n, err := s.body.Read(p[:min(int64(len(p)), s.end-s.off)])
		s.off += int64(n)
		s.sinceFail += int64(n)
		if s.off == s.end {
			s.fail(io.EOF)
			return n, nil
		}
		if err != nil {
			err = s.interrupted(err)
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// interrupted is called where a body ends too early. It prepares for the rest
// to be asked for, or returns the final error.
func (s *stream) interrupted(cause error) error {
	s.drop()
	if s.ctx.Err() != nil {
		return s.fail(s.error(context.Cause(s.ctx)))
	}
	if s.once {
		return s.fail(s.error(fmt.Errorf("the body ended after %d of %d bytes: %w",
			s.off-s.start, s.end-s.start, unexpected(cause))))
	}
	if s.sinceFail >= progress {
		s.failures = 0
	}
	s.sinceFail = 0
	if s.failures++; s.failures >= s.b.c.o.Attempts {
		return s.fail(s.error(fmt.Errorf("the body ended after %d of %d bytes, %d times in a row: %w",
			s.off-s.start, s.end-s.start, s.failures, unexpected(cause))))
	}
	if err := s.b.c.sleep(s.ctx, s.b.c.backoff(s.failures)); err != nil {
		return s.fail(s.error(err))
	}
	return nil
}

func (s *stream) error(cause error) error {
	q := newRequest(s.b.ref, http.MethodGet, "blobs", s.b.d.Digest.String())
	return q.error(s.host, cause)
}

// fail ends the stream.
func (s *stream) fail(err error) error {
	s.drop()
	s.cancel()
	s.err = err
	return err
}

// drop gives up the body. One that was read to its end has given its
// connection back already.
func (s *stream) drop() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

func (s *stream) Close() error {
	if s.err == nil || errors.Is(s.err, io.EOF) {
		s.fail(fmt.Errorf("blob %s: stream is closed", s.b.d.Digest))
	}
	return nil
}
