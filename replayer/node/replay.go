package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
)

// A replaying is the replay of an image's trace. It begins when the trace is
// there: before the image is open, where the trace says which bytes of the blobs
// it is about.
type replaying struct {
	cancel  context.CancelFunc
	planned chan struct{} // closed: it begins, or is known never to
	done    chan struct{} // closed: what follows is final

	trace   *tracefmt.Trace // after planned; nil if there is none
	foreign bool            // after planned: it is of another workload
	plan    *replayer.Plan  // after planned; nil if there is none
	why     error           // after planned: why there is a trace and no plan
	result  replayer.Result // after done
}

// end gives the replay up and waits for its end.
func (r *replaying) end() {
	r.cancel()
	<-r.done
}

// awaitPlan waits until it is known whether the trace is used.
func (r *replaying) awaitPlan(ctx context.Context) {
	select {
	case <-r.planned:
	case <-ctx.Done():
	}
}

// startReplay waits, beside its caller, for the image's trace and replays it
// into blobs, until ctx ends. They stay open until it has ended. opened is
// closed when the image is open.
func (n *Node) startReplay(ctx context.Context, im *Image, blobs backstore.Stack, o replayer.Options, opened <-chan struct{}) *replaying {
	r := &replaying{planned: make(chan struct{}), done: make(chan struct{})}
	ctx, r.cancel = context.WithCancel(ctx)
	o.Chunk = cmp.Or(o.Chunk, n.o.Cache.ChunkSize)
	go func() {
		defer close(r.done)
		defer r.cancel()
		ctx, end := r.traced(ctx, im.Ref)
		defer end()
		n.runReplay(ctx, r, im, blobs, o, opened)
		n.outcomes.add(r.outcome())
		n.o.Log.Info("the replay has ended", "image", im.Ref, "trace", im.explainLookup(r, true))
	}()
	return r
}

// runReplay says once why a trace that was there, or was to be there, could not
// be used.
func (n *Node) runReplay(ctx context.Context, r *replaying, im *Image, blobs backstore.Stack, o replayer.Options, opened <-chan struct{}) {
	t, why := im.Trace(ctx)
	if t == nil {
		r.result.Reason = why
		close(r.planned)
		if im.trace.hasFailed() {
			n.o.Log.Warn("no trace is replayed", "image", im.Ref, "why", why)
		}
		return
	}
	o.Trial = o.Trial || im.trace.foreign
	p, err := planReplay(ctx, t, im, blobs, o, opened)
	r.trace, r.foreign, r.plan, r.why = t, im.trace.foreign, p, err
	close(r.planned)
	if err != nil {
		r.result.Reason = err.Error()
		if ctx.Err() == nil {
			n.o.Log.Warn("the trace is not replayed", "image", im.Ref, "trace", why, "why", err)
		}
		return
	}
	im.phases.mark("replay started")
	r.result = replayer.Replay(ctx, blobs, p)
	im.phases.mark("replay ended")
}

// planReplay plans from the trace alone where it can, and else once the image is
// open.
func planReplay(ctx context.Context, t *tracefmt.Trace, im *Image, blobs backstore.Stack, o replayer.Options, opened <-chan struct{}) (*replayer.Plan, error) {
	select {
	case <-opened:
	default:
		p, err := replayer.NewPlan(t, replayer.Unopened(infos(blobs)), &o)
		if !errors.Is(err, replayer.ErrNotLocated) {
			return p, err
		}
	}
	select {
	case <-opened:
		return replayer.NewPlan(t, im, &o)
	case <-ctx.Done():
		return nil, errors.New("the container ended first")
	}
}

// infos are what is known of layers before they are open.
func infos(blobs backstore.Stack) []backstore.LayerInfo {
	list := make([]backstore.LayerInfo, len(blobs))
	for i, b := range blobs {
		if b != nil {
			list[i].Digest, list[i].Size = b.Digest(), b.Size()
		}
	}
	return list
}

// replay replays an image that is open.
func (n *Node) replay(ctx context.Context, im *Image, o replayer.Options) replayer.Result {
	r := n.startReplay(ctx, im, im.Blobs(), o, closed)
	<-r.done
	return r.result
}

// explain says in a line why the trace is used, partly used or not.
func (im *Image) explain(r *replaying) string {
	select {
	case <-im.trace.done:
	default:
		return "not used yet: it is still being looked for"
	}
	if r == nil || im.trace.trace == nil {
		return "not used: " + im.trace.why
	}
	select {
	case <-r.planned:
	default:
		return "not used yet: it waits for the layers' indexes; " + im.trace.why
	}
	select {
	case <-r.done:
		return im.explainLookup(r, true)
	default:
		return im.explainLookup(r, false)
	}
}

// explainLookup is explain once there is a plan, or known to be none. done says
// that the replay has ended; before that the image is open.
func (im *Image) explainLookup(r *replaying, done bool) string {
	if r.trace == nil { // and the lookup may still go on
		return "not used: " + r.result.Reason
	}
	from := im.trace.why
	switch {
	case r.plan == nil:
		return fmt.Sprintf("not used: %v; %s", r.why, from)
	case !done:
		return fmt.Sprintf("used: %s of %s have been fetched so far", amount(im.Stats().BackgroundBytes), amount(r.plan.Bytes)) + r.misfit() + "; " + from
	}
	return explainResult(r.result) + r.misfit() + "; " + from
}

func explainResult(got replayer.Result) string {
	switch {
	case got.Reason == replayer.Complete && got.Wants == 0 && got.Here == 0:
		return "not used: it names no bytes of the image"
	case got.Reason == replayer.Complete && got.Asked == 0 && got.Here > 0:
		return fmt.Sprintf("not needed: all of its %s were on the node", amount(got.Here))
	case got.Reason == replayer.Complete:
		return "used: " + brought(got)
	case !got.Used:
		return "not used: " + got.Reason
	}
	return fmt.Sprintf("partly used: %s; %s", got.Reason, brought(got))
}

// brought says what a replay has fetched, and what it has not.
func brought(got replayer.Result) string {
	s := fmt.Sprintf("%d ranges, %s in %d requests, %s were on the node", got.Wants, amount(got.Asked), got.Sent, amount(got.Here))
	if n := got.Overtaken + got.Skipped; n > 0 {
		s += fmt.Sprintf(", demand was before it with %s", amount(n))
	}
	return s
}

// misfit says what the trace lacks.
func (r *replaying) misfit() (says string) {
	if n := len(r.trace.Layers); r.plan.Missing > 0 {
		says = fmt.Sprintf(", of a part: %d of its %d layers are the image's, %.0f %% of its bytes", n-r.plan.Missing, n, 100*r.plan.Coverage())
	}
	if r.foreign {
		says += ", of another workload: followed only as far as reads meet it"
	}
	if r.trace.End == nil {
		says += ", cut off: it has no end"
	}
	return says
}

func amount(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
