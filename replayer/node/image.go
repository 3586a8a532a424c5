package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/replayer"
)

// Annotations of a layer in overlaybd format.
const (
	annotationDigest = "containerd.io/snapshot/overlaybd/blob-digest"
	annotationFSType = "containerd.io/snapshot/overlaybd/blob-fs-type"
	annotationAccel  = "containerd.io/snapshot/overlaybd/acceleration-layer"
)

// An Image is an image that is open on this node.
type Image struct {
	*backstore.Image
	Ref      string
	Manifest digest.Digest // of the platform's manifest; empty for a local config
	Config   ocispec.Image // empty for a local config
	FSType   string        // ext4 unless the layers say otherwise

	node     *Node
	phases   *Phases
	trace    *lookup
	replay   *replaying   // nil where none has begun with the opening
	pin      imageState   // what it consists of, to open it again
	readOnly bool         // it has no upper layer
	recorded bool         // reads are being recorded; set before there is a device
	lock     *os.File     // on the upper layer that its config names
	device   atomic.Value // its path, a string, for messages
	failing  atomic.Bool  // reads are made to fail
}

// ImageOptions are the settings of [Node.OpenImage].
type ImageOptions struct {
	// Trace is "auto" (the one beside the image), "none" (the default), or a
	// file or digest.
	Trace string
	// Workload chooses among the traces of the image; by default it derives
	// from the command.
	Workload string
	// Args and Entrypoint override those of the image, for the workload's name,
	// as [container.Config] has it.
	Args, Entrypoint []string
	// Layers, if not nil, are what the image has to begin with, from the base up,
	// by the digests of their blobs; what is above them is left out.
	Layers []digest.Digest
	// Phases receives the steps of the opening; may be nil.
	Phases *Phases

	// replay, if not nil, says how the trace is replayed, from when it is there:
	// beside the opening. The context of the opening bounds the replay too.
	replay *replayer.Options
	// accel is the acceleration layer, once the manifest is known; nil if there is
	// none.
	accel *accelerator
}

// replays tells whether there may be a trace to replay beside the opening.
func (o *ImageOptions) replays() bool { return o.replay != nil && o.Trace != "" && o.Trace != "none" }

// OpenImage opens ref: a reference of a converted image at a registry, an OCI
// layout as oci:DIR[:TAG], or the path of a config.v1.json.
func (n *Node) OpenImage(ctx context.Context, ref string, o *ImageOptions) (*Image, error) {
	var opts ImageOptions
	if o != nil {
		opts = *o
	}
	im, err := n.openImage(ctx, ref, opts, false)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", ref, err)
	}
	return im, nil
}

// openImage opens an image, to be written to if write is set: then nobody else
// may have its upper layer open.
func (n *Node) openImage(ctx context.Context, ref string, o ImageOptions, write bool) (im *Image, err error) {
	o.Phases = cmp.Or(o.Phases, NewPhases())
	if isConfig(ref) {
		im, err = n.openConfig(ctx, ref, o, write)
	} else {
		im, err = n.openSource(ctx, ref, o)
	}
	if err == nil {
		o.Phases.mark("image open")
	}
	return im, err
}

// openSource opens what a manifest names. Of a registry, each of these lines is a
// round trip, and what stands on one line leaves at once:
//
//	the connection to the registry
//	the manifest                      connections for what follows
//	the trace, or what may be one     the tails of the layers' blobs
//	the first bytes of the replay
//
// and one more each for an index above the manifest, and for a config, where the
// one does not carry the other inline. cmd/reprise counts them in a test.
func (n *Node) openSource(ctx context.Context, ref string, o ImageOptions) (*Image, error) {
	src, err := n.source(ref)
	if err != nil {
		return nil, err
	}
	stopDialing := n.dialAhead(ref, o)
	im := &Image{Ref: ref, node: n, phases: o.Phases, readOnly: true}
	im.trace = n.startPinnedLookup(ctx, im, o)
	m, err := src.manifest(ctx)
	stopDialing()
	if err == nil {
		o.Phases.mark("manifest")
		err = m.cut(o.Layers)
	}
	if err == nil {
		im.Manifest, im.pin.Layers = m.digest, m.layers
		im.FSType, err = fsType(m.layers)
	}
	if err == nil {
		err = n.openManifest(ctx, im, src, m, o)
	}
	if err != nil {
		if im.trace != nil {
			im.trace.end()
		}
		return nil, err
	}
	return im, nil
}

// openManifest opens the layers, and begins to look for the trace and to replay
// it as soon as it can.
func (n *Node) openManifest(ctx context.Context, im *Image, src *source, m *manifest, o ImageOptions) error {
	g, gctx := errgroup.WithContext(ctx)
	config := make(chan struct{})
	g.Go(func() error {
		defer close(config)
		return im.readConfig(gctx, src, m)
	})
	if im.trace == nil || !im.trace.isOf(m.digest) {
		if im.trace != nil {
			im.trace.end()
		}
		o.accel = src.accelerator(m)
		im.trace = n.startLookup(ctx, im, o, config)
	}
	layers, err := src.layers(m)
	opened := make(chan struct{})
	endEarly := func(bool) {}
	if err == nil && o.replays() {
		endEarly, err = n.replayEarly(ctx, im, src, m, *o.replay, opened)
	}
	if err == nil {
		g.Go(func() (err error) {
			im.Image, err = backstore.OpenImage(gctx, layers)
			return err
		})
	} else {
		g.Go(func() error { return errors.Join(err, closeSources(layers)) })
	}
	if err = g.Wait(); err == nil {
		close(opened)
	}
	endEarly(err != nil)
	if err != nil && im.Image != nil {
		err = errors.Join(err, im.Image.Close())
	}
	return err
}

// replayEarly begins the replay before the layers are open. It holds the blobs
// until they are: end tells it that they are, or that they failed to be and the
// replay has to end.
func (n *Node) replayEarly(ctx context.Context, im *Image, src *source, m *manifest, o replayer.Options, opened <-chan struct{}) (end func(failed bool), err error) {
	held, err := src.layers(m)
	if err != nil {
		return nil, err
	}
	im.replay = n.startReplay(ctx, im, backstore.Blobs(held), o, opened)
	return func(failed bool) {
		if failed {
			im.replay.end()
		}
		_ = closeSources(held) // the image's own opening of them says what is wrong
	}, nil
}

// How many connections a start needs soon, beside the first: the tails of the
// layers and the trace, or demand after that, and the replay.
const (
	demandAhead     = 16
	backgroundAhead = 24
)

// nearRegistry is how soon a registry answers that is so near that connections
// cost less than it takes to open them ahead, which is some 0.1 ms of CPU time
// each.
const nearRegistry = 5 * time.Millisecond

// dialAhead opens connections while the manifest is under way, if that takes.
// stop ends it and waits.
func (n *Node) dialAhead(ref string, o ImageOptions) (stop func()) {
	if strings.HasPrefix(ref, layoutScheme) {
		return func() {}
	}
	through := make(chan struct{})
	t := time.AfterFunc(nearRegistry, func() {
		defer close(through)
		n.client.DialAhead(ref, backstore.Demand, demandAhead)
		if o.replays() {
			n.client.DialAhead(ref, backstore.Background, backgroundAhead)
		}
	})
	return func() {
		if !t.Stop() {
			<-through
		}
	}
}

// readConfig costs no request where the manifest carries the config inline.
func (im *Image) readConfig(ctx context.Context, src *source, m *manifest) error {
	p, err := src.at.Get(ctx, m.config)
	if err != nil {
		return fmt.Errorf("image config: %w", err)
	}
	if err := json.Unmarshal(p, &im.Config); err != nil {
		return fmt.Errorf("image config %s: %w", m.config.Digest, err)
	}
	return nil
}

// isConfig tells a local config.v1.json from a reference.
func isConfig(ref string) bool {
	if strings.HasPrefix(ref, layoutScheme) {
		return false
	}
	if strings.HasSuffix(ref, ".json") {
		return true
	}
	fi, err := os.Stat(ref)
	return err == nil && fi.Mode().IsRegular()
}

func (n *Node) openConfig(ctx context.Context, path string, o ImageOptions, write bool) (*Image, error) {
	if err := regular(path); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	c, err := backstore.ReadConfig(path)
	if err != nil {
		return nil, err
	}
	sources, err := c.Sources()
	if err != nil {
		return nil, err
	}
	for i, s := range sources {
		if err := regular(s.Path); err != nil {
			return nil, fmt.Errorf("lower layer %d: %w", i, err)
		}
	}
	im := &Image{Ref: path, FSType: "ext4", node: n, phases: o.Phases, readOnly: true}
	im.pin.Local = c
	if im.Image, err = backstore.OpenImage(ctx, sources); err != nil {
		return nil, err
	}
	if err := im.openUpper(c, write); err != nil {
		return nil, errors.Join(err, im.Image.Close())
	}
	im.trace = n.startLookup(ctx, im, o, nil)
	return im, nil
}

// regular makes sure that path is a file: opening a pipe would wait for ever.
func regular(path string) error {
	fi, err := os.Stat(path)
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a file", path)
	}
	return err
}

// openUpper adds the writable layer that a configuration names, if it does. The
// lock on it may be there already.
func (im *Image) openUpper(c *backstore.Config, write bool) (err error) {
	if c.Upper.Data == "" {
		return nil
	}
	if im.lock == nil {
		im.lock, err = lockUpper(c.Upper.Data, write)
	}
	if err != nil {
		return fmt.Errorf("open upper layer: %w", err)
	}
	upper, err := c.OpenUpper()
	if err != nil {
		return errors.Join(err, im.lock.Close())
	}
	im.setUpper(upper)
	return nil
}

func (im *Image) setUpper(w *lsmt.Writable) {
	im.readOnly = false
	im.Image.Writable(w)
}

// lockUpper keeps two from writing to a layer, and from reading what another
// one writes.
func lockUpper(path string, write bool) (*os.File, error) {
	if err := regular(path); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	how := unix.LOCK_SH
	if write {
		how = unix.LOCK_EX
	}
	err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errors.New("another process has it open: unmount the image there first")
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// fileSystems are those that the kernel may be told to mount: the name comes
// from the image.
var fileSystems = []string{"ext4", "ext3", "ext2", "xfs", "erofs", "btrfs", "squashfs"}

// fsType is the file system that the layers say they are of.
func fsType(layers []ocispec.Descriptor) (string, error) {
	for _, l := range layers {
		t := strings.ToLower(strings.TrimSpace(l.Annotations[annotationFSType]))
		switch {
		case t == "":
		case slices.Contains(fileSystems, t):
			return t, nil
		default:
			return "", fmt.Errorf("layer %s: file system %.40q: only %s are supported", l.Digest, t, strings.Join(fileSystems, ", "))
		}
	}
	return "ext4", nil
}

// Verify reads every layer whole and checks every block, and every digest that
// is known. What is missing of the image is downloaded.
func (im *Image) Verify(ctx context.Context) error {
	if err := im.Image.Verify(ctx); err != nil {
		return fmt.Errorf("verify %s: %w", im.Ref, err)
	}
	for i, l := range im.Layers() {
		if l.Digest == "" || l.Name == string(l.Digest) { // unknown; or a blob, which is checked
			continue
		}
		if err := verifyFile(ctx, l.Name, l.Digest); err != nil {
			return fmt.Errorf("verify %s: layer %d: %w", im.Ref, i, err)
		}
	}
	return nil
}

func verifyFile(ctx context.Context, path string, want digest.Digest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	v := want.Verifier()
	for buf := make([]byte, 1<<20); ; {
		n, err := f.Read(buf)
		_, _ = v.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
	}
	if !v.Verified() {
		return fmt.Errorf("%s: its content is not %s", path, want)
	}
	return nil
}

// failWith makes reads fail once ctx ends, until stop is called: mounting cannot
// be interrupted while it waits for them.
func (im *Image) failWith(ctx context.Context) (stop func()) {
	cancel := context.AfterFunc(ctx, im.fail)
	return func() { cancel() }
}

// fail makes all reads fail from now on. The image still has to be closed.
func (im *Image) fail() {
	im.failing.Store(true)
	_ = im.Image.Close()
}

// cancelReads makes reads fail that wait for the registry, where nothing that
// was written can be lost by it.
func (im *Image) cancelReads() {
	if im.readOnly {
		im.fail()
	}
}

// Close releases the image. Its device must have been closed. That its blobs
// could not be written to the cache, on a full disk say, costs only the next
// start and is no error.
func (im *Image) Close() error {
	im.trace.end()
	if im.replay != nil {
		im.replay.end()
	}
	err := im.Image.Close()
	if err != nil && im.readOnly {
		im.node.o.Log.Warn("the cache is not kept", "image", im.Ref, "err", err)
		err = nil
	}
	if im.lock != nil {
		_ = im.lock.Close()
	}
	return err
}
