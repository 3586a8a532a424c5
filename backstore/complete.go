package backstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// CompleteOptions are the settings of [Image.Complete]. A zero field means its
// default.
type CompleteOptions struct {
	// Delay is the time before the first request, and Jitter the bound of a
	// random time added to it, so that a fleet does not start at once. Both
	// are 0 by default.
	Delay, Jitter time.Duration
	// Rate bounds the bytes a second, 0 is unbounded.
	Rate int64
}

// Complete fetches everything of the remote layers that is not on the node,
// in the background, and then checks each blob's digest. It returns early when
// ctx ends. Blobs whose digest is wrong are forgotten and reported as
// [ErrDigest].
func (im *Image) Complete(ctx context.Context, o *CompleteOptions) error {
	var opts CompleteOptions
	if o != nil {
		opts = *o
	}
	delay := opts.Delay
	if opts.Jitter > 0 {
		delay += rand.N(opts.Jitter)
	}
	if err := sleep(ctx, delay); err != nil {
		return err
	}
	var errs []error
	for i, l := range im.layers {
		if l.blob == nil {
			continue
		}
		if err := im.completeLayer(ctx, i, opts.Rate); err != nil {
			errs = append(errs, fmt.Errorf("complete layer %d: %w", i, err))
			if ctx.Err() != nil {
				break
			}
		}
	}
	return errors.Join(errs...)
}

// completePieces bounds the requests under way for the completion of an image.
const completePieces = 4

func (im *Image) completeLayer(ctx context.Context, layer int, rate int64) error {
	b := im.layers[layer].blob
	whole := &list{wants: []Want{{Layer: layer, Len: b.size}}}
	limits := Limits{Requests: completePieces, Rate: rate}
	if _, err := im.Blobs().prefetch(ctx, whole, &PrefetchOptions{Limits: limits}, true); err != nil {
		return err
	}
	if !b.Complete() { // a flight of somebody else was passed by
		for off := int64(0); off < b.size; off += maxPiece {
			if _, err := b.ensureExact(off, min(maxPiece, b.size-off), newPatience(b.cache.o.RetryFor)); err != nil {
				return err
			}
		}
	}
	return b.Verify(ctx)
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
