package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/replayer/node"
)

// tmpfs are devices that mount a tmpfs, unless they are told to fail.
type tmpfs struct {
	node.Devices
	fail error
	dirs map[string]string
}

func (d *tmpfs) Attach(_ context.Context, r *node.Request, _ func(string)) (*node.Status, error) {
	if d.fail != nil {
		return nil, d.fail
	}
	if d.dirs[r.ID] != "" {
		return &node.Status{}, nil
	}
	d.dirs[r.ID] = r.Dir
	return &node.Status{}, unix.Mount("none", r.Dir, "tmpfs", 0, "")
}

func (d *tmpfs) Release(_ context.Context, id string, _ bool) error {
	dir := d.dirs[id]
	if dir == "" {
		return nil
	}
	delete(d.dirs, id)
	return unix.Unmount(dir, 0)
}

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// lazily are the labels of a layer in overlaybd format.
func lazily(target string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: target, labelBlobDigest: someDigest,
		snapshotters.TargetRefLabel: "a.example.com/lazy:1",
	})
}

// TestWatched makes calls of each kind and outcome, and finds them in the figures,
// the log and the spans.
func TestWatched(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == "seconds" {
			return slog.Attr{}
		}
		return a
	}}))
	watch := NewWatched(log)
	require.Zero(t, testutil.CollectAndCount(watch), "nothing yet")
	devices := &tmpfs{dirs: map[string]string{}}
	inner, err := New(t.Context(), filepath.Join(t.TempDir(), "s"), devices, &Options{NoAhead: true, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	s := watch.Of(inner)
	spans := tracetest.NewSpanRecorder()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)).Tracer("test")

	ok := func(err error) { require.NoError(t, err) }
	exists := func(err error) { require.True(t, errdefs.IsAlreadyExists(err), "%v", err) }
	missing := func(err error) { require.True(t, errdefs.IsNotFound(err), "%v", err) }
	failed := func(err error) { require.ErrorContains(t, err, "no device today") }
	ctx := t.Context()
	plain := snapshots.WithLabels(map[string]string{snapshotters.TargetRefLabel: "a.example.com/plain:1", snapshots.LabelSnapshotRef: "plain"})
	steps := []struct {
		do   func(ctx context.Context) error
		is   func(error)
		line string
	}{
		{func(ctx context.Context) error { _, err := s.Stat(ctx, "lazy"); return err }, missing, ""},
		{func(ctx context.Context) error { _, err := s.Prepare(ctx, "x", "", lazily("lazy")); return err }, exists,
			"level=DEBUG msg=prepare_layer image=a.example.com/lazy:1 snapshot=x outcome=lazy"},
		{func(ctx context.Context) error { _, err := s.Prepare(ctx, "y", "", plain); return err }, ok,
			"level=DEBUG msg=prepare_layer image=a.example.com/plain:1 snapshot=y outcome=ok"},
		{func(ctx context.Context) error { return s.Commit(ctx, "plain", "y", plain) }, ok,
			"level=DEBUG msg=commit image=a.example.com/plain:1 snapshot=y outcome=ok"},
		{func(ctx context.Context) error { _, err := s.Prepare(ctx, "c1", "plain"); return err }, ok,
			"level=INFO msg=prepare image=a.example.com/plain:1 snapshot=c1 outcome=ok"},
		{func(ctx context.Context) error { _, err := s.Prepare(ctx, "c1", "plain"); return err }, exists,
			"level=INFO msg=prepare image=a.example.com/plain:1 snapshot=c1 outcome=already_exists"},
		{func(ctx context.Context) error {
			devices.fail = errors.New("no device today")
			defer func() { devices.fail = nil }()
			_, err := s.Prepare(ctx, "c2", "lazy")
			return err
		}, failed, `level=WARN msg=prepare image=a.example.com/lazy:1 snapshot=c2 err="no device today"`},
		{func(ctx context.Context) error { _, err := s.Prepare(ctx, "c2", "lazy"); return err }, ok,
			"level=INFO msg=prepare image=a.example.com/lazy:1 snapshot=c2 outcome=ok"},
		{func(ctx context.Context) error { _, err := s.View(ctx, "v", "lazy"); return err }, ok,
			"level=INFO msg=view image=a.example.com/lazy:1 snapshot=v outcome=ok"},
		{func(ctx context.Context) error { _, err := s.Mounts(ctx, "c2"); return err }, ok,
			"level=DEBUG msg=mounts image=a.example.com/lazy:1 snapshot=c2 outcome=ok"},
		{func(ctx context.Context) error { return s.Commit(ctx, "mine", "c2") }, ok,
			"level=DEBUG msg=commit image=a.example.com/lazy:1 snapshot=c2 outcome=ok"},
		{func(ctx context.Context) error { _, err := s.Prepare(ctx, "c3", "mine"); return err }, ok,
			"level=INFO msg=prepare image=a.example.com/lazy:1 snapshot=c3 outcome=ok"},
		{func(ctx context.Context) error { _, err := s.Usage(ctx, "c3"); return err }, ok, ""},
		{func(ctx context.Context) error {
			return s.Walk(ctx, func(context.Context, snapshots.Info) error { return nil })
		}, ok, ""},
		{func(ctx context.Context) error {
			_, err := s.Update(ctx, snapshots.Info{Name: "c3", Labels: map[string]string{"a": "b"}}, "labels")
			return err
		}, ok, ""},
		{func(ctx context.Context) error { return s.Remove(ctx, "none") }, missing,
			`level=DEBUG msg=remove image="" snapshot=none outcome=not_found`},
	}
	for i, step := range steps {
		out.Reset()
		ctx, span := tracer.Start(ctx, "call")
		step.is(step.do(ctx))
		span.End()
		require.Equal(t, step.line, strings.TrimSpace(out.String()), "step %d", i)
	}
	require.Contains(t, spans.Ended()[1].Attributes(), attribute.String("reprise.image", "a.example.com/lazy:1"))
	require.Contains(t, spans.Ended()[1].Attributes(), attribute.String("reprise.snapshot", "x"))

	require.NoError(t, testutil.CollectAndCompare(watch, strings.NewReader(`
# HELP reprise_snapshotter_snapshots Snapshots: committed ones are layers, active ones and views are containers'; lazy are those in overlaybd format, or on it.
# TYPE reprise_snapshotter_snapshots gauge
reprise_snapshotter_snapshots{kind="active",lazy="false"} 1
reprise_snapshotter_snapshots{kind="active",lazy="true"} 1
reprise_snapshotter_snapshots{kind="committed",lazy="false"} 1
reprise_snapshotter_snapshots{kind="committed",lazy="true"} 2
reprise_snapshotter_snapshots{kind="view",lazy="false"} 0
reprise_snapshotter_snapshots{kind="view",lazy="true"} 1
`), "reprise_snapshotter_snapshots"))
	problems, err := testutil.CollectAndLint(watch)
	require.NoError(t, err)
	require.Empty(t, problems, "names and units by Prometheus practice")
	for _, key := range []string{"c1", "c3", "mine", "v", "plain", "lazy"} {
		require.NoError(t, s.Remove(ctx, key))
	}
	require.NoError(t, s.(snapshots.Cleaner).Cleanup(ctx))
	require.Equal(t, 6+15, testutil.CollectAndCount(watch))
	require.NoError(t, s.Close())
	require.Empty(t, devices.dirs)
}
