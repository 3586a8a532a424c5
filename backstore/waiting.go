package backstore

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// A Wait is a fetch that demand reads wait for.
type Wait struct {
	Layer    int // 0 is the bottom layer
	Blob     digest.Digest
	Host     string    // the registry, as in [Fetcher].Host
	Off, Len int64     // what is still to come, in blob space
	Since    time.Time // when the first of the reads began to wait
	Attempts int       // requests sent
	Err      error     // of the last attempt, nil if none has failed since bytes came last
}

// String is one line for people.
func (w Wait) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s for %v: [%d, +%d), attempt %d", w.Host, time.Since(w.Since).Round(time.Millisecond), w.Off, w.Len, w.Attempts)
	if w.Err != nil {
		fmt.Fprintf(&b, ", the last one: %v", w.Err)
	}
	return b.String()
}

// Waiting lists the fetches that demand reads wait for at present, those that
// are waited for longest first. Images of the process that share a blob share
// its fetches.
func (im *Image) Waiting() []Wait {
	var all []Wait
	for i, l := range im.layers {
		if l.blob == nil {
			continue
		}
		for _, w := range l.blob.waiting() {
			w.Layer = i
			all = append(all, w)
		}
	}
	slices.SortFunc(all, func(a, b Wait) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Off, b.Off)) })
	return all
}

func (b *Blob) waiting() []Wait {
	b.mu.Lock()
	flights := slices.Concat(b.flights, b.asides)
	b.mu.Unlock()
	var ws []Wait
	for _, f := range flights {
		f.mu.Lock()
		if f.wanted > 0 && !f.done {
			ws = append(ws, Wait{
				Blob: b.digest, Host: b.origin.Host(), Off: f.pos, Len: f.end - f.pos,
				Since: f.since, Attempts: f.attempts, Err: f.last,
			})
		}
		f.mu.Unlock()
	}
	return ws
}

// explained is how many segments Explain names.
const explained = 8

// Explain says in one line where the bytes [off, off+n) of the device are: the
// layers and blob ranges behind them, whether they are on this node, and which
// fetch they wait for. It neither waits nor fetches.
func (im *Image) Explain(off, n int64) string {
	if off < 0 || n <= 0 || off >= im.size {
		return fmt.Sprintf("[%d, +%d) is outside of the device of %d bytes", off, n, im.size)
	}
	n = min(n, im.size-off)
	segs := im.lookup(nil, off, n)
	parts := make([]string, 0, explained+1)
	for i, g := range segs {
		if i == explained {
			parts = append(parts, fmt.Sprintf("and %d more", len(segs)-i))
			break
		}
		parts = append(parts, fmt.Sprintf("[%d, +%d) %s", g.Off, g.Len, im.explain(g)))
	}
	return strings.Join(parts, "; ")
}

func (im *Image) explain(g lsmt.Segment) string {
	switch {
	case g.Kind != lsmt.Data:
		return "zeros"
	case g.Layer == len(im.layers):
		return "writable layer"
	}
	l := im.layers[g.Layer]
	where := fmt.Sprintf("layer %d %s", g.Layer, l.info.Name)
	if l.blob == nil {
		return where
	}
	off, n := l.blobRange(g.LayerOff, g.Len)
	where = fmt.Sprintf("%s blob [%d, +%d)", where, off, n)
	if l.blob.has(off, n) {
		return where + " on this node"
	}
	for _, w := range l.blob.waiting() {
		if w.Off < off+n && off < w.Off+w.Len {
			return where + " waits for " + w.String()
		}
	}
	return where + " not on this node"
}
