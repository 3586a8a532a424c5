package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// authTimeout bounds one fetch of a token.
const authTimeout = 30 * time.Second

// auth is a host's authorizer, in generations. containerd's authorizer caches
// tokens, but also failures, and forgets an expired token only where the
// registry words its challenge so. So a token that is refused, or cannot be
// had, makes a new authorizer, and requests that failed with an older
// generation's token only take the new one. However many requests meet an
// expired token, it is fetched once.
type auth struct {
	fresh func() docker.Authorizer
	// turns, by scope, are what containerd's authorizer lacks: it looks at a
	// token's age while another request writes it.
	turns keyedLock
	// refusedUntil is when it is tried in its turn again, in Unix nanoseconds.
	refusedUntil atomic.Int64

	mu  sync.Mutex // guards what follows
	gen int
	now docker.Authorizer
}

func newAuth(fresh func() docker.Authorizer) *auth {
	return &auth{fresh: fresh, now: fresh()}
}

// authorize adds credentials to req and says of which generation.
func (a *auth) authorize(c *Client, req *http.Request) (gen int, err error) {
	a.mu.Lock()
	az, gen := a.now, a.gen
	a.mu.Unlock()
	ctx := req.Context()
	done := make(chan error, 1)
	scratch := req.Clone(ctx)
	// Whoever comes first fetches the token for all, so the fetch must not end
	// with that one request.
	if !c.start(func(closing context.Context) {
		fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), authTimeout)
		defer cancel()
		defer context.AfterFunc(closing, cancel)()
		unlock, err := a.turns.lock(fctx, strings.Join(docker.GetTokenScopes(ctx, nil), " "))
		if err == nil {
			err = az.Authorize(fctx, scratch)
			unlock()
		}
		done <- err
	}) {
		return gen, os.ErrClosed
	}
	select {
	case err := <-done:
		if err != nil {
			a.renew(gen)
			return gen, fmt.Errorf("authorize: %w", err)
		}
		if v := scratch.Header.Get("Authorization"); v != "" {
			req.Header.Set("Authorization", v)
		}
		return gen, nil
	case <-ctx.Done():
		return gen, context.Cause(ctx)
	}
}

// renew forgets all tokens of the generation.
func (a *auth) renew(gen int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gen == gen {
		a.gen++
		a.now = a.fresh()
	}
}

// challenge answers a 401 to a request of that generation. Without error, the
// request is worth sending again.
func (a *auth) challenge(ctx context.Context, resp *http.Response, gen int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gen != gen {
		return nil
	}
	az := a.fresh()
	if err := az.AddResponses(ctx, []*http.Response{resp}); err != nil {
		return err
	}
	a.gen++
	a.now = az
	return nil
}

// newCredentials reads Docker's configuration in dir, or in the usual place,
// with its credential helpers. No file means no credentials.
func newCredentials(dir string) (*credentials.DynamicStore, error) {
	if dir == "" {
		dir = os.Getenv("DOCKER_CONFIG")
	}
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, nil
		}
		dir = filepath.Join(home, ".docker")
	}
	path := filepath.Join(dir, "config.json")
	store, err := credentials.NewStore(path, credentials.StoreOptions{})
	if err != nil {
		return nil, fmt.Errorf("docker credentials: %s: %w", path, err)
	}
	return store, nil
}

// named is the registry whose address, given by Via, the host is; or the host.
func (c *Client) named(host string) string {
	if name, ok := c.viaNames[host]; ok {
		return name
	}
	return host
}

// credentials gives containerd's authorizer the user and password of a host. A
// token from `docker login` with an identity provider comes without a user.
func (c *Client) credentials(host string) (string, string, error) {
	if c.creds == nil {
		return "", "", nil
	}
	host = c.named(host)
	ctx, cancel := context.WithTimeout(c.closing, authTimeout)
	defer cancel()
	cred, err := c.creds.Get(ctx, credentials.ServerAddressFromRegistry(host))
	switch {
	case err != nil:
		return "", "", fmt.Errorf("docker credentials for %s in %s: %w", host, c.creds.ConfigPath(), err)
	case cred.RefreshToken != "":
		return "", cred.RefreshToken, nil
	case cred.Password == "" && cred.AccessToken != "":
		return "", "", errors.New("docker credentials for " + host + ": a bare registrytoken is not supported: run `docker login` again")
	}
	return cred.Username, cred.Password, nil
}
