package regtest

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxLog bounds the requests that are kept one by one; all are counted.
const maxLog = 100_000

// A Request is one that went over a link.
type Request struct {
	Start, End time.Time // End is zero while it is under way
	Method     string
	Path       string
	Query      string
	Range      string // the header
	Kind       string // manifest, tag, blob, referrers, push, ping or other
	Prefetch   bool   // by its header Purpose
	NewConn    bool
	Waited     time.Duration // of a new connection's: for the handshake
	Status     int           // 0: none was sent
	Bytes      int64         // of the response's body
}

// Stats are what went over a link since it was made or reset.
type Stats struct {
	Requests      int64
	BytesSent     int64 // bodies of responses
	BytesReceived int64 // bodies of requests
	NewConns      int64 // connections that carried a request
	Conns         int64 // connections opened, for whatever
	ByKind        map[string]int
	// SerialTime is the longest time without a break in which exactly one
	// request was in flight; SerialTotal is all such time.
	SerialTime  time.Duration
	SerialTotal time.Duration
	// Log has the requests in the order of their start, the first 100,000.
	Log []Request
}

type entry struct{ Request }

// log keeps the statistics of a link.
type log struct {
	mu       sync.Mutex // guards what follows
	stats    Stats
	entries  []*entry
	inFlight int
	alone    time.Time // since when exactly one is in flight
}

func (l *log) accepted() {
	l.mu.Lock()
	l.stats.Conns++
	l.mu.Unlock()
}

func (l *log) begin(now, arrived time.Time, r *http.Request, fresh bool) *entry {
	e := &entry{Request: Request{
		Start:    now,
		Method:   r.Method,
		Path:     r.URL.Path,
		Query:    r.URL.RawQuery,
		Range:    r.Header.Get("Range"),
		Kind:     kind(r.Method, r.URL.Path),
		NewConn:  fresh,
		Prefetch: r.Header.Get("Purpose") == "prefetch",
		Waited:   arrived.Sub(now),
	}}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Requests++
	if fresh {
		l.stats.NewConns++
	}
	if l.stats.ByKind == nil {
		l.stats.ByKind = map[string]int{}
	}
	l.stats.ByKind[e.Kind]++
	if len(l.entries) < maxLog {
		l.entries = append(l.entries, e)
	}
	l.fly(now, +1)
	return e
}

func (l *log) end(e *entry, status int, n int64) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	e.End, e.Status, e.Bytes = now, status, n
	l.fly(now, -1)
}

// fly counts requests in flight. The caller holds mu.
func (l *log) fly(now time.Time, n int) {
	if l.inFlight == 1 {
		l.stats.serial(now.Sub(l.alone))
	}
	l.inFlight += n
	l.alone = now
}

func (s *Stats) serial(d time.Duration) {
	s.SerialTotal += d
	s.SerialTime = max(s.SerialTime, d)
}

func (l *log) sent(n int) {
	l.mu.Lock()
	l.stats.BytesSent += int64(n)
	l.mu.Unlock()
}

func (l *log) received(n int) {
	l.mu.Lock()
	l.stats.BytesReceived += int64(n)
	l.mu.Unlock()
}

// Stats is a copy of what has been counted until now.
func (l *Link) Stats() Stats {
	g := &l.log
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.stats
	s.ByKind = maps.Clone(s.ByKind)
	if s.ByKind == nil {
		s.ByKind = map[string]int{}
	}
	if g.inFlight == 1 {
		s.serial(time.Since(g.alone))
	}
	s.Log = make([]Request, len(g.entries))
	for i, e := range g.entries {
		s.Log[i] = e.Request
	}
	return s
}

// Reset starts counting anew. Requests under way are in flight still, and what
// they send from now on is counted, but not they themselves.
func (l *Link) Reset() {
	g := &l.log
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stats = Stats{}
	g.entries = nil
	g.alone = time.Now()
}

// kind sorts requests by what they are for.
func kind(method, path string) string {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	switch {
	case method != http.MethodGet && method != http.MethodHead:
		return "push"
	case len(parts) == 1 && parts[0] == "v2":
		return "ping"
	case len(parts) < 4 || parts[0] != "v2":
		return "other"
	}
	what, name := parts[len(parts)-2], parts[len(parts)-1]
	switch {
	case what == "manifests" && strings.Contains(name, ":"):
		return "manifest"
	case what == "manifests":
		return "tag"
	case what == "blobs":
		return "blob"
	case what == "referrers":
		return "referrers"
	case slices.Contains(parts, "uploads"):
		return "push"
	}
	return "other"
}
