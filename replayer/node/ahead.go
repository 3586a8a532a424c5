package node

import (
	"context"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

// Traces that are looked up while an image is being pulled are kept for the first
// device of the image: then its replay begins with the opening. What was not found
// is looked up again.
const (
	aheadKept = 10 * time.Minute
	aheadMost = 32 // traces
)

// aheads are traces that were looked up before their images are opened.
type aheads struct {
	mu    sync.Mutex // guards found
	found map[aheadKey]ahead
}

type aheadKey struct {
	repository string
	manifest   digest.Digest
	workload   string
}

type ahead struct {
	trace *tracefmt.Trace
	why   string
	until time.Time
}

// Ahead looks for the trace that a device will replay that is made of the same
// request soon, and keeps it for some minutes. No device is made, and the error
// matters to nobody but a log.
func (s *Server) Ahead(ctx context.Context, r *Request) error {
	if s.broken != nil || r.Trace != "auto" {
		return s.broken
	}
	n, err := s.n.with(r, s.o.Log)
	if err != nil {
		return err
	}
	defer n.client.Close()
	return n.lookAhead(ctx, r)
}

func (n *Node) lookAhead(ctx context.Context, r *Request) error {
	src, err := n.source(r.place())
	if err != nil {
		return err
	}
	m, err := src.manifest(ctx)
	if err != nil {
		return err
	}
	im := &Image{Ref: r.place(), Manifest: m.digest, node: n}
	if err := im.readConfig(ctx, src, m); err != nil {
		return err
	}
	o := r.imageOptions()
	o.accel = src.accelerator(m)
	t, why, err := n.findBeside(ctx, im, m.digest, o, closed)
	if err != nil || t == nil {
		return err
	}
	n.ahead.put(im.aheadKey(m.digest, im.workload(o)), ahead{t, why, time.Now().Add(aheadKept)})
	return nil
}

func (im *Image) aheadKey(manifest digest.Digest, workload string) aheadKey {
	k := aheadKey{im.Ref, manifest, workload}
	if r, err := registry.ParseReference(im.Ref); err == nil {
		k.repository = r.Name()
	}
	return k
}

func (a *aheads) put(k aheadKey, found ahead) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for other, f := range a.found {
		if time.Now().After(f.until) || len(a.found) >= aheadMost {
			delete(a.found, other)
		}
	}
	if a.found == nil {
		a.found = map[aheadKey]ahead{}
	}
	a.found[k] = found
}

// get is a trace that was found, nil if none was.
func (a *aheads) get(k aheadKey) (*tracefmt.Trace, string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f, there := a.found[k]
	if !there || time.Now().After(f.until) {
		return nil, ""
	}
	return f.trace, f.why
}
