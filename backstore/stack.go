package backstore

import "fmt"

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

// estimate is that of the first blob's host: one image, one registry.
func (s Stack) estimate() Estimate {
	for _, b := range s {
		if b != nil {
			return b.link.estimate()
		}
	}
	return Estimate{}
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

func (s Stack) setPlan(p Plan) {
	for i, b := range s {
		if b == nil {
			continue
		}
		b.mu.Lock()
		if b.planned = nil; p != nil {
			b.planned = &planned{p, i}
		}
		b.mu.Unlock()
	}
}
