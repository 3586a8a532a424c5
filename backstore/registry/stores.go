package registry

import (
	"net/url"
	"sync"
	"time"
)

// redirectAge is how long a blob store's address is used again. They are
// signed, mostly for 10 to 60 minutes.
const redirectAge = 10 * time.Minute

// stores are where the hosts of a registry have redirected reads of one blob
// to. They need no credentials: the address itself is the permission, for as
// long as it works.
type stores struct {
	mu sync.Mutex // guards at
	at map[*host]store
}

type store struct {
	u     *url.URL
	until time.Time
}

// get is the address that h redirects to, or nil.
func (s *stores) get(h *host, now time.Time) *url.URL {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st, ok := s.at[h]; ok && now.Before(st.until) {
		return st.u
	}
	return nil
}

// put keeps the address that has answered, if it is not h's own.
func (s *stores) put(h *host, u *url.URL, now time.Time) {
	if h.own(u) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if st, ok := s.at[h]; ok && *st.u == *u {
		return // its age counts from when it was given
	}
	if s.at == nil {
		s.at = map[*host]store{}
	}
	s.at[h] = store{u: u, until: now.Add(redirectAge)}
}

// forget drops an address that did not work, unless there is a newer one.
func (s *stores) forget(h *host, u *url.URL) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st, ok := s.at[h]; ok && *st.u == *u {
		delete(s.at, h)
	}
}
