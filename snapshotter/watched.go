package snapshotter

import (
	"cmp"
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// Watched are the figures of a [Snapshotter] for Prometheus. It is safe for
// concurrent use.
type Watched struct {
	log   *slog.Logger
	times *prometheus.HistogramVec
	s     atomic.Pointer[Snapshotter]
}

// Values of the label outcome.
const (
	outcomeOK     = "ok"
	outcomeLazy   = "lazy" // a layer that is not fetched
	outcomeNone   = "not_found"
	outcomeExists = "already_exists"
	outcomeError  = "error"
)

// NewWatched has no snapshotter yet. Calls are logged to log: those that fail as
// warnings, those that containers start with as info, others that change something
// as debug.
func NewWatched(log *slog.Logger) *Watched {
	return &Watched{log: log, times: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "reprise_snapshotter_operation_duration_seconds",
		Help:    "How long containerd's calls took, by outcome: ok, lazy (a layer that was not fetched), not_found, already_exists or error.",
		Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60},
	}, []string{"operation", "outcome"})}
}

var descSnapshots = prometheus.NewDesc("reprise_snapshotter_snapshots",
	"Snapshots: committed ones are layers, active ones and views are containers'; lazy are those in overlaybd format, or on it.",
	[]string{"kind", "lazy"}, nil)

// Describe implements [prometheus.Collector].
func (w *Watched) Describe(ch chan<- *prometheus.Desc) {
	w.times.Describe(ch)
	ch <- descSnapshots
}

// Collect implements [prometheus.Collector].
func (w *Watched) Collect(ch chan<- prometheus.Metric) {
	w.times.Collect(ch)
	s := w.s.Load()
	if s == nil {
		return
	}
	counts, err := s.count(context.Background())
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descSnapshots, err)
		return
	}
	for c, n := range counts {
		ch <- prometheus.MustNewConstMetric(descSnapshots, prometheus.GaugeValue, float64(n), c.kind, strconv.FormatBool(c.lazy))
	}
}

// A sort of snapshots that are counted together.
type sort struct {
	kind string
	lazy bool
}

// count counts the snapshots.
func (s *Snapshotter) count(ctx context.Context) (map[sort]int, error) {
	counts := map[sort]int{}
	for _, kind := range []snapshots.Kind{snapshots.KindCommitted, snapshots.KindActive, snapshots.KindView} {
		counts[sort{kindName(kind), false}], counts[sort{kindName(kind), true}] = 0, 0
	}
	lazy, parents := map[string]bool{}, map[string]snapshots.Info{}
	err := s.read(ctx, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			parents[info.Name], lazy[info.Name] = info, isLayer(info.Labels)
			return nil
		})
	})
	if err != nil && !errdefs.IsNotFound(err) { // there has never been a snapshot
		return nil, err
	}
	for _, info := range parents {
		on := info.Name
		for on != "" && !lazy[on] {
			on = parents[on].Parent
		}
		counts[sort{kindName(info.Kind), on != ""}]++
	}
	return counts, nil
}

func kindName(k snapshots.Kind) string {
	switch k {
	case snapshots.KindActive:
		return "active"
	case snapshots.KindView:
		return "view"
	}
	return "committed"
}

// Of is s with its calls watched, from now on.
func (w *Watched) Of(s *Snapshotter) snapshots.Snapshotter {
	w.s.Store(s)
	return &watched{w, s}
}

// watched is a snapshotter whose calls are watched.
type watched struct {
	w *Watched
	s *Snapshotter
}

var _ snapshots.Cleaner = (*watched)(nil)

// A call is one of containerd's.
type call struct {
	op    string
	key   string
	image string     // may be unknown
	layer bool       // it prepares a layer that is not fetched
	level slog.Level // of the line when it succeeds
}

// levelNever is of calls that are not worth a line.
const levelNever = slog.LevelDebug - 1

func (c *call) outcome(err error) string {
	switch {
	case err == nil:
		return outcomeOK
	case c.layer && errdefs.IsAlreadyExists(err):
		return outcomeLazy
	case errdefs.IsAlreadyExists(err):
		return outcomeExists
	case errdefs.IsNotFound(err):
		return outcomeNone
	}
	return outcomeError
}

// watch makes a call.
func (w *watched) watch(ctx context.Context, c call, f func() error) error {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(attribute.String("reprise.image", c.image), attribute.String("reprise.snapshot", c.key))
	}
	begun := time.Now()
	err := f()
	took := time.Since(begun)
	outcome := c.outcome(err)
	w.w.times.WithLabelValues(c.op, outcome).Observe(took.Seconds())
	switch {
	case outcome == outcomeError:
		w.w.log.WarnContext(ctx, c.op, "image", c.image, "snapshot", c.key, "seconds", took.Seconds(), "err", err)
	case c.level > levelNever:
		w.w.log.Log(ctx, c.level, c.op, "image", c.image, "snapshot", c.key, "seconds", took.Seconds(), "outcome", outcome)
	}
	return err
}

// image is the image that a snapshot is of, or on; empty if that is not known.
func (s *Snapshotter) image(ctx context.Context, name string) (ref string) {
	_ = s.read(ctx, func(ctx context.Context) error {
		for name != "" && ref == "" {
			_, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			ref, name = labelledImage(info.Labels), info.Parent
		}
		return nil
	})
	return ref
}

func labelledImage(labels map[string]string) string {
	return cmp.Or(labels[snapshotters.TargetRefLabel], labels[labelImageRef])
}

// prepares is the call that prepares or views a snapshot.
func (w *watched) prepares(ctx context.Context, op, key, parent string, opts []snapshots.Opt) call {
	c := call{op: op, key: key, level: slog.LevelInfo}
	labels, err := labelsOf(opts)
	if err != nil {
		return c // which is what the snapshotter will say
	}
	if labels[snapshots.LabelSnapshotRef] != "" {
		c.op, c.level, c.layer = op+"_layer", slog.LevelDebug, isLayer(labels)
	}
	if c.image = labelledImage(labels); c.image == "" {
		c.image = w.s.image(ctx, parent)
	}
	return c
}

// of is a call about a snapshot that is there.
func (w *watched) of(ctx context.Context, op, key string) call {
	return call{op: op, key: key, image: w.s.image(ctx, key), level: slog.LevelDebug}
}

// Prepare implements [snapshots.Snapshotter].
func (w *watched) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) (mounts []mount.Mount, err error) {
	err = w.watch(ctx, w.prepares(ctx, "prepare", key, parent, opts), func() (err error) {
		mounts, err = w.s.Prepare(ctx, key, parent, opts...)
		return err
	})
	return mounts, err
}

// View implements [snapshots.Snapshotter].
func (w *watched) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) (mounts []mount.Mount, err error) {
	err = w.watch(ctx, w.prepares(ctx, "view", key, parent, opts), func() (err error) {
		mounts, err = w.s.View(ctx, key, parent, opts...)
		return err
	})
	return mounts, err
}

// Mounts implements [snapshots.Snapshotter].
func (w *watched) Mounts(ctx context.Context, key string) (mounts []mount.Mount, err error) {
	err = w.watch(ctx, w.of(ctx, "mounts", key), func() (err error) {
		mounts, err = w.s.Mounts(ctx, key)
		return err
	})
	return mounts, err
}

// Commit implements [snapshots.Snapshotter].
func (w *watched) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return w.watch(ctx, w.of(ctx, "commit", key), func() error { return w.s.Commit(ctx, name, key, opts...) })
}

// Remove implements [snapshots.Snapshotter].
func (w *watched) Remove(ctx context.Context, key string) error {
	return w.watch(ctx, w.of(ctx, "remove", key), func() error { return w.s.Remove(ctx, key) })
}

// Cleanup implements [snapshots.Cleaner].
func (w *watched) Cleanup(ctx context.Context) error {
	return w.watch(ctx, call{op: "cleanup", level: slog.LevelDebug}, func() error { return w.s.Cleanup(ctx) })
}

// Stat implements [snapshots.Snapshotter].
func (w *watched) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = w.watch(ctx, call{op: "stat", key: key, level: levelNever}, func() (err error) {
		info, err = w.s.Stat(ctx, key)
		return err
	})
	return info, err
}

// Update implements [snapshots.Snapshotter].
func (w *watched) Update(ctx context.Context, info snapshots.Info, fields ...string) (now snapshots.Info, err error) {
	err = w.watch(ctx, call{op: "update", key: info.Name, level: levelNever}, func() (err error) {
		now, err = w.s.Update(ctx, info, fields...)
		return err
	})
	return now, err
}

// Usage implements [snapshots.Snapshotter].
func (w *watched) Usage(ctx context.Context, key string) (u snapshots.Usage, err error) {
	err = w.watch(ctx, call{op: "usage", key: key, level: levelNever}, func() (err error) {
		u, err = w.s.Usage(ctx, key)
		return err
	})
	return u, err
}

// Walk implements [snapshots.Snapshotter].
func (w *watched) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return w.watch(ctx, call{op: "walk", level: levelNever}, func() error { return w.s.Walk(ctx, fn, filters...) })
}

// Close implements [snapshots.Snapshotter].
func (w *watched) Close() error { return w.s.Close() }
