package node

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/tracefmt"
)

// walkers is how many directories are looked at at a time.
const walkers = 16

// FilesInfo says of what image files were mapped.
type FilesInfo struct {
	Image    string        // reference, as it was given
	Manifest digest.Digest // of the platform's image manifest; empty for a local config
	Platform string        // os/arch[/variant]
	Layers   []tracefmt.Layer
	Map      recorder.DeviceMap // also good when the image has been closed
}

// Files maps the files of an image to its layers: it opens the image lazily,
// mounts it read-only where nobody sees it, walks it, and leaves nothing behind
// but what the walk has brought into the cache. It needs root.
func (n *Node) Files(ctx context.Context, ref string) (_ *recorder.Files, _ *FilesInfo, err error) {
	im, err := n.OpenImage(ctx, ref, nil)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	f, err := im.files(ctx)
	if err != nil {
		return nil, nil, err
	}
	return f, &FilesInfo{
		Image: im.Ref, Manifest: im.Manifest, Platform: im.platform(), Layers: im.traceLayers(), Map: im.deviceMap(),
	}, nil
}

// traceLayers describes the layers to a trace.
func (im *Image) traceLayers() []tracefmt.Layer {
	var layers []tracefmt.Layer
	for _, l := range im.Layers() {
		layers = append(layers, tracefmt.Layer{Digest: l.Digest, Size: l.Size, Decoded: l.Decoded})
	}
	return layers
}

// deviceMap tells which bytes of the device lie in which layer. What is in a
// writable layer above them is left out.
func (im *Image) deviceMap() recorder.DeviceMap {
	layers, size, image := len(im.Layers()), im.Size(), im.Image
	return func(off, n int64) []recorder.Extent {
		if off < 0 || n <= 0 || off >= size {
			return nil
		}
		end := off + min(n, size-off)
		lo := off &^ (lsmt.SectorSize - 1)
		hi := min((end+lsmt.SectorSize-1)&^(lsmt.SectorSize-1), size)
		var out []recorder.Extent
		for _, s := range image.Extents(lo, hi-lo) {
			from, to := max(s.Off, off), min(s.Off+s.Len, end)
			if s.Kind == lsmt.Data && s.Layer < layers && from < to {
				out = append(out, recorder.Extent{Layer: s.Layer, LayerOff: s.LayerOff + from - s.Off, Off: from, Len: to - from})
			}
		}
		return out
	}
}

// files attaches the image, mounts it in no namespace, and walks it. The image
// must have no other device.
func (im *Image) files(ctx context.Context) (_ *recorder.Files, err error) {
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx) // which made the reads fail
		}
		if err != nil {
			err = fmt.Errorf("map the files of %s: %w", im.Ref, err)
		}
	}()
	defer im.failWith(ctx)() // whoever waits for a read cannot be interrupted
	o, err := im.deviceOptions(NewID(), false)
	if err != nil {
		return nil, err
	}
	dev, err := device.Attach(ctx, im.Image, im.Size(), o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	mount, err := dev.MountDetached(im.FSType, true, im.mountOptions())
	if err != nil {
		return nil, err
	}
	defer unix.Close(mount)
	return walk(ctx, mount, im.deviceMap())
}

// walk maps the files below a mount of a device that this process serves, and
// which it therefore looks at apart.
func walk(ctx context.Context, mount int, m recorder.DeviceMap) (*recorder.Files, error) {
	w := recorder.NewMapper()
	root := fmt.Sprintf("/proc/self/fd/%d", mount)
	var g errgroup.Group
	for range walkers {
		g.Go(func() error {
			return device.Apart(func() error {
				fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
				if err != nil {
					return fmt.Errorf("open the root: %w", err)
				}
				dir := os.NewFile(uintptr(fd), "/")
				defer dir.Close()
				return w.Work(ctx, dir)
			})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return w.Files(m)
}
