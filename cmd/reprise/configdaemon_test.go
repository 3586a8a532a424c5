package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	tracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// A configured is a daemon with a configuration file, under a supervisor, and a
// client of its snapshotter.
type configured struct {
	t      *testing.T
	b      *bench
	config string
	log    string
	cmd    *exec.Cmd
	snapshots.Snapshotter
}

func (b *bench) configured(t *testing.T, config string) *configured {
	t.Helper()
	self, err := os.Executable()
	require.NoError(b.t, err)
	d := &configured{t: t, b: b, config: b.write("config.toml", config), log: b.path("log")}
	log, err := os.Create(d.log)
	require.NoError(b.t, err)
	defer log.Close()
	d.cmd = b.command("supervise", "--", self, "daemon", "--root", b.root, "--config", d.config)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	require.NoError(b.t, d.cmd.Start())
	b.t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			_ = d.cmd.Process.Signal(os.Interrupt)
			_ = d.cmd.Wait()
		}
		if b.t.Failed() {
			b.t.Logf("the daemon's log:\n%s", d.said())
		}
	})
	d.says("the daemon serves", 1)
	conn, err := grpc.NewClient("unix://"+d.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(b.t, err)
	b.t.Cleanup(func() { require.NoError(b.t, conn.Close()) })
	d.Snapshotter = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "reprise")
	return d
}

func (d *configured) socket() string { return filepath.Join(d.b.root, "reprise.sock") }

func (d *configured) said() string {
	p, err := os.ReadFile(d.log)
	require.NoError(d.b.t, err)
	return string(p)
}

// says waits until the daemon has said something so often.
func (d *configured) says(what string, times int) {
	d.b.t.Helper()
	eventually(d.b.t, what, func() bool { return strings.Count(d.said(), what) >= times })
}

// pull makes the snapshots of an image's layers and returns the topmost one.
func (d *configured) pull(ctx context.Context, ref string) (parent string) {
	t := d.t
	t.Helper()
	var info imageInfo
	require.NoError(t, json.Unmarshal([]byte(d.b.ok("image", "info", "--json", ref)), &info))
	for i, l := range info.Layers {
		name := fmt.Sprint("layer-", i)
		_, err := d.Prepare(ctx, "extract-"+name, parent, snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotRef:                     name,
			"containerd.io/snapshot/overlaybd/blob-digest": l.Digest,
			"containerd.io/snapshot/cri.image-ref":         ref,
			"containerd.io/snapshot/cri.manifest-digest":   info.Manifest,
		}))
		require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
		parent = name
	}
	return parent
}

// devices are those that the daemon serves.
func (d *configured) devices() (list []node.Status) {
	t := d.t
	t.Helper()
	status, body := get(t, d.socket(), "http://daemon/v1/devices")
	require.Equal(t, http.StatusOK, status)
	require.NoError(t, json.Unmarshal([]byte(body), &list))
	return list
}

// end ends the daemon when nothing needs it any more.
func (d *configured) end(ctx context.Context, keys ...string) {
	t := d.t
	t.Helper()
	for _, key := range keys {
		require.NoError(t, d.Remove(ctx, key))
	}
	require.NoError(t, d.Snapshotter.(snapshots.Cleaner).Cleanup(ctx))
	require.NoError(t, d.cmd.Process.Signal(os.Interrupt))
	require.NoError(t, d.cmd.Wait())
	d.b.settled()
}

// A collector is where spans go.
type collector struct {
	*httptest.Server

	mu    sync.Mutex // guards spans
	spans []spanOf
}

// spanOf is what matters of a span.
type spanOf struct {
	trace, name string
	service     string
	image       string
	events      []string
}

func newCollector(t *testing.T) *collector {
	c := &collector{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := io.ReadAll(r.Body)
		var got tracepb.ExportTraceServiceRequest
		if r.URL.Path != "/v1/traces" || err != nil || proto.Unmarshal(p, &got) != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, rs := range got.ResourceSpans {
			service := ""
			for _, a := range rs.Resource.Attributes {
				if a.Key == "service.name" {
					service = a.Value.GetStringValue()
				}
			}
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					o := spanOf{trace: fmt.Sprintf("%x", s.TraceId), name: s.Name, service: service}
					for _, a := range s.Attributes {
						if a.Key == "reprise.image" {
							o.image = a.Value.GetStringValue()
						}
					}
					for _, e := range s.Events {
						o.events = append(o.events, e.Name)
					}
					c.spans = append(c.spans, o)
				}
			}
		}
	}))
	t.Cleanup(c.Close)
	return c
}

// named are the spans of a name.
func (c *collector) named(name string) (found []spanOf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.name == name {
			found = append(found, s)
		}
	}
	return found
}

// TestDaemonConfig: what the file says of logs, figures, spans and traces is so,
// and a file that is wrong does not take the daemon away.
func TestDaemonConfig(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	host, _, _ := strings.Cut(s.ref, "/")
	c := newCollector(t)
	good := fmt.Sprintf(`
[tracing]
endpoint = %q
[log]
level = "debug"
format = "json"
[snapshotter]
lookup_ahead = false
[[policy.rule]]
match = [%q]
replay = false
`, c.URL, host)
	d := b.configured(t, good)
	const id = "0af7651916cd43dd8448eb211c80319c"
	ctx := namespaces.WithNamespace(t.Context(), "default")
	traced := metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+id+"-b7ad6b7169203331-01")

	top := d.pull(ctx, s.ref)
	_, err := d.Prepare(traced, "one", top)
	require.NoError(t, err)
	list := d.devices()
	require.Len(t, list, 1)
	require.Equal(t, "no trace was asked for", list[0].Trace, "the policy is that there is none")

	_, text := get(t, d.socket(), "http://daemon/metrics")
	require.EqualValues(t, 1, metric(t, text, `reprise_snapshotter_snapshots{kind="active",lazy="true"}`))
	require.EqualValues(t, 1, metric(t, text, `reprise_snapshotter_operation_duration_seconds_count{operation="prepare",outcome="ok"}`))
	require.EqualValues(t, 1, metric(t, text, "reprise_image_devices{image=\""+list[0].Ref+"\"}"))
	for line := range strings.Lines(d.said()) {
		var v map[string]any
		if !strings.HasPrefix(line, "{") { // the supervisor's
			continue
		}
		require.NoError(t, json.Unmarshal([]byte(line), &v), line)
		if _, about := v["snapshot"]; about {
			require.Equal(t, s.ref, v["image"], line)
		}
	}
	require.Contains(t, d.said(), fmt.Sprintf(`"level":"INFO","msg":"prepare","image":%q,"snapshot":"one"`, s.ref))
	require.Contains(t, d.said(), `"level":"DEBUG","msg":"prepare_layer"`)

	b.write("config.toml", good+"\n[cache]\nsise = 1\n")
	b.fails2(exitFailed, []string{"daemon", "upgrade", "--root", b.root}, "unknown key cache.sise")
	require.Len(t, d.devices(), 1)
	b.write("config.toml", strings.Replace(good, "replay = false", "replay = true", 1))
	b.ok("daemon", "upgrade", "--root", b.root)
	d.says("the daemon serves", 2)

	// What the process before had to say of its calls is there, as it has ended.
	const prepare = "containerd.services.snapshots.v1.Snapshots/Prepare"
	spans := c.named(prepare)
	i := slices.IndexFunc(spans, func(s spanOf) bool { return s.trace == id })
	require.GreaterOrEqual(t, i, 0, "%v", spans)
	require.Equal(t, []string{s.ref, "reprise"}, []string{spans[i].image, spans[i].service})
	attach := c.named("attach device")
	require.Len(t, attach, 1)
	require.Equal(t, []string{id, list[0].Ref}, []string{attach[0].trace, attach[0].image})
	require.Subset(t, attach[0].events, []string{"manifest", "image open", "device attached"})
	replay := c.named("replay")
	require.Len(t, replay, 1)
	require.Equal(t, id, replay[0].trace)
	require.Empty(t, c.named("containerd.services.snapshots.v1.Snapshots/Stat"))

	mounts, err := d.Mounts(ctx, "one")
	require.NoError(t, err)
	require.NoError(t, mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		return readThrough(filepath.Join(root, "data/big"), randomBytes(3, 3_000_000))
	}))
	d.end(ctx, "one")
}

// TestDaemonFinishesCalls: a daemon that is replaced, or ended, while a container is
// being prepared answers first.
func TestDaemonFinishesCalls(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	d := b.configured(t, "[snapshotter]\nlookup_ahead = false\n")
	ctx := namespaces.WithNamespace(t.Context(), "default")
	top := d.pull(ctx, s.ref)
	asked, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.SetFault(func(r *http.Request) *regtest.Fault {
		once.Do(func() { close(asked) })
		select {
		case <-answer:
		case <-r.Context().Done():
		}
		return nil
	})
	prepared := make(chan error, 1)
	go func() {
		_, err := d.Prepare(ctx, "one", top)
		prepared <- err
	}()
	<-asked
	upgraded := make(chan result, 1)
	upgrade := b.command("daemon", "upgrade", "--root", b.root)
	go func() { upgraded <- b.finish(upgrade) }()
	d.says("the daemon leaves", 1)
	require.Empty(t, prepared)
	require.Equal(t, 1, strings.Count(d.said(), "the daemon serves"))
	close(answer)
	require.NoError(t, <-prepared)
	r := <-upgraded
	require.Zero(t, r.code, r.stderr)
	d.says("the daemon serves", 2)
	info, err := d.Stat(ctx, "one")
	require.NoError(t, err)
	require.Equal(t, top, info.Parent)
	require.Len(t, d.devices(), 1)
	d.end(ctx, "one")
}
