package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// Options of a Client. The zero value is what a node usually wants.
type Options struct {
	// HostsDir holds <registry>/hosts.toml and certificates.
	// Default: /etc/containerd/certs.d.
	HostsDir string
	// PlainHTTP uses http for registries that hosts.toml does not speak of.
	// Default: https; for loopback addresses, whichever answers.
	PlainHTTP bool
	// Insecure leaves certificates unchecked.
	Insecure bool
	// DockerConfigDir holds config.json. Default: $DOCKER_CONFIG, else ~/.docker.
	DockerConfigDir string
	// Credentials, if set, are those that a repository (registry/repository) has of
	// its own at a host, which is the registry or a mirror. They are tried before
	// Docker's, in that order, and asked for with each request: what is not among
	// them any more is not used again. It is called concurrently and must be quick.
	Credentials func(repository, host string) []Credential
	// Via sends all requests for a registry to another address instead:
	// {"ghcr.io": "http://127.0.0.1:5001"}. References and credentials stay
	// those of the registry. hosts.toml is not asked.
	Via map[string]string
	// LockDir holds the locks under which fallback tags are written, while they
	// are. Default: reprise, in /run/lock for root and in the user's own directory
	// under /run/user for others; where that is missing, reprise-UID in os.TempDir.
	LockDir string

	// Attempts is how often a request, or the rest of a body, is asked for
	// before the error is returned. Default: 6.
	Attempts int
	// Backoff is the pause after the first failure; it doubles, up to 5 s, and
	// varies at random between half and the whole of it. Default: 100 ms.
	Backoff time.Duration
	// MaxRetryAfter is the longest Retry-After that is waited for; a host that
	// asks for more is an error until the time has passed. Default: 1 min.
	MaxRetryAfter time.Duration
	// StallTimeout is how long a body may give nothing while it is read before
	// the rest is asked for again. Default: 15 s.
	StallTimeout time.Duration
}

const (
	maxBackoff = 5 * time.Second
	// penalty is how long a mirror that could not be reached is asked last.
	penalty = 30 * time.Second
)

func (o *Options) fill() (Options, error) {
	var f Options
	if o != nil {
		f = *o
	}
	if f.HostsDir == "" {
		f.HostsDir = "/etc/containerd/certs.d"
	}
	if f.LockDir == "" {
		f.LockDir = lockDir()
	}
	if f.Attempts == 0 {
		f.Attempts = 6
	}
	if f.Backoff == 0 {
		f.Backoff = 100 * time.Millisecond
	}
	if f.MaxRetryAfter == 0 {
		f.MaxRetryAfter = time.Minute
	}
	if f.StallTimeout == 0 {
		f.StallTimeout = 15 * time.Second
	}
	if f.Attempts < 0 || f.Backoff < 0 || f.MaxRetryAfter < 0 || f.StallTimeout < 0 {
		return f, errors.New("registry options: negative limit")
	}
	for name, base := range f.Via {
		if u, err := url.Parse(base); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return f, fmt.Errorf("registry options: %s via %q: not an http or https address", name, base)
		}
	}
	return f, nil
}

// A Client reads and writes at registries. It is safe for concurrent use. What
// hosts.toml says of a registry is read when the registry is first asked.
type Client struct {
	o          Options
	configured docker.RegistryHosts
	creds      *credentials.DynamicStore
	viaNames   map[string]string // host of a Via address → registry
	gates      gates
	manifests  manifestCache
	updates    keyedLock
	complaints complaints

	now   func() time.Time // tests replace both
	sleep func(context.Context, time.Duration) error

	closing context.Context // ends when Close begins
	close   context.CancelFunc

	mu         sync.Mutex // guards what follows, and the making of hosts
	hosts      map[string][]*host
	transports []*lanes
	closed     bool
	wg         sync.WaitGroup // goroutines of start
}

// New makes a client; it asks nobody anything yet.
func New(o *Options) (*Client, error) {
	f, err := o.fill()
	if err != nil {
		return nil, err
	}
	c := &Client{o: f, hosts: map[string][]*host{}, viaNames: map[string]string{}, now: time.Now, sleep: sleep}
	if c.creds, err = newCredentials(f.DockerConfigDir); err != nil {
		return nil, err
	}
	for name, base := range f.Via {
		u, _ := url.Parse(base)
		c.viaNames[u.Host] = name
	}
	c.closing, c.close = context.WithCancel(context.Background())
	opts := config.HostOptions{
		HostDir:      config.HostDirFromRoot(f.HostsDir),
		UpdateClient: c.installLanes,
	}
	if f.PlainHTTP {
		opts.DefaultScheme = "http"
	}
	if f.Insecure {
		opts.DefaultTLS = &tls.Config{InsecureSkipVerify: true}
	}
	c.configured = config.ConfigureHosts(c.complaints.context(c.closing), opts)
	return c, nil
}

// Close ends what is under way and closes idle connections. It may be called
// again.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.close()
	c.wg.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.transports {
		t.CloseIdleConnections()
	}
	return nil
}

// start runs f on a goroutine that Close waits for; false once closed.
func (c *Client) start(f func(closing context.Context)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	c.wg.Go(func() { f(c.closing) })
	return true
}

// bound is ctx, ended by Close too.
func (c *Client) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.closing, func() { cancel(os.ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// A host is one address of a registry: itself, or a mirror of it.
type host struct {
	name, scheme, path string
	caps               docker.HostCapabilities
	header             http.Header // from hosts.toml
	ns                 string      // of a mirror: the registry it stands for
	origin             bool        // the registry itself
	client             *http.Client
	auth               *auth // Docker's configuration
	owned              ownAuths
	fresh              func(docker.AuthorizerOpt) docker.Authorizer
	badUntil           atomic.Int64 // Unix nanoseconds; see penalty
}

// hostsOf lists the hosts of a registry, the registry itself last.
func (c *Client) hostsOf(registry string) ([]*host, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, os.ErrClosed
	}
	if hs, ok := c.hosts[registry]; ok {
		return hs, nil
	}
	configured, err := c.configure(registry)
	if err != nil {
		return nil, fmt.Errorf("registry %s: hosts in %s: %w", registry, c.o.HostsDir, err)
	}
	hs := make([]*host, len(configured))
	for i, rh := range configured {
		hs[i] = c.newHost(registry, rh)
		hs[i].origin = i == len(configured)-1
	}
	c.hosts[registry] = hs
	return hs, nil
}

// configure asks containerd for the registry's hosts, or takes Via's address.
// The caller holds c.mu, which the hook of the transports relies on.
func (c *Client) configure(registry string) ([]docker.RegistryHost, error) {
	base, ok := c.o.Via[registry]
	if !ok {
		c.complaints.first = nil
		hosts, err := c.configured(registry)
		return hosts, errors.Join(err, c.complaints.first)
	}
	u, err := url.Parse(base)
	if err != nil {
		return nil, err
	}
	rhs, err := config.ConfigureHosts(c.complaints.context(c.closing), config.HostOptions{
		DefaultScheme: u.Scheme,
		UpdateClient:  c.installLanes,
	})(u.Host)
	for i := range rhs {
		rhs[i].Path = strings.TrimSuffix(u.Path, "/") + "/v2"
	}
	return rhs, err
}

func (c *Client) newHost(registry string, rh docker.RegistryHost) *host {
	transport := rh.Client.Transport
	h := &host{
		name:   rh.Host,
		scheme: rh.Scheme,
		path:   rh.Path,
		caps:   rh.Capabilities,
		header: rh.Header,
		client: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	_, via := c.viaNames[rh.Host]
	if rh.Host != registry && !via && (registry != "docker.io" || rh.Host != "registry-1.docker.io") {
		h.ns = registry
	}
	h.fresh = func(creds docker.AuthorizerOpt) docker.Authorizer { return authorizer(rh, creds) }
	h.auth = newAuth(func() docker.Authorizer { return h.fresh(docker.WithAuthCreds(c.credentials)) })
	return h
}

func authorizer(rh docker.RegistryHost, creds docker.AuthorizerOpt) docker.Authorizer {
	opts := []docker.AuthorizerOpt{
		docker.WithAuthClient(&http.Client{Transport: rh.Client.Transport}),
		creds,
	}
	if len(rh.Header) > 0 {
		opts = append(opts, docker.WithAuthHeader(rh.Header))
	}
	return docker.NewDockerAuthorizer(opts...)
}

// Resolver is containerd's own, with the client's configuration and credentials,
// for what containerd's client does.
func (c *Client) Resolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: c.authorized})
}

// authorized are the hosts of a registry with their authorizers.
func (c *Client) authorized(registry string) ([]docker.RegistryHost, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, os.ErrClosed
	}
	hosts, err := c.configure(registry)
	if err != nil {
		return nil, fmt.Errorf("registry %s: hosts in %s: %w", registry, c.o.HostsDir, err)
	}
	for i := range hosts {
		hosts[i].Authorizer = authorizer(hosts[i], docker.WithAuthCreds(c.credentials))
	}
	return hosts, nil
}

// complaints is where containerd's host configuration logs to. A hosts.toml that
// cannot be read is nothing else to it, and it goes on without; here it is an
// error. It is guarded by Client.mu.
type complaints struct{ first error }

func (p *complaints) context(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.ErrorLevel)
	l.AddHook(p)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

func (p *complaints) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

func (p *complaints) Fire(e *logrus.Entry) error {
	if p.first == nil {
		p.first = fmt.Errorf("%s: %v", e.Message, e.Data[logrus.ErrorKey])
	}
	return nil
}

// gates are closed for hosts that have said Retry-After.
type gates struct {
	mu   sync.Mutex // guards open
	open map[string]time.Time
}

// wait is how long the host stays closed.
func (g *gates) wait(host string, now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	t, ok := g.open[host]
	if !ok {
		return 0
	}
	if d := t.Sub(now); d > 0 {
		return d
	}
	delete(g.open, host)
	return 0
}

func (g *gates) shut(host string, until time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		g.open = map[string]time.Time{}
	}
	if g.open[host].Before(until) {
		g.open[host] = until
	}
}

// backoff is the pause after that many failures, from 1.
func (c *Client) backoff(failures int) time.Duration {
	d := c.o.Backoff
	for range failures - 1 {
		if d *= 2; d >= maxBackoff {
			d = maxBackoff
			break
		}
	}
	return d/2 + rand.N(d/2+1)
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// manifestCache keeps the last manifests that were read, by digest, so that one
// that came with its tag is not asked for again.
type manifestCache struct {
	mu    sync.Mutex // guards what follows
	byID  map[digest.Digest]cached
	order []digest.Digest // oldest first
	size  int
}

type cached struct {
	mediaType string
	raw       []byte
}

const maxManifestCache = 16 << 20 // bytes

func (m *manifestCache) get(d digest.Digest) (cached, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.byID[d]
	return e, ok
}

func (m *manifestCache) put(d digest.Digest, e cached) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.byID == nil {
		m.byID = map[digest.Digest]cached{}
	}
	if _, ok := m.byID[d]; ok {
		return
	}
	m.byID[d] = e
	m.order = append(m.order, d)
	m.size += len(e.raw)
	for m.size > maxManifestCache {
		m.size -= len(m.byID[m.order[0]].raw)
		delete(m.byID, m.order[0])
		m.order = m.order[1:]
	}
}

func (m *manifestCache) drop(d digest.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.byID[d]
	if !ok {
		return
	}
	delete(m.byID, d)
	m.order = slices.DeleteFunc(m.order, func(x digest.Digest) bool { return x == d })
	m.size -= len(e.raw)
}
