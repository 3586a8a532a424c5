package compare

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// A recipe is a real image: layers as a Dockerfile makes them, of Debian and npm
// packages that the machine's own package managers fetch. Nothing is installed
// on the machine.
type recipe struct {
	name   string
	layers []recipeLayer
	config ocispec.ImageConfig
}

// A recipeLayer is what one line of a Dockerfile adds. The steps are taken in
// the order of the fields.
type recipeLayer struct {
	debs  []string          // and what they depend on, without what lower layers have
	npm   []string          // NAME@VERSION, and what they depend on
	files map[string]string // path → file of testdata/coldstart
	run   string            // shell script, run as root in the image
}

// npmDir is where npm packages are installed in an image.
const npmDir = "srv"

// A pkgBuilder makes images in a directory, in which also the packages stay.
type pkgBuilder struct {
	dir string
	say func(format string, args ...any)
}

// build makes the image, or finds it. The folder's name is the digest of the
// recipe and of the versions that the package lists have: another list gives
// another image.
func (b *pkgBuilder) build(ctx context.Context, r recipe) (*DemoImage, error) {
	debs, err := b.resolve(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", r.name, err)
	}
	key, err := r.key(debs)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", r.name, err)
	}
	layout := filepath.Join(b.dir, r.name+"-"+key)
	if d, err := openDemoImage(layout); err == nil {
		return d, nil
	}
	if err := b.buildNew(ctx, r, debs, layout); err != nil {
		return nil, fmt.Errorf("image %s: %w", r.name, err)
	}
	d, err := openDemoImage(layout)
	if err == nil {
		d.Reused = false
	}
	return d, err
}

// key names what the recipe gives with these packages.
func (r recipe) key(debs [][]string) (string, error) {
	h := sha256.New()
	config, err := json.Marshal(r.config)
	if err != nil {
		return "", err
	}
	fmt.Fprintf(h, "2 %s %s\n", runtime.GOARCH, config)
	for i, l := range r.layers {
		fmt.Fprintf(h, "layer %q %q %q\n", debs[i], l.npm, l.run)
		for _, name := range sortedKeys(l.files) {
			p, err := os.ReadFile(filepath.Join("testdata", "coldstart", l.files[name]))
			if err != nil {
				return "", err
			}
			fmt.Fprintf(h, "%q %q\n", name, p)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

// resolve asks apt which packages each layer adds: what it would install for
// this layer and those below on a machine that has nothing, less what those
// below have. The packages are its files' names.
func (b *pkgBuilder) resolve(ctx context.Context, r recipe) ([][]string, error) {
	var asked []string
	added := make([][]string, len(r.layers))
	have := map[string]bool{}
	for i, l := range r.layers {
		if len(l.debs) == 0 {
			continue
		}
		asked = append(asked, l.debs...)
		out, err := b.apt(ctx, "none", append([]string{"--print-uris", "install"}, asked...)...)
		if err != nil {
			return nil, fmt.Errorf("%w (the lists of packages come with 'apt-get update')", err)
		}
		added[i] = newDebs(out, have)
	}
	return added, nil
}

// newDebs reads what apt-get --print-uris prints ('URI' FILE SIZE HASH) and
// returns the files that are not in have yet, to which they are added.
func newDebs(out string, have map[string]bool) (added []string) {
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 3 && strings.HasSuffix(f[1], ".deb") && !have[f[1]] {
			have[f[1]] = true
			added = append(added, f[1])
		}
	}
	return added
}

// apt runs apt-get as if the machine had no package, with a folder of packages
// that have been fetched: it does not name those when it prints.
func (b *pkgBuilder) apt(ctx context.Context, folder string, args ...string) (string, error) {
	archives := filepath.Join(b.dir, folder)
	status := filepath.Join(archives, "status")
	if err := os.MkdirAll(filepath.Join(archives, "partial"), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return "", err
	}
	args = append([]string{
		"-qq", "-y", "--no-install-recommends", "-o", "Dir::State::status=" + status, "-o", "Dir::Cache::archives=" + archives,
		"-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root",
	}, args...)
	return output(exec.CommandContext(ctx, "apt-get", args...))
}

// output runs a command and returns what it prints.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stderr.String())
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, said[max(0, len(said)-2000):])
	}
	return stdout.String(), nil
}

// buildNew makes each layer in a folder of its own, and then the layout.
func (b *pkgBuilder) buildNew(ctx context.Context, r recipe, debs [][]string, layout string) error {
	var asked []string
	for _, l := range r.layers {
		asked = append(asked, l.debs...)
	}
	b.say("image %s: fetching packages", r.name)
	if _, err := b.apt(ctx, "debs", append([]string{"--download-only", "install"}, asked...)...); err != nil {
		return err
	}
	work, err := os.MkdirTemp(b.dir, "making-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	layers := make([]demoLayer, len(r.layers))
	for i, l := range r.layers {
		b.say("image %s: layer %d of %d", r.name, i+1, len(r.layers))
		if err := b.layer(ctx, work, i, l, debs[i]); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		if layers[i].entries, err = readLayer(filepath.Join(work, fmt.Sprint(i))); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		layers[i].name = l.comment()
	}
	return b.writeLayout(ctx, r, work, layout, layers)
}

// comment is the layer's line in the image's history.
func (l recipeLayer) comment() string {
	switch {
	case len(l.debs) > 0:
		return "apt-get install " + strings.Join(l.debs, " ")
	case len(l.npm) > 0:
		return "npm install " + strings.Join(l.npm, " ")
	case len(l.files) > 0:
		return "COPY " + strings.Join(sortedKeys(l.files), " ")
	}
	return l.run
}

// layer makes layer i in the folder of that name: packages are unpacked there,
// and what runs in the image does so on an overlay whose upper folder it is.
func (b *pkgBuilder) layer(ctx context.Context, work string, i int, l recipeLayer, debs []string) error {
	dir := filepath.Join(work, fmt.Sprint(i))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, deb := range debs {
		if err := unpackDeb(ctx, filepath.Join(b.dir, "debs", deb), dir, i == 0); err != nil {
			return fmt.Errorf("%s: %w", deb, err)
		}
	}
	for name, from := range l.files {
		p, err := os.ReadFile(filepath.Join("testdata", "coldstart", from))
		if err != nil {
			return err
		}
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, p, 0o644)); err != nil {
			return err
		}
	}
	script := ""
	if len(l.npm) > 0 {
		script += `npm install --prefix m/` + npmDir + ` --cache "$NPM_CACHE" --ignore-scripts --no-audit --no-fund --no-update-notifier ` +
			`--omit=dev --omit=peer --save-exact --prefer-offline --loglevel error ` + strings.Join(l.npm, " ") + "\n"
	}
	if len(debs) > 0 {
		script += "chroot m ldconfig\n"
	}
	if l.run != "" {
		script += "exec chroot m /bin/sh -euc \"$RUN\"\n"
	}
	if script == "" {
		return nil
	}
	return b.inside(ctx, work, i, script, "RUN="+l.run, "NPM_CACHE="+filepath.Join(b.dir, "npm"))
}

// unpackDeb unpacks a package's files. In the lowest layer the root folder's
// links into usr are made first; in the others what is below them goes to usr.
// What is there for people to read is left out, as in Debian's slim images.
func unpackDeb(ctx context.Context, deb, dir string, lowest bool) error {
	for _, l := range demoRootLinks {
		if err := os.MkdirAll(filepath.Join(dir, "usr", l), 0o755); err != nil {
			return err
		}
		if err := os.Symlink("usr/"+l, filepath.Join(dir, l)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	const script = `dpkg-deb --fsys-tarfile "$0" | tar -x -C "$1" -p --same-owner --numeric-owner --keep-directory-symlink ` +
		`--exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/info/*' --exclude='./usr/share/locale/*'`
	_, err := output(exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script, deb, dir))
	if err == nil && !lowest {
		err = dropRootLinks(dir)
	}
	return err
}

// dropRootLinks takes away what only unpacking needed.
func dropRootLinks(dir string) error {
	for _, l := range demoRootLinks {
		if err := os.Remove(filepath.Join(dir, l)); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(dir, "usr", l)); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}

// inside runs a script with the image up to layer i at m, in a mount namespace
// of its own, so that nothing stays mounted.
func (b *pkgBuilder) inside(ctx context.Context, work string, i int, script string, env ...string) error {
	for _, dir := range []string{"m", "w"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o755); err != nil {
			return err
		}
	}
	mount := "mount --bind 0 m\n"
	if i > 0 {
		var lower []string
		for j := i - 1; j >= 0; j-- {
			lower = append(lower, fmt.Sprint(j))
		}
		mount = fmt.Sprintf("mount -t overlay -o redirect_dir=off,metacopy=off,index=off,lowerdir=%s,upperdir=%d,workdir=w overlay m\n",
			strings.Join(lower, ":"), i)
	}
	script = mount + "[ ! -d m/proc ] || mount -t proc proc m/proc\n" + script
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "private", "bash", "-euc", script)
	cmd.Dir = work
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"}, env...)
	for _, kv := range os.Environ() { // how npm reaches its registry
		if k, _, _ := strings.Cut(strings.ToLower(kv), "="); strings.HasPrefix(k, "npm_config_") || strings.HasSuffix(k, "_proxy") || k == "node_extra_ca_certs" {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	_, err := output(cmd)
	return errors.Join(err, os.RemoveAll(filepath.Join(work, "w")))
}

// readLayer lists a layer's folder as the members of its tar, folders before
// what they hold, with what the overlay marks as removed.
func readLayer(dir string) ([]demoEntry, error) {
	var entries []demoEntry
	first := map[inode]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		es, err := layerEntries(name, rel, fi, first)
		entries = append(entries, es...)
		return err
	})
	return entries, err
}

// layerEntries are the members for one file; first has the first name of each
// file that has several.
func layerEntries(name, rel string, fi fs.FileInfo, first map[inode]string) ([]demoEntry, error) {
	st := fi.Sys().(*syscall.Stat_t)
	e := newDemoEntry(rel, fi, st)
	switch mode := fi.Mode(); {
	case mode.IsDir():
		if !isOpaque(name) {
			return []demoEntry{e}, nil
		}
		return []demoEntry{e, marker(path.Join(rel, ".wh..wh..opq"))}, nil
	case mode.IsRegular():
		e.size = fi.Size()
		if st.Nlink > 1 {
			key := inode{st.Dev, st.Ino}
			if e.hard = first[key]; e.hard != "" {
				e.size = 0
			} else {
				first[key] = rel
			}
		}
	case mode.Type() == fs.ModeSymlink:
		target, err := os.Readlink(name)
		if err != nil {
			return nil, err
		}
		e.link = target
	case mode.Type() == fs.ModeDevice|fs.ModeCharDevice && st.Rdev == 0:
		return []demoEntry{marker(path.Join(path.Dir(rel), ".wh."+path.Base(rel)))}, nil
	default:
		return nil, nil // no image of ours needs devices and sockets
	}
	return []demoEntry{e}, nil
}

// marker is an empty file that says what a layer removes.
func marker(name string) demoEntry { return demoEntry{path: name, mode: 0o644, data: []byte{}} }

func isOpaque(dir string) bool {
	var v [1]byte
	n, err := unix.Lgetxattr(dir, "trusted.overlay.opaque", v[:])
	return err == nil && n == 1 && v[0] == 'y'
}

// writeLayout writes the image beside its place and renames it.
func (b *pkgBuilder) writeLayout(ctx context.Context, r recipe, work, layout string, layers []demoLayer) error {
	b.say("image %s: writing", r.name)
	tmp := filepath.Join(work, "layout")
	if err := os.MkdirAll(blobDir(tmp), 0o755); err != nil {
		return err
	}
	written := make([]writtenLayer, len(layers))
	p := &demoProgress{report: func(done, total int64) {}}
	for i, l := range layers {
		if err := written[i].write(ctx, tmp, filepath.Join(work, fmt.Sprint(i)), l, p); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	if err := writeIndex(tmp, imageOf(r.config, layers, written), written); err != nil {
		return err
	}
	if err := os.RemoveAll(layout); err != nil { // a damaged one
		return err
	}
	return os.Rename(tmp, layout)
}

// tools are the programs that making an image needs.
func (r recipe) tools() []string {
	tools := []string{"apt-get", "dpkg-deb", "tar", "unshare", "mount", "chroot"}
	if slices.ContainsFunc(r.layers, func(l recipeLayer) bool { return len(l.npm) > 0 }) {
		tools = append(tools, "npm")
	}
	return tools
}

// missing is an error that names the first tool that is not here.
func (r recipe) missing() error {
	for _, tool := range r.tools() {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("image %s: %w", r.name, err)
		}
	}
	return nil
}
