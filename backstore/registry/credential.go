package registry

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// A Credential is what a registry knows somebody by. It is not shown where one is
// printed or logged.
type Credential struct {
	Username string
	Password string // or, without Username, an identity token
}

const unseen = "(a credential)"

// Format implements [fmt.Formatter].
func (Credential) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, unseen) }

// LogValue implements [slog.LogValuer].
func (Credential) LogValue() slog.Value { return slog.StringValue(unseen) }

// refusedFor is how long credentials that were refused are tried last.
const refusedFor = time.Minute

// ownAuths are a host's authorizers for repositories with credentials of their
// own, by repository.
type ownAuths struct {
	mu sync.Mutex // guards by
	by map[string]map[Credential]*auth
}

// get is an authorizer for each of the credentials; those that the repository does
// not have any more are forgotten with their tokens.
func (o *ownAuths) get(repository string, creds []Credential, fresh func(docker.AuthorizerOpt) docker.Authorizer) []*auth {
	o.mu.Lock()
	defer o.mu.Unlock()
	old, now := o.by[repository], make(map[Credential]*auth, len(creds))
	var list []*auth
	for _, cred := range creds {
		if now[cred] != nil {
			continue
		}
		a := old[cred]
		if a == nil {
			fixed := docker.WithAuthCreds(func(string) (string, string, error) { return cred.Username, cred.Password, nil })
			a = newAuth(func() docker.Authorizer { return fresh(fixed) })
		}
		now[cred] = a
		list = append(list, a)
	}
	if o.by == nil {
		o.by = map[string]map[Credential]*auth{}
	}
	o.by[repository] = now
	return list
}

// authsFor are the authorizers to try for a repository, in this order: those of
// its own credentials, then that of Docker's configuration; but those that were
// refused lately last.
func (c *Client) authsFor(h *host, ref Reference) []*auth {
	if c.o.Credentials == nil {
		return []*auth{h.auth}
	}
	creds := c.o.Credentials(ref.Name(), c.named(h.name))
	list := append(h.owned.get(ref.Name(), creds, h.fresh), h.auth)
	now := c.now().UnixNano()
	slices.SortStableFunc(list, func(a, b *auth) int { return a.refusal(now) - b.refusal(now) })
	return list
}

// refusal is 1 for what was refused lately.
func (a *auth) refusal(now int64) int {
	if a.refusedUntil.Load() > now {
		return 1
	}
	return 0
}

// asOwn asks with one of the authorizers after the other until it is not refused.
// When all are, the first refusal is the error: its credentials are the most
// likely to have been meant.
func (c *Client) asOwn(auths []*auth, q *request, h *host, ask func(*auth) (*http.Response, error)) (*http.Response, error) {
	var first *Error
	for i, a := range auths {
		resp, err := ask(a)
		e := c.refused(q, h, resp, err)
		if err == nil && e == nil {
			for _, a := range auths[:i] {
				a.refusedUntil.Store(c.now().Add(refusedFor).UnixNano())
			}
		}
		if e == nil {
			return resp, err
		}
		if first == nil {
			first = e
			first.own = a != h.auth
		}
	}
	return nil, first
}

// refused is the answer to credentials that are not good enough, else nil. ECR has
// 403 for a password that has expired.
func (c *Client) refused(q *request, h *host, resp *http.Response, err error) *Error {
	switch {
	case err != nil:
		if e := q.asError(h, err); e.Status == http.StatusUnauthorized {
			return e
		}
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden:
		return q.statusError(h, resp, c.now())
	}
	return nil
}
