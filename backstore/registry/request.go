package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"

	"github.com/reprise-project/reprise/backstore"
)

const (
	maxRedirects  = 5
	maxChallenges = 2 // 401s of one request: the first one, and an expired token
	userAgent     = "reprise"
)

// A request is what is asked of whichever host of a registry answers.
type request struct {
	ref    Reference
	object string // what it is about, for errors
	method string
	path   string // below the repository: "blobs/sha256:…"
	query  url.Values
	header http.Header
	lane   backstore.Lane
	caps   docker.HostCapabilities // which hosts may be asked
	scopes []string                // beside the one for the repository itself
	body   func() (io.ReadCloser, error)
	size   int64
	once   bool // neither tried again nor held back at a gate: an error instead

	// stores are asked before the host itself, without credentials. May be nil.
	stores *stores
	// use takes a 2xx answer with its body. An error counts as the host's.
	use func(h *host, resp *http.Response) error
}

// newRequest is a request about a tag or digest ("manifests", "sha256:…").
func newRequest(ref Reference, method, kind, object string) *request {
	q := &request{
		ref:    ref,
		method: method,
		path:   kind + "/" + object,
		header: http.Header{},
		caps:   docker.HostCapabilityPull,
	}
	sep := ":"
	if strings.Contains(object, ":") {
		sep = "@"
	}
	q.object = ref.Repository + sep + object
	if q.writes() {
		q.lane = laneUpload
		q.caps = docker.HostCapabilityPush
	}
	return q
}

func (q *request) writes() bool { return q.method != http.MethodGet && q.method != http.MethodHead }

// do asks the registry's hosts in turn, and again while it may help. The error
// is an *Error, or wraps one, or is about the configuration.
func (c *Client) do(ctx context.Context, q *request) error {
	hosts, err := c.hostsFor(q)
	if err != nil {
		return err
	}
	for failures := 1; ; failures++ {
		err := c.round(ctx, q, hosts)
		if err == nil || q.once || failures >= c.o.Attempts || !isTransient(err) {
			return err
		}
		if cause := c.sleep(ctx, c.backoff(failures)); cause != nil {
			return q.error(nil, cause)
		}
	}
}

// call is do for requests whose answer is used up when it returns.
func (c *Client) call(ctx context.Context, q *request) error {
	ctx, cancel := c.bound(ctx)
	defer cancel()
	return c.do(ctx, q)
}

// hostsFor lists the hosts that may be asked, those out of reach last.
func (c *Client) hostsFor(q *request) ([]*host, error) {
	all, err := c.hostsOf(q.ref.Registry)
	if err != nil {
		return nil, err
	}
	var good, bad []*host
	now := c.now().UnixNano()
	for _, h := range all {
		switch {
		case !h.caps.Has(q.caps):
		case h.badUntil.Load() > now:
			bad = append(bad, h)
		default:
			good = append(good, h)
		}
	}
	if hosts := append(good, bad...); len(hosts) > 0 {
		return hosts, nil
	}
	return nil, fmt.Errorf("registry %s: no host may be asked to %s %s: see its hosts.toml in %s: %w",
		q.ref.Registry, strings.ToLower(q.method), q.object, c.o.HostsDir, errdefs.ErrFailedPrecondition)
}

// round asks each host once. Of several failures it returns the registry's own
// if that is definite, else one that may pass, else the last.
func (c *Client) round(ctx context.Context, q *request, hosts []*host) error {
	ctx = q.scoped(ctx)
	var worst *Error
	for i, h := range hosts {
		err := c.ask(ctx, q, h, i == len(hosts)-1)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return q.error(h, &finalError{context.Cause(ctx)})
		}
		if err.unreachable() {
			h.badUntil.Store(c.now().Add(penalty).UnixNano())
		}
		if h.origin && err.Status != 0 && !err.transient() {
			return err
		}
		if worst == nil || err.transient() || !worst.transient() {
			worst = err
		}
	}
	return worst
}

// scoped names in ctx what a token is to be good for.
func (q *request) scoped(ctx context.Context) context.Context {
	actions := ":pull"
	if q.writes() {
		actions = ":pull,push"
		if q.method == http.MethodDelete {
			actions = ":delete,pull,push"
		}
	}
	ctx = docker.WithScope(ctx, "repository:"+q.ref.Repository+actions)
	for _, s := range q.scopes {
		ctx = docker.WithScope(ctx, s)
	}
	return withLane(ctx, q.lane)
}

// ask asks one host. It waits for a host that asked for patience only where
// there is no other to turn to.
func (c *Client) ask(ctx context.Context, q *request, h *host, last bool) *Error {
	if c.askStore(ctx, q, h) {
		return nil
	}
	if !last && c.gates.wait(h.name, c.now()) > 0 {
		e := q.error(h, errors.New("has asked for patience"))
		e.Status = http.StatusTooManyRequests
		return e
	}
	resp, err := c.send(ctx, q, h, h.url(q))
	if err != nil {
		return q.asError(h, err)
	}
	if resp.StatusCode/100 != 2 {
		e := q.statusError(h, resp, c.now())
		c.note(e, resp.Request.URL.Host)
		return e
	}
	if q.stores != nil {
		q.stores.put(h, resp.Request.URL, c.now())
	}
	return q.used(h, resp)
}

// askStore asks where h has redirected to before. If that does not work, for
// whatever reason, h is to be asked again.
func (c *Client) askStore(ctx context.Context, q *request, h *host) bool {
	if q.stores == nil {
		return false
	}
	u := q.stores.get(h, c.now())
	if u == nil {
		return false
	}
	resp, err := c.hop(ctx, q, h, u, false)
	if err == nil && resp.StatusCode/100 == 2 && q.used(h, resp) == nil {
		return true
	}
	if err == nil && resp.StatusCode/100 != 2 {
		c.note(q.statusError(h, resp, c.now()), u.Host)
	}
	q.stores.forget(h, u)
	return false
}

// used hands the answer over. A nil use only wants to know that there was one.
func (q *request) used(h *host, resp *http.Response) *Error {
	if q.use == nil {
		resp.Body.Close()
		return nil
	}
	if err := q.use(h, resp); err != nil {
		return q.asError(h, err)
	}
	return nil
}

// note shuts the gate of a host that asks for patience.
func (c *Client) note(e *Error, host string) {
	if e.Status != http.StatusTooManyRequests && e.Status != http.StatusServiceUnavailable {
		return
	}
	if e.retryAfter > 0 {
		c.gates.shut(host, c.now().Add(e.retryAfter))
	}
}

// pass waits at the host's gate.
func (c *Client) pass(ctx context.Context, q *request, host string) error {
	for {
		d := c.gates.wait(host, c.now())
		if d == 0 {
			return nil
		}
		if q.once || d > c.o.MaxRetryAfter {
			return &patienceError{host, d}
		}
		if err := c.sleep(ctx, d); err != nil {
			return err
		}
	}
}

// url is the address of q at h.
func (h *host) url(q *request) *url.URL {
	u := &url.URL{Scheme: h.scheme, Host: h.name, Path: path.Join("/", h.path, q.ref.Repository, q.path)}
	if strings.HasSuffix(q.path, "/") {
		u.Path += "/"
	}
	query := url.Values{}
	for k, v := range q.query {
		query[k] = v
	}
	if h.ns != "" {
		query.Set("ns", h.ns)
	}
	u.RawQuery = query.Encode()
	return u
}

// own says whether u is at the host, so that credentials may go there.
func (h *host) own(u *url.URL) bool {
	return u.Scheme == h.scheme && strings.EqualFold(u.Host, h.name)
}

// send asks at u, with credentials where u is the host's own, and follows
// redirects. Any status but those is the caller's.
func (c *Client) send(ctx context.Context, q *request, h *host, u *url.URL) (*http.Response, error) {
	for range maxRedirects + 1 {
		resp, err := c.hop(ctx, q, h, u, h.own(u))
		if err != nil {
			return nil, err
		}
		next := redirect(q, resp)
		if next == nil {
			return resp, nil
		}
		drain(resp.Body)
		u = next
	}
	return nil, finalf("more than %d redirects", maxRedirects)
}

// redirect is where resp points, or nil.
func redirect(q *request, resp *http.Response) *url.URL {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther:
		if q.writes() {
			return nil
		}
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil
	}
	u, err := resp.Location()
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil
	}
	return u
}

// hop is one request to one address, with the host's credentials if authorized.
func (c *Client) hop(ctx context.Context, q *request, h *host, u *url.URL, authorized bool) (*http.Response, error) {
	if !authorized {
		return c.hopAs(ctx, q, h, u, nil)
	}
	auths := c.authsFor(h, q.ref)
	if len(auths) == 1 {
		return c.hopAs(ctx, q, h, u, auths[0])
	}
	return c.asOwn(auths, q, h, func(a *auth) (*http.Response, error) { return c.hopAs(ctx, q, h, u, a) })
}

// hopAs is one request, and again after a challenge to a, which may be nil.
func (c *Client) hopAs(ctx context.Context, q *request, h *host, u *url.URL, a *auth) (*http.Response, error) {
	for challenges := 0; ; challenges++ {
		if err := c.pass(ctx, q, u.Host); err != nil {
			return nil, err
		}
		w := watch(ctx, c.o.StallTimeout)
		req, err := q.build(w.ctx, h, u)
		if err != nil {
			w.cancel(nil)
			return nil, err
		}
		var gen int
		if a != nil {
			if gen, err = a.authorize(c, req); err != nil {
				closeBody(req)
				w.cancel(nil)
				return nil, q.authorizeError(h, err)
			}
		}
		resp, err := h.client.Do(req)
		if err != nil {
			w.cancel(nil)
			return nil, transportError(err)
		}
		resp.Body = w.start(resp.Body)
		if resp.StatusCode != http.StatusUnauthorized || a == nil || challenges == maxChallenges {
			return resp, nil
		}
		if err := a.challenge(ctx, resp, gen); err != nil {
			e := q.statusError(h, resp, c.now())
			e.Err = err
			return nil, e
		}
		drain(resp.Body)
	}
}

func (q *request) build(ctx context.Context, h *host, u *url.URL) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, q.method, u.String(), nil)
	if err != nil {
		return nil, &finalError{err}
	}
	for k, v := range q.header {
		req.Header[k] = v
	}
	if h.own(u) {
		for k, v := range h.header {
			req.Header[http.CanonicalHeaderKey(k)] = v
		}
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", userAgent)
	}
	req.Header.Set("Accept-Encoding", "identity")
	if q.body != nil {
		if req.Body, err = q.body(); err != nil {
			return nil, &finalError{err}
		}
		req.GetBody = q.body
		req.ContentLength = q.size
		if q.size == 0 {
			req.Body.Close()
			req.Body = http.NoBody
		}
	}
	return req, nil
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		req.Body.Close()
	}
}

// drain reads a small rest so that the connection can be used again.
func drain(body io.ReadCloser) {
	io.CopyN(io.Discard, body, maxErrorBody)
	body.Close()
}

// unexpected makes the end of what must not end an error that nobody takes for
// the end of a stream.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// transportError strips the address, which may hold a signature, from the
// error of a request without an answer.
func transportError(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return unexpected(err)
}
