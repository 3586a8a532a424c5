package recorder

import (
	"cmp"
	"slices"
	"strings"

	"github.com/reprise-project/reprise/tracefmt"
)

// An inode is what the walk has found of a file.
type inode struct {
	paths   []string // directories' end with a slash
	extents []diskExtent
}

// A diskExtent is a part of a file on the device.
type diskExtent struct {
	at      int64 // in the file
	off, n  int64 // on the device
	encoded bool  // n is the length in the file; how long it is on the device is not known
}

// build turns what the walk has found into layer space. Where files share bytes,
// the one whose path is first in lexical order has them.
func build(inodes []*inode, links map[string]string, m DeviceMap) *Files {
	f := &Files{links: links}
	for _, in := range inodes {
		slices.Sort(in.paths)
	}
	slices.SortFunc(inodes, func(a, b *inode) int { return cmp.Compare(a.paths[0], b.paths[0]) })
	clipEncoded(inodes)
	var claimed tracefmt.Touched
	for _, in := range inodes {
		f.add(in, m, &claimed)
	}
	for _, spans := range f.layers {
		slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	}
	for i := range f.layers {
		f.layers[i] = joinSpans(f.layers[i])
	}
	slices.SortFunc(f.names, func(a, b name) int { return cmp.Compare(a.path, b.path) })
	return f
}

func (f *Files) add(in *inode, m DeviceMap, claimed *tracefmt.Touched) {
	n := len(f.files)
	v := file{path: in.paths[0]}
	slices.SortFunc(in.extents, func(a, b diskExtent) int { return cmp.Compare(a.at, b.at) })
	var parts []tracefmt.Event
	for _, e := range in.extents {
		for _, x := range m(e.off, e.n) {
			at := e.at + x.Off - e.off
			v.parts = append(v.parts, part{at: at, n: x.Len, layer: x.Layer, off: x.LayerOff})
			parts = claimed.Add(parts[:0], tracefmt.Event{Layer: x.Layer, Off: x.LayerOff, Len: x.Len, Path: v.path, FileOff: at})
			for _, p := range parts {
				f.claim(p.Layer, span{off: p.Off, end: p.Off + p.Len, at: p.FileOff, file: n})
			}
		}
	}
	f.files = append(f.files, v)
	if strings.HasSuffix(v.path, "/") {
		return
	}
	for _, p := range in.paths {
		f.names = append(f.names, name{path: p, file: n})
	}
}

func (f *Files) claim(layer int, s span) {
	for len(f.layers) <= layer {
		f.layers = append(f.layers, nil)
	}
	f.layers[layer] = append(f.layers[layer], s)
}

// joinSpans joins, in place, those that follow each other in the layer and in
// their file.
func joinSpans(in []span) []span {
	out := in[:0]
	for _, s := range in {
		if n := len(out); n > 0 && out[n-1].end == s.off && out[n-1].file == s.file && out[n-1].at+s.off-out[n-1].off == s.at {
			out[n-1].end = s.end
			continue
		}
		out = append(out, s)
	}
	return out
}

// clipEncoded gives compressed extents a length on the device: they end where
// another extent begins, at the latest.
func clipEncoded(inodes []*inode) {
	var starts []int64
	any := false
	for _, in := range inodes {
		for _, e := range in.extents {
			starts = append(starts, e.off)
			any = any || e.encoded
		}
	}
	if !any {
		return
	}
	slices.Sort(starts)
	for _, in := range inodes {
		for i := range in.extents {
			e := &in.extents[i]
			if !e.encoded {
				continue
			}
			next, _ := slices.BinarySearch(starts, e.off+1)
			if next < len(starts) {
				e.n = min(e.n, starts[next]-e.off)
			}
		}
	}
}
