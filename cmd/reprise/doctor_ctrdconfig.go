package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// A ctrdConfig is containerd's configuration, as far as it matters to a
// snapshotter: version 2 of containerd 1.x, version 3 and later of 2.x.
type ctrdConfig struct {
	Version  int                    `toml:"version"`
	Root     string                 `toml:"root"`
	Imports  []string               `toml:"imports"`
	Disabled []string               `toml:"disabled_plugins"`
	Plugins  map[string]any         `toml:"plugins"`
	Proxies  map[string]proxyPlugin `toml:"proxy_plugins"`
}

type proxyPlugin struct {
	Type    string            `toml:"type"`
	Address string            `toml:"address"`
	Exports map[string]string `toml:"exports"`
}

// maxImports is how many files a configuration may have.
const maxImports = 100

// readCtrdConfig reads a configuration with what it imports. Without the file it is
// os.ErrNotExist; containerd has its defaults then.
func readCtrdConfig(path string) (*ctrdConfig, error) {
	all := &ctrdConfig{Plugins: map[string]any{}, Proxies: map[string]proxyPlugin{}}
	seen := map[string]bool{}
	for pending := []string{path}; len(pending) > 0; pending = pending[1:] {
		path := pending[0]
		if seen[path] {
			continue
		}
		if seen[path] = true; len(seen) > maxImports {
			return nil, fmt.Errorf("%s: more than %d files", path, maxImports)
		}
		c, err := readCtrdFile(path)
		if err != nil {
			return nil, err
		}
		all.merge(c)
		imports, err := c.imports(path)
		if err != nil {
			return nil, err
		}
		pending = append(pending, imports...)
	}
	return all, nil
}

func readCtrdFile(path string) (*ctrdConfig, error) {
	p, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c := new(ctrdConfig)
	err = toml.Unmarshal(p, c)
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, column := bad.Position()
		return nil, fmt.Errorf("%s: line %d, column %d: %w", path, row, column, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// imports are the files that the one at path imports.
func (c *ctrdConfig) imports(path string) (files []string, err error) {
	for _, name := range c.Imports {
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(path), name)
		}
		if !strings.Contains(name, "*") {
			files = append(files, filepath.Clean(name))
			continue
		}
		found, err := filepath.Glob(name)
		if err != nil {
			return nil, fmt.Errorf("%s: import %s: %w", path, name, err)
		}
		files = append(files, found...)
	}
	return files, nil
}

// merge adds a file that counts more. Up to version 2, containerd replaces what it
// says of a plugin as a whole.
func (c *ctrdConfig) merge(more *ctrdConfig) {
	c.Version = max(c.Version, more.Version)
	if more.Root != "" {
		c.Root = more.Root
	}
	c.Disabled = append(c.Disabled, more.Disabled...)
	maps.Copy(c.Proxies, more.Proxies)
	if c.Version < 3 {
		maps.Copy(c.Plugins, more.Plugins)
		return
	}
	mergeTables(c.Plugins, more.Plugins)
}

func mergeTables(to, from map[string]any) {
	for k, v := range from {
		a, isTable := to[k].(map[string]any)
		b, both := v.(map[string]any)
		if isTable && both {
			mergeTables(a, b)
			continue
		}
		to[k] = v
	}
}

// lookup is a value in a plugin's table, of type T; else none.
func lookup[T any](table map[string]any, path ...string) (none T) {
	for i, key := range path {
		if i == len(path)-1 {
			v, _ := table[key].(T)
			return v
		}
		table, _ = table[key].(map[string]any)
	}
	return none
}

// names of plugins, and of the tables in them.
const (
	pluginCRI      = "io.containerd.grpc.v1.cri" // of containerd 1.x
	pluginImages   = "io.containerd.cri.v1.images"
	pluginRuntime  = "io.containerd.cri.v1.runtime"
	pluginTransfer = "io.containerd.transfer.v1.local"
)

// criSettings are those of containerd's CRI plugin, with its defaults.
type criSettings struct {
	disabled    bool
	snapshotter string            // of pods
	runtimes    map[string]string // runtime: its own snapshotter
	annotations bool              // are passed to the snapshotter
	discard     bool              // unpacked layers
	local       bool              // it pulls by itself, even if it has a transfer service
	sandbox     string            // image; empty for the default
}

func (c *ctrdConfig) cri() criSettings {
	images, sandbox := lookup[map[string]any](c.Plugins, pluginImages), ""
	runtime := lookup[map[string]any](c.Plugins, pluginRuntime, "containerd")
	if c.Version < 3 {
		old := lookup[map[string]any](c.Plugins, pluginCRI)
		if old == nil {
			old = lookup[map[string]any](c.Plugins, "cri") // of version 1
		}
		sandbox = lookup[string](old, "sandbox_image")
		images = lookup[map[string]any](old, "containerd")
		runtime = images
	} else {
		sandbox = lookup[string](images, "pinned_images", "sandbox")
	}
	s := criSettings{
		snapshotter: lookup[string](images, "snapshotter"),
		discard:     lookup[bool](images, "discard_unpacked_layers"),
		sandbox:     sandbox,
		runtimes:    map[string]string{},
	}
	if s.snapshotter == "" {
		s.snapshotter = "overlayfs"
	}
	if off, said := images["disable_snapshot_annotations"].(bool); said && !off {
		s.annotations = true
	}
	s.local = s.annotations || s.discard || pullsItself(images)
	s.ownSnapshotters(lookup[map[string]any](runtime, "runtimes"))
	s.ownSnapshotters(lookup[map[string]any](images, "runtime_platforms"))
	for _, p := range c.Disabled {
		s.disabled = s.disabled || slices.Contains([]string{"cri", pluginCRI, pluginImages, pluginRuntime}, p)
	}
	return s
}

// pullsItself tells whether the CRI plugin is told to, or has a setting that the
// transfer service does not know.
// https://github.com/containerd/containerd/blob/v2.1.0/docs/cri/config.md#configuration-differences-and-automatic-fallback-to-local-mode
func pullsItself(images map[string]any) bool {
	for _, old := range []string{"mirrors", "configs", "auths"} {
		if len(lookup[map[string]any](images, "registry", old)) > 0 {
			return true
		}
	}
	n, said := images["max_concurrent_downloads"].(int64)
	return said && n != 3 || lookup[bool](images, "image_pull_with_sync_fs") || lookup[bool](images, "use_local_image_pull")
}

// ownSnapshotters notes which runtimes have one.
func (s *criSettings) ownSnapshotters(runtimes map[string]any) {
	for name := range runtimes {
		if own := lookup[string](runtimes, name, "snapshotter"); own != "" {
			s.runtimes[name] = own
		}
	}
}

// uses are the runtimes whose pods have the snapshotter; "" stands for all that
// have none of their own.
func (s *criSettings) uses(snapshotter string) (runtimes []string) {
	if s.snapshotter == snapshotter {
		runtimes = append(runtimes, "")
	}
	for _, name := range slices.Sorted(maps.Keys(s.runtimes)) {
		if s.runtimes[name] == snapshotter {
			runtimes = append(runtimes, name)
		}
	}
	return runtimes
}

// unpacks tells whether the transfer service unpacks images for a snapshotter.
func (c *ctrdConfig) unpacks(snapshotter string) bool {
	for _, u := range lookup[[]any](c.Plugins, pluginTransfer, "unpack_config") {
		if t, ok := u.(map[string]any); ok && t["snapshotter"] == snapshotter {
			return true
		}
	}
	return false
}

// proxy is the proxy plugin of that name, or else of another name at the socket.
func (c *ctrdConfig) proxy(name, socket string) (string, *proxyPlugin) {
	if p, ok := c.Proxies[name]; ok {
		return name, &p
	}
	for _, other := range slices.Sorted(maps.Keys(c.Proxies)) {
		if p := c.Proxies[other]; p.Type == "snapshot" && p.Address == socket {
			return other, &p
		}
	}
	return name, nil
}
