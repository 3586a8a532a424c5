package compare

import (
	"cmp"
	"io/fs"
	"math"
	"path"
	"slices"
	"strings"
)

// demoRootLinks are the root folder's symbolic links into usr.
var demoRootLinks = []string{"bin", "lib", "lib64", "sbin"}

// The layers, bottom first. Those between base and python share what the bound on size leaves.
const (
	layerBase = iota
	layerLibraries
	layerRuntimes
	layerTools
	layerShare
	layerPython
	layerApp
	demoLayers
)

var demoLayerNames = [demoLayers]string{
	layerBase:      "base system: loader, libraries and programs that every start needs",
	layerLibraries: "shared libraries",
	layerRuntimes:  "compilers, interpreters and their files",
	layerTools:     "programs",
	layerShare:     "shared data",
	layerPython:    "Python and its standard library",
	layerApp:       "the application",
}

// layerOf says where an entry belongs; -1 for nowhere.
func (t *demoTree) layerOf(e demoEntry) int {
	name := e.path
	switch {
	case t.base[name]:
		return layerBase
	case t.isPython(name):
		return layerPython
	case strings.HasPrefix(name, "usr/bin/"), strings.HasPrefix(name, "usr/sbin/"), strings.HasPrefix(name, "usr/libexec/"):
		return layerTools
	case strings.HasPrefix(name, "usr/share/"):
		return layerShare
	case strings.HasPrefix(name, "usr/lib64/"):
		return layerBase
	case strings.HasPrefix(name, "usr/lib/"):
		if strings.HasSuffix(strings.SplitN(name, "/", 4)[2], "-linux-gnu") {
			return layerLibraries
		}
		return layerRuntimes
	}
	return -1
}

// choose returns the entries of each layer, in the tree's order, and the bytes of all. The base and Python go in
// whole; the rest of maxBytes is shared out evenly, and what a smaller layer leaves goes to the larger ones.
func (t *demoTree) choose(maxBytes int64) (chosen [demoLayers][]demoEntry, total int64) {
	var all [demoLayers][]demoEntry
	var sizes [demoLayers]int64
	for _, e := range t.entries {
		if l := t.layerOf(e); l >= 0 {
			all[l] = append(all[l], e)
		}
	}
	for l := range all {
		_, sizes[l] = fit(all[l], math.MaxInt64)
	}
	left := max(0, maxBytes-sizes[layerBase]-sizes[layerPython])
	shared := []int{layerLibraries, layerRuntimes, layerTools, layerShare}
	slices.SortStableFunc(shared, func(a, b int) int { return cmp.Compare(sizes[a], sizes[b]) })
	for _, l := range []int{layerBase, layerPython} {
		chosen[l], _ = fit(all[l], math.MaxInt64)
		total += sizes[l]
	}
	for i, l := range shared {
		var n int64
		chosen[l], n = fit(all[l], left/int64(len(shared)-i))
		left -= n
		total += n
	}
	return chosen, total
}

// fit takes entries in order as long as they fit into n bytes; one that is too large is left out. A file that
// has several names counts once.
func fit(entries []demoEntry, n int64) (taken []demoEntry, size int64) {
	first := make(map[inode]string)
	for _, e := range entries {
		if e.hard = first[e.inode]; e.hard != "" {
			e.size = 0
		}
		if e.size > n-size {
			continue
		}
		if e.inode != (inode{}) && e.hard == "" {
			first[e.inode] = e.path
		}
		taken = append(taken, e)
		size += e.size
	}
	return taken, size
}

// layers completes what was chosen: the generated files, and the folders that lead to each file.
func (t *demoTree) layers(chosen [demoLayers][]demoEntry) []demoLayer {
	mtime := t.dirs["usr"].mtime
	chosen[layerBase] = append(slices.Clone(chosen[layerBase]), demoSkeleton(t.dirs, mtime)...)
	chosen[layerApp] = []demoEntry{{path: "srv/app.py", mode: 0o644, size: int64(len(demoApp)), mtime: mtime, data: demoApp}}
	var layers []demoLayer
	for i, entries := range chosen {
		if len(entries) > 0 {
			layers = append(layers, demoLayer{name: demoLayerNames[i], entries: t.withDirs(entries, mtime)})
		}
	}
	return layers
}

// withDirs adds the folders above the entries and sorts by path, which puts a folder before what it holds.
func (t *demoTree) withDirs(entries []demoEntry, mtime int64) []demoEntry {
	out := slices.Clone(entries)
	seen := make(map[string]bool)
	for _, e := range entries {
		if e.mode.IsDir() {
			seen[e.path] = true
		}
	}
	for _, e := range entries {
		for dir := path.Dir(e.path); dir != "." && !seen[dir]; dir = path.Dir(dir) {
			seen[dir] = true
			d, ok := t.dirs[dir]
			if !ok {
				d = demoEntry{path: dir, mode: fs.ModeDir | 0o755, mtime: mtime}
			}
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b demoEntry) int { return strings.Compare(a.path, b.path) })
	return out
}

// demoSkeleton is what an image has outside /usr: mount points, links into usr, and an /etc that names
// root and needs no network.
func demoSkeleton(dirs map[string]demoEntry, mtime int64) []demoEntry {
	var out []demoEntry
	for _, dir := range []string{"dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "var", "var/tmp"} {
		mode := fs.ModeDir | 0o755
		switch dir {
		case "root":
			mode = fs.ModeDir | 0o700
		case "tmp", "var/tmp":
			mode = fs.ModeDir | fs.ModeSticky | 0o777
		}
		out = append(out, demoEntry{path: dir, mode: mode, mtime: mtime})
	}
	for _, link := range demoRootLinks {
		if _, ok := dirs["usr/"+link]; ok {
			out = append(out, demoEntry{path: link, mode: fs.ModeSymlink | 0o777, mtime: mtime, link: "usr/" + link})
		}
	}
	for name, text := range map[string]string{
		"etc/passwd":        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"etc/group":         "root:x:0:\nnogroup:x:65534:\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"etc/hosts":         "127.0.0.1 localhost\n::1 localhost\n",
		"etc/hostname":      "demo\n",
		"etc/resolv.conf":   "",
	} {
		out = append(out, demoEntry{path: name, mode: 0o644, size: int64(len(text)), mtime: mtime, data: []byte(text)})
	}
	return out
}
