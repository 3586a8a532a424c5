// Package compare measures cold starts of one image side by side: each
// variant in turn, again and again, each start a process of its own with a state directory
// that is proven to be what the variant says. The demo is one such comparison, of
// an image and a registry that it makes itself.
//
// What counts is when the container is ready. [Run] drives the starts one after
// the other and may not run twice at a time on one machine: it drops the page
// cache of all.
package compare

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// Options say what [Run] compares.
type Options struct {
	// Program is the reprise binary; this process's own by default.
	Program string
	Env     []string // of the program; this process's own by default
	Ref     string
	Args    []string // the container's, after --
	// Flags are passed to `reprise run` as they are: ready rules, network.
	Flags    []string
	Variants []Variant // [Standard] by default
	Runs     int       // of each variant, 3 by default
	// Dir holds the state directories; they are removed.
	Dir string
	// WarmRoot is a state directory that has all bytes of the image, or is to
	// get them, and stays; by default one is made below Dir where it is needed.
	WarmRoot string
	// Link, if set, is what stands between the starts and the registry.
	Link *regtest.Link
	// Resident are files that are in the page cache when a start begins, such as
	// programs that the machine uses all the time.
	Resident []string
	// Timeout bounds one start, 2 minutes by default.
	Timeout time.Duration
	// Stderr receives what failing starts say.
	Stderr io.Writer
	// Progress is told before each start.
	Progress func(mode Mode, run, runs int)
}

func (o Options) fill() (Options, error) {
	if o.Program == "" {
		self, err := os.Executable()
		if err != nil {
			return o, err
		}
		o.Program = self
	}
	o.Runs = cmp.Or(o.Runs, 3)
	o.Timeout = cmp.Or(o.Timeout, 2*time.Minute)
	if o.Progress == nil {
		o.Progress = func(Mode, int, int) {}
	}
	if o.Stderr == nil {
		o.Stderr = io.Discard
	}
	if o.Runs < 1 || o.Runs > 1000 {
		return o, fmt.Errorf("%d runs: not between 1 and 1000", o.Runs)
	}
	var err error
	o.Variants, err = fillVariants(o.Variants, o.Link != nil)
	return o, err
}

// Run starts the image Runs times in each variant, interleaved, and reports.
// Each round begins with another variant.
func Run(ctx context.Context, options Options) (*Result, error) {
	o, err := options.fill()
	if err != nil {
		return nil, fmt.Errorf("compare: %w", err)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("compare: needs root: it mounts images and drops the page cache")
	}
	dir, err := os.MkdirTemp(o.Dir, "reprise-compare-")
	if err != nil {
		return nil, fmt.Errorf("compare: %w", err)
	}
	defer os.RemoveAll(dir)
	c := &comparison{o: o, dir: dir, warm: o.WarmRoot, starts: map[Mode][]start{}}
	for i := range o.Runs {
		for j := range o.Variants {
			v := &o.Variants[(i+j)%len(o.Variants)]
			o.Progress(v.Name, i+1, o.Runs)
			s, err := c.start(ctx, v)
			if err != nil {
				return nil, fmt.Errorf("compare: %s, run %d: %w", v.Name, i+1, err)
			}
			c.starts[v.Name] = append(c.starts[v.Name], s)
		}
	}
	return c.result(), nil
}

type comparison struct {
	o      Options
	dir    string
	warm   string // state directory that has all bytes, or is to; empty until made
	filled bool   // warm has them
	starts map[Mode][]start
}

// start makes the state that the variant wants, proves it, and starts once.
func (c *comparison) start(ctx context.Context, v *Variant) (s start, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	root, remove, err := c.root(ctx, v)
	if err != nil {
		return start{}, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	if err := errors.Join(dropCaches(c.dir), readFiles(c.o.Resident)); err != nil {
		return start{}, err
	}
	if !v.Warm {
		if err := proveCold(root); err != nil {
			return start{}, err
		}
	}
	if c.o.Link != nil {
		c.o.Link.Reset()
		if v.Fault != nil {
			c.o.Link.SetFault(v.Fault())
			defer c.o.Link.SetFault(nil)
		}
	}
	s, err = c.launch(ctx, v, root)
	if err == nil && v.Warm && s.Bytes > warmBytes {
		err = fmt.Errorf("a warm start fetched %d bytes", s.Bytes)
	}
	return s, err
}

// warmBytes is what a warm start may fetch: manifest, config, referrers.
const warmBytes = 256 << 10

// root gives the state directory of one start. remove takes it away.
func (c *comparison) root(ctx context.Context, v *Variant) (root string, remove func() error, err error) {
	if v.Warm {
		root, err = c.warmRoot(ctx)
		return root, func() error { return nil }, err
	}
	root, err = os.MkdirTemp(c.dir, "root-")
	if err != nil || v.Room == 0 {
		return root, func() error { return os.RemoveAll(root) }, err
	}
	unmount, err := mountRoom(root, v.Room)
	return root, func() error { return errors.Join(unmount(), os.RemoveAll(root)) }, err
}

// warmRoot gives the state directory of the warm starts.
func (c *comparison) warmRoot(ctx context.Context) (string, error) {
	if c.filled {
		return c.warm, nil
	}
	if c.warm == "" {
		c.warm = filepath.Join(c.dir, "warm")
	}
	if err := os.MkdirAll(c.warm, 0o700); err != nil {
		return "", err
	}
	if err := FillRoot(ctx, c.warm, c.o.Ref); err != nil {
		return "", fmt.Errorf("fetch the whole image: %w", err)
	}
	c.filled = true
	return c.warm, nil
}

// proveCold makes sure that nothing of any image is in root.
func proveCold(root string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("state directory %s is not empty: not a cold start", root)
	}
	return nil
}

// dropCaches drops the page cache, dentries and inodes of the machine. What is
// dirty on the file system of dir is written first; other file systems are left
// alone, one that hangs would hang this.
func dropCaches(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache: %w", err)
	}
	return nil
}

// readFiles brings files into the page cache.
func readFiles(paths []string) error {
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
