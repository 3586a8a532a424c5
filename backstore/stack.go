package backstore

import (
	"fmt"
	"slices"
	"time"
)

// A Stack is the blobs of an image's layers, bottom first, nil for a layer that
// is a file. Its methods do not need the layers to be open.
type Stack []*Blob

// Blobs are those of sources. They are the sources' to close.
func Blobs(sources []LayerSource) Stack {
	s := make(Stack, len(sources))
	for i := range sources {
		s[i] = sources[i].Blob
	}
	return s
}

// Blobs are those of the image's layers. They are the image's to close.
func (im *Image) Blobs() Stack {
	s := make(Stack, len(im.layers))
	for i, l := range im.layers {
		s[i] = l.blob
	}
	return s
}

// Stats are the figures of the blobs so far, without those of demand reads.
func (s Stack) Stats() Stats {
	var st Stats
	for _, b := range s {
		if b != nil {
			b.addStats(&st)
		}
	}
	return st
}

// link is that of the first blob: one image, one registry. It is nil where all
// layers are files.
func (s Stack) link() *link {
	for _, b := range s {
		if b != nil {
			return b.link
		}
	}
	return nil
}

func (s Stack) check(w Want) error {
	if w.Layer < 0 || w.Layer >= len(s) {
		return fmt.Errorf("prefetch: layer %d of %d", w.Layer, len(s))
	}
	if b := s[w.Layer]; b != nil && (w.Off < 0 || w.Len < 0 || w.Len > b.size || w.Off > b.size-w.Len) {
		return fmt.Errorf("prefetch: [%d, +%d) is outside of blob %s of %d bytes", w.Off, w.Len, b.digest, b.size)
	}
	return nil
}

// planned is a blob's part in a running Prefetch.
type planned struct {
	plan  Plan
	layer int
}

// Has reports whether all of w is on this node; a local file always is.
func (s Stack) Has(w Want) bool {
	if s.check(w) != nil {
		return false
	}
	b := s[w.Layer]
	return b == nil || b.has(w.Off, w.Len)
}

// Watch makes p known to the reads of the blobs, which pull forward what it has
// around them, until the function returned is called. [Stack.Prefetch] does
// that by itself. Images that share a blob may have plans for it at the same
// time.
func (s Stack) Watch(p Plan) (forget func()) {
	all := make([]*planned, len(s))
	for i, b := range s {
		if b != nil {
			all[i] = &planned{p, i}
			b.mu.Lock()
			b.plans = append(b.plans, all[i])
			b.mu.Unlock()
		}
	}
	return func() {
		for i, b := range s {
			if b != nil {
				b.mu.Lock()
				b.plans = slices.DeleteFunc(b.plans, func(q *planned) bool { return q == all[i] })
				b.mu.Unlock()
			}
		}
	}
}

// recently is for how long a container that has waited for bytes is taken for
// one that still does.
const recently = 500 * time.Millisecond

// waited reports whether a read has missed since then.
func (s Stack) waited(since time.Time) bool {
	return slices.ContainsFunc(s, func(b *Blob) bool { return b != nil && b.waited.Load() >= since.UnixNano() })
}
