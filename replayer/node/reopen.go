package node

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/reprise-project/reprise/backstore"
)

// pinned is what has to be known to open the image again.
func (im *Image) pinned() *imageState {
	p := im.pin
	p.Manifest, p.Config, p.FSType = im.Manifest, im.Config, im.FSType
	return &p
}

// reopen opens the image of a state file at the version that it pins. Nothing is
// asked of the registry whose answer is on this node. lock is the one on the
// upper layer, nil if there is none; the image owns it, as does reopen if it
// fails.
func (n *Node) reopen(ctx context.Context, r *Request, p *imageState, lock *os.File) (*Image, error) {
	im := &Image{
		Ref: r.place(), Manifest: p.Manifest, Config: p.Config, FSType: p.FSType,
		node: n, phases: phasesSince(r.Begun), pin: *p, readOnly: true, lock: lock,
	}
	im.trace = &lookup{cancel: func() {}, done: closed, why: "the replay had ended before the server was started again"}
	err := im.reopen(ctx, r, p)
	if err == nil {
		return im, nil
	}
	if im.Image != nil {
		err = errors.Join(err, im.Image.Close())
	}
	if im.lock != nil {
		_ = im.lock.Close()
	}
	return nil, fmt.Errorf("open %s again: %w", r.Ref, err)
}

// closed is a channel that is.
var closed = func() chan struct{} {
	ch := make(chan struct{})
	close(ch)
	return ch
}()

func (im *Image) reopen(ctx context.Context, r *Request, p *imageState) error {
	sources, err := im.node.pinnedLayers(r, p)
	if err != nil {
		return err
	}
	if im.Image, err = backstore.OpenImage(ctx, sources); err != nil {
		return err
	}
	if p.Local != nil {
		if err := im.openUpper(p.Local, r.Writable); err != nil {
			return err
		}
	}
	if p.Upper != "" {
		return im.reopenUpper(p.Upper)
	}
	return nil
}

func (n *Node) pinnedLayers(r *Request, p *imageState) ([]backstore.LayerSource, error) {
	if p.Local != nil {
		return p.Local.Sources()
	}
	src, err := n.source(r.place())
	if err != nil {
		return nil, err
	}
	return src.layers(&manifest{layers: p.Layers})
}

// createUpper gives the image a layer to write to, at a path that its device's
// owner removes in the end.
func (im *Image) createUpper(path string) error {
	w, err := backstore.CreateUpper(path, im.Size())
	if err != nil {
		return err
	}
	im.setUpper(w)
	im.pin.Upper = path
	return nil
}

func (im *Image) reopenUpper(path string) error {
	w, err := backstore.OpenUpper(path)
	if err != nil {
		return err
	}
	im.setUpper(w)
	return nil
}

// keepUpper gives the image a layer to write to that outlives its device: the one
// at path, or a new one if there is none. Nobody else may have it open.
func (im *Image) keepUpper(path string) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open upper layer: %w", err)
	}
	fi, err := f.Stat()
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("open upper layer: %w", err)
	}
	if im.lock, err = lockUpper(path, true); err != nil {
		return fmt.Errorf("open upper layer: %w", err)
	}
	if fi.Size() == 0 { // new, or whoever made it was killed
		return im.createUpper(path)
	}
	im.pin.Upper = path
	return im.reopenUpper(path)
}
