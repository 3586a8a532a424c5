// Package compare measures cold starts of one image side by side: each mode in
// turn, again and again, each start a process of its own with a state directory
// that is proven to be what the mode says. The demo is one such comparison, of
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

// A Mode is a way to start an image.
type Mode string

const (
	Lazy   Mode = "lazy"   // nothing on the node, no trace
	Replay Mode = "replay" // nothing on the node, with the image's trace
	Warm   Mode = "warm"   // all bytes on the node, page cache dropped
)

// Modes are all modes, in the order of a round.
var Modes = []Mode{Lazy, Replay, Warm}

// Options say what [Run] compares.
type Options struct {
	// Program is the reprise binary; this process's own by default.
	Program string
	Ref     string
	Args    []string // the container's, after --
	// Flags are passed to `reprise run` as they are: ready rules, network.
	Flags []string
	Modes []Mode // [Modes] by default
	Runs  int    // of each mode, 3 by default
	// Dir holds the state directories; they are removed.
	Dir string
	// Link, if set, is what stands between the starts and the registry.
	Link *regtest.Link
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
	if len(o.Modes) == 0 {
		o.Modes = Modes
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
	for _, m := range o.Modes {
		if m != Lazy && m != Replay && m != Warm {
			return o, fmt.Errorf("unknown mode %q", m)
		}
	}
	return o, nil
}

// Run starts the image Runs times in each mode, interleaved, and reports.
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
	c := &comparison{o: o, dir: dir, starts: map[Mode][]start{}}
	for i := range o.Runs {
		for _, m := range o.Modes {
			o.Progress(m, i+1, o.Runs)
			s, err := c.start(ctx, m)
			if err != nil {
				return nil, fmt.Errorf("compare: %s, run %d: %w", m, i+1, err)
			}
			c.starts[m] = append(c.starts[m], s)
		}
	}
	return c.result(), nil
}

type comparison struct {
	o      Options
	dir    string
	warm   string // state directory that holds all bytes; empty until made
	starts map[Mode][]start
}

// start makes the state that the mode wants, proves it, and starts once.
func (c *comparison) start(ctx context.Context, m Mode) (start, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	root, err := c.root(ctx, m)
	if err != nil {
		return start{}, err
	}
	if m != Warm {
		defer os.RemoveAll(root)
	}
	if err := dropCaches(c.dir); err != nil {
		return start{}, err
	}
	if m != Warm {
		if err := proveCold(root); err != nil {
			return start{}, err
		}
	}
	if c.o.Link != nil {
		c.o.Link.Reset()
	}
	s, err := c.launch(ctx, m, root)
	if err == nil && m == Warm && s.Bytes > warmBytes {
		err = fmt.Errorf("a warm start fetched %d bytes", s.Bytes)
	}
	return s, err
}

// warmBytes is what a warm start may fetch: manifest, config, referrers.
const warmBytes = 256 << 10

// root gives the state directory of one start.
func (c *comparison) root(ctx context.Context, m Mode) (string, error) {
	if m != Warm {
		return os.MkdirTemp(c.dir, string(m)+"-")
	}
	if c.warm != "" {
		return c.warm, nil
	}
	root := filepath.Join(c.dir, "warm")
	if err := os.Mkdir(root, 0o700); err != nil {
		return "", err
	}
	if err := c.fillRoot(ctx, root); err != nil {
		return "", fmt.Errorf("fetch the whole image: %w", err)
	}
	c.warm = root
	return root, nil
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
