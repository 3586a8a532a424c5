package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// lookup is a search for a trace that runs beside the opening of its image.
type lookup struct {
	cancel  context.CancelFunc
	of      digest.Digest // the manifest whose trace it is
	done    chan struct{}
	trace   *tracefmt.Trace // nil if there is none
	why     string          // why not, or where it is from
	failed  bool            // there is none, though one was named or is to be expected
	foreign bool            // it is of another workload, or does not say of which
}

// end gives the lookup up and waits for its end.
func (l *lookup) end() {
	l.cancel()
	<-l.done
}

// hasFailed tells whether it ended with an error.
func (l *lookup) hasFailed() bool {
	select {
	case <-l.done:
		return l.failed
	default:
		return false
	}
}

// isOf tells whether the trace that is looked for is that of a manifest.
func (l *lookup) isOf(manifest digest.Digest) bool { return l.of == manifest }

// startPinnedLookup begins to look for a trace before there is a manifest, where
// that is known by its digest and the workload by its name; nil where not. The
// digest may turn out to be that of an index.
func (n *Node) startPinnedLookup(ctx context.Context, im *Image, o ImageOptions) *lookup {
	r, err := registry.ParseReference(im.Ref)
	if err != nil || r.Digest == "" || o.Trace != "auto" || o.Workload == "" {
		return nil
	}
	im.Manifest = r.Digest
	return n.startLookup(ctx, im, o, closed)
}

// startLookup begins to look for the trace that the options name. config is
// closed when the image's config was read; nil if it has none.
func (n *Node) startLookup(ctx context.Context, im *Image, o ImageOptions, config <-chan struct{}) *lookup {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l := &lookup{cancel: cancel, of: im.Manifest, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		t, why, err := n.findTrace(ctx, im, l.of, o, config)
		l.trace, l.why = t, why
		if t != nil && config != nil {
			<-config
			l.foreign = t.Workload != im.workload(o)
		}
		if err != nil {
			l.why, l.failed = err.Error(), true
		}
		if l.trace != nil {
			im.phases.mark("trace found")
		}
	}()
	return l
}

// findTrace returns the trace and where it is from, or nil and why there is
// none; an error is the failure to read one.
func (n *Node) findTrace(ctx context.Context, im *Image, of digest.Digest, o ImageOptions, config <-chan struct{}) (*tracefmt.Trace, string, error) {
	switch o.Trace {
	case "", "none":
		return nil, "no trace was asked for", nil
	case "auto":
		if config == nil || strings.HasPrefix(im.Ref, layoutScheme) {
			return nil, "traces are looked for beside images at registries only; name a file with --trace", nil
		}
		ctx, cancel := context.WithTimeout(ctx, n.o.TraceWait)
		defer cancel()
		return n.findBeside(ctx, im, of, o, config)
	}
	if d, err := digest.Parse(o.Trace); err == nil {
		t, err := n.pullDigest(ctx, im.Ref, d)
		return t, "trace " + o.Trace, err
	}
	t, err := openTrace(o.Trace)
	return t, "file " + o.Trace, err
}

func openTrace(path string) (*tracefmt.Trace, error) {
	if err := regular(path); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	return tracefmt.Open(path)
}

// findBeside asks the registry for the trace of the workload, or else for the
// default, or for all there are: their union.
func (n *Node) findBeside(ctx context.Context, im *Image, of digest.Digest, o ImageOptions, config <-chan struct{}) (*tracefmt.Trace, string, error) {
	<-config // the entrypoint is part of the workload's name
	name := im.workload(o)
	if t, why := n.ahead.get(im.aheadKey(of, name)); t != nil {
		return t, why, nil
	}
	store, err := artifact.New(n.client, im.Ref)
	if err != nil {
		return nil, "", err
	}
	t, e, err := store.Auto(ctx, of, name)
	if errors.Is(err, os.ErrNotExist) {
		if t, why, err := o.accel.find(ctx, im); t != nil || err != nil {
			return t, why, err
		}
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Sprintf("no trace of workload %s beside the image, nor of another; record one with 'reprise record --attach'", name), nil
	case errors.Is(err, context.DeadlineExceeded):
		return nil, "", fmt.Errorf("the lookup of the trace took longer than %v", n.o.TraceWait)
	case err != nil:
		return nil, "", err
	}
	return t, e.String(), nil
}

func (n *Node) pullDigest(ctx context.Context, ref string, d digest.Digest) (*tracefmt.Trace, error) {
	store, err := artifact.New(n.client, ref)
	if err != nil {
		return nil, err
	}
	t, _, err := store.PullDigest(ctx, d)
	return t, err
}

// workload names what is started: as asked, else from the command.
func (im *Image) workload(o ImageOptions) string {
	if o.Workload != "" {
		return o.Workload
	}
	return artifact.DefaultWorkload(im.effective(o))
}

// effective is the command that is started with the options.
func (im *Image) effective(o ImageOptions) []string {
	if o.Entrypoint == nil {
		return im.Command(o.Args)
	}
	return slices.Concat(o.Entrypoint, o.Args)
}

// Command is the image's entrypoint with args, or else its own arguments.
func (im *Image) Command(args []string) []string {
	c := im.Config.Config
	if len(args) == 0 {
		args = c.Cmd
	}
	return append(append([]string(nil), c.Entrypoint...), args...)
}

// Trace waits for the lookup and returns the trace, nil if there is none, and
// why or where from.
func (im *Image) Trace(ctx context.Context) (*tracefmt.Trace, string) {
	select {
	case <-im.trace.done:
		return im.trace.trace, im.trace.why
	case <-ctx.Done():
		return nil, "the container ended first"
	}
}
