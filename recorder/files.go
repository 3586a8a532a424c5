package recorder

import (
	"cmp"
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/reprise-project/reprise/tracefmt"
)

// An Extent is a part of a device that lies in a layer.
type Extent struct {
	Layer    int   // index, bottom first
	LayerOff int64 // bytes, in layer space
	Off, Len int64 // bytes, in device space
}

// A DeviceMap returns what of the n bytes of a device at off lies in layers, in
// order of the device. What is in no layer (holes, which read as zeros, and
// what is beyond the device) is left out.
type DeviceMap func(off, n int64) []Extent

// Files says which bytes of an image's layers belong to which of its files. The
// last block of a file is its own up to the block's end. Directories are named
// as their path with a slash behind it, where the file system tells their blocks;
// other metadata (inodes, bitmaps, the blocks that list extents) has no name.
//
// Files are immutable, and safe for concurrent use.
type Files struct {
	layers [][]span // sorted, they do not overlap
	files  []file   // in order of their paths
	names  []name   // of regular files, in order
	links  map[string]string

	skipped int
	cause   error
}

// A span is the bytes [off, end) of a layer, which are those of a file at at.
type span struct {
	off, end int64
	at       int64
	file     int
}

// A file is an inode: its first path in lexical order, and where its bytes are.
type file struct {
	path  string
	parts []part // in order of the file
}

// A part of a file, n bytes at at, is in a layer at off.
type part struct {
	at, n int64
	layer int
	off   int64
}

// A name is a path of a regular file, of which it may have several.
type name struct {
	path string
	file int
}

// Len returns how many files are known, hard links counted once, directories
// not at all.
func (f *Files) Len() int {
	n := 0
	for i := range f.files {
		if !strings.HasSuffix(f.files[i].path, "/") {
			n++
		}
	}
	return n
}

// Skipped returns how many files or directories could not be looked at, and why
// the first of them could not.
func (f *Files) Skipped() (int, error) { return f.skipped, f.cause }

// Bounds on the names that a trace is given, well below what a trace may have.
const (
	maxNames     = 1 << 17
	maxNameBytes = 8 << 20
)

// Annotate splits the events of a trace where files begin and end, and sets Path
// and FileOff of the parts that belong to a file. The trace must be in layer
// space, and its layers those that the files were mapped with. What would make
// the trace larger than a trace may be stays as it is. The totals of t.End
// follow.
func (f *Files) Annotate(t *tracefmt.Trace) {
	if t.Space == tracefmt.DeviceSpace {
		return
	}
	a := annotating{f: f, room: tracefmt.MaxEvents - len(t.Events), named: make([]bool, len(f.files))}
	out := make([]tracefmt.Event, 0, len(t.Events))
	for i := range t.Events {
		out = a.add(out, &t.Events[i])
	}
	t.Events = out
	count(t)
}

// count sets the totals of the trace's end.
func count(t *tracefmt.Trace) {
	if t.End == nil {
		return
	}
	end := *t.End
	end.Events, end.Bytes = len(t.Events), 0
	for i := range t.Events {
		end.Bytes += t.Events[i].Len
	}
	t.End = &end
}

// annotating is what is left of a trace's bounds.
type annotating struct {
	f     *Files
	room  int // for more events
	named []bool
	names int
	bytes int
}

// add appends the parts of an event.
func (a *annotating) add(dst []tracefmt.Event, e *tracefmt.Event) []tracefmt.Event {
	spans := a.f.of(e.Layer)
	i := sort.Search(len(spans), func(i int) bool { return spans[i].end > e.Off })
	from, end := len(dst), e.Off+e.Len
	for at := e.Off; at < end; {
		p := *e
		p.Off, p.Len = at, end-at
		if p.Path != "" {
			p.FileOff += at - e.Off
		}
		switch {
		case i == len(spans) || spans[i].off >= end:
		case spans[i].off > at:
			p.Len = spans[i].off - at
		default:
			s := &spans[i]
			p.Len = min(end, s.end) - at
			if a.name(s.file) {
				p.Path, p.FileOff = a.f.files[s.file].path, s.at+at-s.off
			}
			i++
		}
		at += p.Len
		dst = append(dst, p)
	}
	if more := len(dst) - from - 1; more <= a.room {
		a.room -= max(more, 0)
		return dst
	}
	return append(dst[:from], *e)
}

// name tells whether the trace may hold one more event of the file.
func (a *annotating) name(file int) bool {
	if a.named[file] {
		return true
	}
	n := len(a.f.files[file].path)
	if a.names == maxNames || a.bytes+n > maxNameBytes {
		return false
	}
	a.named[file] = true
	a.names, a.bytes = a.names+1, a.bytes+n
	return true
}

func (f *Files) of(layer int) []span {
	if layer < 0 || layer >= len(f.layers) {
		return nil
	}
	return f.layers[layer]
}

// Events gives the bytes of layers that accesses to files read, in the order of
// the accesses. A path may be a pattern as of [path.Match], with "**" for any
// number of directories, and may lead through symbolic links of the image; that
// of a directory stands for all files below it. missing lists the paths that name
// nothing. There are at most tracefmt.MaxEvents events.
func (f *Files) Events(accesses []tracefmt.Access) (events []tracefmt.Event, missing []string) {
	for i := range accesses {
		a := &accesses[i]
		found := f.find(a.Path)
		if len(found) == 0 {
			missing = append(missing, a.Path)
		}
		for _, file := range found {
			events = f.files[file].read(events, a)
		}
		if len(events) >= tracefmt.MaxEvents {
			return events[:tracefmt.MaxEvents], missing
		}
	}
	return events, missing
}

// read appends what an access reads of the file.
func (f *file) read(dst []tracefmt.Event, a *tracefmt.Access) []tracefmt.Event {
	from, to := max(a.Off, 0), int64(1)<<62
	if a.Len > 0 && a.Len < to-from {
		to = from + a.Len
	}
	for _, p := range f.parts {
		lo, hi := max(p.at, from), min(p.at+p.n, to)
		if lo < hi {
			dst = append(dst, tracefmt.Event{
				At: max(a.At, 0), Layer: p.layer, Off: p.off + lo - p.at, Len: hi - lo, Path: f.path, FileOff: lo,
			})
		}
	}
	return dst
}

// find returns the files that a path or pattern names, each once.
func (f *Files) find(p string) []int {
	p = path.Clean("/" + p)
	if found := f.at(p); len(found) > 0 {
		return found
	}
	if real := f.resolve(p); real != p {
		if found := f.at(real); len(found) > 0 {
			return found
		}
	}
	if !strings.ContainsAny(p, `*?[\`) {
		return nil
	}
	return f.match(p)
}

// at returns the file at a path, or those below it.
func (f *Files) at(p string) []int {
	if i, ok := f.lookup(p); ok {
		return []int{f.names[i].file}
	}
	below := strings.TrimSuffix(p, "/") + "/"
	i, _ := f.lookup(below)
	var found []int
	for ; i < len(f.names) && strings.HasPrefix(f.names[i].path, below); i++ {
		found = append(found, f.names[i].file)
	}
	return once(found)
}

func (f *Files) lookup(p string) (int, bool) {
	return slices.BinarySearchFunc(f.names, p, func(n name, p string) int { return cmp.Compare(n.path, p) })
}

// match returns the files that the pattern, or a directory that it matches,
// leads to.
func (f *Files) match(pattern string) []int {
	parts := strings.Split(pattern, "/")
	var found []int
	for i := range f.names {
		if matches(parts, strings.Split(f.names[i].path, "/")) {
			found = append(found, f.names[i].file)
		}
	}
	return once(found)
}

// matches tells whether a pattern matches a path, or a directory above it. Both
// are split at slashes.
func matches(pattern, p []string) bool {
	// reach[i] tells whether the first i parts of the pattern match what has been
	// looked at of the path.
	reach := make([]bool, len(pattern)+1)
	reach[0] = true
	for _, name := range p {
		// Leaving "**" out takes nothing of the path.
		for i, s := range pattern {
			if s == "**" && reach[i] {
				reach[i+1] = true
			}
		}
		for i := len(pattern) - 1; i >= 0; i-- {
			ok, _ := path.Match(pattern[i], name)
			deep := pattern[i] == "**"
			reach[i+1] = reach[i] && (ok || deep) || reach[i+1] && deep
		}
		reach[0] = false
		if reach[len(pattern)] {
			return true
		}
	}
	return false
}

// once sorts files, which are in order of their paths, and drops repetitions.
func once(found []int) []int {
	slices.Sort(found)
	return slices.Compact(found)
}

// maxLinks is how many symbolic links a path may lead through, as in Linux.
const maxLinks = 40

// resolve follows the symbolic links of the image that are on the way to p,
// which is absolute and clean.
func (f *Files) resolve(p string) string {
	done, rest := "/", strings.Split(p[1:], "/")
	for links := 0; len(rest) > 0; {
		next := path.Join(done, rest[0])
		rest = rest[1:]
		to, ok := f.links[next]
		if !ok {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return p
		}
		if !path.IsAbs(to) {
			to = path.Join(done, to)
		}
		// From the root again: what the link says may lead through links too.
		rest = append(strings.Split(path.Clean(to)[1:], "/"), rest...)
		done = "/"
	}
	return done
}
