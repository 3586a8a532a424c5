package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
	"github.com/reprise-project/reprise/tracefmt"
)

// serviceScript reads some files, listens, reads some more, and runs on. No module
// is needed for that.
const serviceScript = `cat /pages/0 /pages/1 /pages/2 > /dev/null
i=3
while [ $i -lt %d ]; do
	cat /pages/$i > /dev/null
	sleep 0.03
	i=$((i+1))
done
[ -z "$FAIL" ] || exit 3
exec perl -e '
	socket(S, 2, 1, 0) && bind(S, pack("S n x12", 2, 8080)) && listen(S, 1) or die $!;
	open(F, "/pages/after") && read(F, $x, 100000) or die $!;
	$| = 1; print "up\n"; sleep 1000'
`

// newService makes an image of a service, with a registry of its own. The service
// takes some 30 ms for each of the pages before it listens.
func newService(b *bench, pages int) *site {
	b.t.Helper()
	if !hasTool("perl") {
		b.t.Skip("needs perl")
	}
	base := append(programs(b.t, "bin/sh", "bin/cat", "bin/sleep", "usr/bin/perl"), dirs("tmp", "proc", "dev", "sys", "etc")...)
	files := append(dirs("pages"), testFile{name: "pages/script", body: fmt.Appendf(nil, serviceScript, pages)},
		testFile{name: "pages/after", body: randomBytes(1, 50_000)}, testFile{name: "pages/never", body: randomBytes(2, 500_000)})
	for i := range pages {
		files = append(files, testFile{name: fmt.Sprintf("pages/%d", i), body: randomBytes(uint64(5000+i), 50_000)})
	}
	writeLayout(b.t, b.mkdir("source"), []testLayer{base, files}, v1.ImageConfig{Cmd: []string{"/bin/sh", "/pages/script"}, Env: []string{"PATH=/bin:/usr/bin"}})
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(b.t, err)
	s := b.site("0s,unlimited", g)
	s.ref = s.addr + "/tests/service:obd"
	b.ok("convert", "--device-size", "67108864", "oci:"+b.path("source"), s.ref)
	return s
}

// A staging is a node that records what has no trace.
type staging struct {
	*ctrd
	supervisor *exec.Cmd
	writable   string // where containers write; "" is the default
}

const stagingConfig = `[registry]
plain_http = true
[snapshotter]
linger = "10ms"
[policy]
replay = %v
record = "missing"
[record]
settle = "500ms"
`

// staging starts a daemon and a containerd.
func (b *bench) staging(bin string, replay bool) *staging {
	b.t.Helper()
	program := b.executable()
	cmd := exec.Command(program, "supervise", "--", program, "daemon", "--root", b.root, "--config", b.write("config.toml", fmt.Sprintf(stagingConfig, replay)))
	cmd.Args[0], cmd.Env = "reprise", b.env
	log, err := os.Create(b.path("daemon.log"))
	require.NoError(b.t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(b.t, cmd.Start())
	n := &staging{supervisor: cmd}
	b.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if b.t.Failed() {
			b.t.Logf("the daemon's log:\n%s", n.said(b))
		}
	})
	eventually(b.t, "the daemon serves", func() bool { return strings.Contains(n.said(b), "the daemon serves") })
	n.ctrd = b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
	return n
}

// said is what the daemons have said so far.
func (n *staging) said(b *bench) string {
	p, err := os.ReadFile(b.path("daemon.log"))
	require.NoError(b.t, err)
	return string(p)
}

// stop ends all, when no container is left.
func (n *staging) stop() {
	n.ctrd.stop()
	require.NoError(n.b.t, n.supervisor.Process.Signal(unix.SIGTERM))
	require.NoError(n.b.t, n.supervisor.Wait(), n.said(n.b))
	require.NotContains(n.b.t, n.said(n.b), "DATA RACE")
	require.Empty(n.b.t, n.b.leftovers())
}

// A started is a container that runs.
type started struct {
	n    *staging
	ctr  client.Container
	task client.Task
	done <-chan client.ExitStatus
}

// startAll starts containers on an image that was pulled, all at once, each of the
// workload; "" is of none that is named.
func (n *staging) startAll(ref string, workloads []string, names []string, env ...string) []*started {
	t := n.b.t
	t.Helper()
	im, err := n.GetImage(n.ctx(), ref)
	require.NoError(t, err)
	list := make([]*started, len(names))
	errs := make(chan error, len(names))
	for i, name := range names {
		go func() {
			var err error
			list[i], err = n.tryStart(im, name, workloads[i], env)
			errs <- err
		}()
	}
	for range names {
		require.NoError(t, <-errs, n.log())
	}
	return list
}

func (n *staging) start(ref, workload, name string, env ...string) *started {
	n.b.t.Helper()
	return n.startAll(ref, []string{workload}, []string{name}, env...)[0]
}

func (n *staging) tryStart(im client.Image, name, workload string, env []string) (*started, error) {
	labels := map[string]string{}
	for key, value := range map[string]string{snapshotter.LabelWorkload: workload, snapshotter.LabelWritable: n.writable} {
		if value != "" {
			labels[key] = value
		}
	}
	name += "-" + n.b.mark // runc's state is that of the machine
	ctr, err := n.NewContainer(n.ctx(), name,
		client.WithImage(im), client.WithSnapshotter("reprise"), client.WithNewSnapshot(name, im, snapshots.WithLabels(labels)),
		client.WithRuntime("io.containerd.runc.v2", nil),
		client.WithNewSpec(oci.WithImageConfig(im), oci.WithEnv(env), noCgroups))
	if err != nil {
		return nil, err
	}
	task, err := ctr.NewTask(n.ctx(), cio.LogFile(n.b.path(name+".out")))
	if err != nil {
		return nil, err
	}
	done, err := task.Wait(n.ctx())
	if err != nil {
		return nil, err
	}
	return &started{n, ctr, task, done}, task.Start(n.ctx())
}

// said is what the container has said so far. It fails the test if it has ended.
func (s *started) said() string {
	t := s.n.b.t
	t.Helper()
	p, err := os.ReadFile(s.n.b.path(s.ctr.ID() + ".out"))
	require.NoError(t, err)
	select {
	case st := <-s.done:
		require.Fail(t, "the container has ended", "with status %d: %s", st.ExitCode(), p)
	default:
	}
	return string(p)
}

// end kills the container, if it still runs, and removes it. It returns its status.
func (s *started) end() uint32 {
	t := s.n.b.t
	t.Helper()
	_ = s.task.Kill(s.n.ctx(), unix.SIGKILL)
	st := <-s.done
	s.remove()
	return st.ExitCode()
}

// remove removes the container, which has ended.
func (s *started) remove() {
	t := s.n.b.t
	t.Helper()
	_, err := s.task.Delete(s.n.ctx())
	require.NoError(t, err)
	require.NoError(t, s.ctr.Delete(s.n.ctx(), client.WithSnapshotCleanup))
}

// devices are those of the daemon.
func (n *staging) devices() []node.Status {
	c, err := node.Dial(context.Background(), n.b.root)
	if err != nil {
		return nil
	}
	defer c.Close()
	list, err := c.List(context.Background())
	if err != nil {
		return nil
	}
	return list
}

// recording is what the daemon says of the recording on its only device.
func (n *staging) recording() string {
	if list := n.devices(); len(list) == 1 {
		return list[0].Recording
	}
	return ""
}

func (n *staging) awaitNoDevice() {
	n.collect()
	eventually(n.b.t, "the device goes", func() bool { return len(n.b.loops()) == 0 })
}

// pages are the files of the image that a trace has, below /pages.
func tracedPages(t *tracefmt.Trace) map[string]int64 {
	m := map[string]int64{}
	for _, e := range t.Events {
		if name, ok := strings.CutPrefix(e.Path, "/pages/"); ok {
			m[name] += e.Len
		}
	}
	return m
}

// pulledTrace is the trace of a workload beside an image.
func (b *bench) pulledTrace(ref, workload string) *tracefmt.Trace {
	b.t.Helper()
	name := filepath.Join(b.mkdir("pulled"), rand.Text())
	b.ok("trace", "pull", "--workload", workload, ref, name)
	tr, err := tracefmt.Open(name)
	require.NoError(b.t, err)
	return tr
}

// TestAutoRecord has two containers start at once on an image without a trace. One
// trace is recorded, of all that they read until they were ready and settled, and
// put beside the image; the next container is not recorded.
func TestAutoRecord(t *testing.T) {
	skipWithoutProbe(t)
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := newService(b, 10)
		n := b.staging(bin, true)
		b.ok("pull", "--plain-http", "--address", n.socket, s.ref)
		two := n.startAll(s.ref, []string{"web", "web"}, []string{"one", "two"})
		require.Contains(t, n.devices()[0].Trace, "no trace of workload web")
		eventually(t, "the trace is attached", func() bool { return strings.HasPrefix(n.recording(), "attached sha256:") })
		for _, c := range two {
			require.Equal(t, uint32(128+unix.SIGKILL), c.end())
		}
		require.Equal(t, 1, strings.Count(n.said(b), "a recorded trace is beside the image now"))

		tr := b.pulledTrace(s.ref, "web")
		require.Equal(t, "web", tr.Workload)
		require.Equal(t, []string{"/bin/sh", "/pages/script"}, tr.Args)
		require.EqualValues(t, 16<<10, tr.ReadAhead)
		require.Equal(t, tracefmt.LayerSpace, tr.Space)
		require.Equal(t, "ready: port 8080", tr.End.Reason)
		require.Positive(t, tr.End.Ready)
		pages := tracedPages(tr)
		for i := range 10 {
			require.GreaterOrEqual(t, pages[fmt.Sprint(i)], int64(50_000), "page %d", i)
		}
		require.GreaterOrEqual(t, pages["after"], int64(50_000), "what is read after the listen")
		require.Zero(t, pages["never"])
		readers := map[string]bool{}
		for _, e := range tr.Events {
			readers[e.Process] = true
		}
		require.Contains(t, readers, "cat")

		n.awaitNoDevice()
		again := n.start(s.ref, "web", "three")
		eventually(t, "the trace is known", func() bool {
			return strings.Contains(n.devices()[0].Explain, "of workload web")
		})
		eventually(t, "it is not recorded", func() bool { return n.recording() == "" })
		again.end()
		n.stop()
		require.Equal(t, 1, strings.Count(n.said(b), "a recorded trace "))
		require.NoDirExists(t, filepath.Join(b.root, "traces"))
	})
}

// TestAutoRecordDevices has two containers start at once that have a device each.
// One of them is recorded, and the next one is not, though nothing is replayed.
func TestAutoRecordDevices(t *testing.T) {
	skipWithoutProbe(t)
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := newService(b, 10)
		n := b.staging(bin, false)
		n.writable = snapshotter.WritableDir
		b.ok("pull", "--plain-http", "--address", n.socket, s.ref)
		two := n.startAll(s.ref, []string{"web", "web"}, []string{"one", "two"})
		require.Len(t, n.devices(), 2)
		eventually(t, "the trace of one is attached", func() bool {
			list := n.devices()
			return strings.HasPrefix(list[0].Recording+list[1].Recording, "attached sha256:")
		})
		for _, c := range two {
			c.end()
		}
		n.awaitNoDevice()
		c := n.start(s.ref, "web", "three")
		require.Equal(t, "no trace was asked for", n.devices()[0].Trace)
		eventually(t, "it listens", func() bool { return c.said() == "up\n" })
		c.end()
		n.awaitNoDevice()
		n.stop()
		require.Equal(t, 1, strings.Count(n.said(b), "a recorded trace "))
		require.Equal(t, "ready: port 8080", b.pulledTrace(s.ref, "web").End.Reason)
		require.GreaterOrEqual(t, tracedPages(b.pulledTrace(s.ref, "web"))["9"], int64(50_000))
	})
}

// TestAutoRecordDenied has a registry that takes no traces from the node. They are
// kept, which is said once; the command that the log has puts them beside the
// image. Until then the workload is not recorded again.
func TestAutoRecordDenied(t *testing.T) {
	skipWithoutProbe(t)
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := newService(b, 3)
		s.SetFault(func(r *http.Request) *regtest.Fault {
			if r.Method == http.MethodGet || r.Method == http.MethodHead {
				return nil
			}
			return &regtest.Fault{Status: http.StatusForbidden}
		})
		n := b.staging(bin, true)
		b.ok("pull", "--plain-http", "--address", n.socket, s.ref)
		var kept []string
		for _, workload := range []string{"web", "batch"} {
			c := n.start(s.ref, workload, workload)
			eventually(t, "the trace is kept", func() bool { return strings.HasPrefix(n.recording(), "kept: ") })
			kept = append(kept, n.recording())
			c.end()
			n.awaitNoDevice()
		}
		require.Equal(t, 1, strings.Count(n.said(b), "this node may not put traces beside images"), n.said(b))
		require.Len(t, b.files("state/traces"), 2)

		c := n.start(s.ref, "web", "again")
		require.Empty(t, n.recording())
		require.Contains(t, n.said(b), "the container is not recorded: a trace of its workload is kept on this node")
		c.end()

		s.SetFault(nil)
		for i, workload := range []string{"web", "batch"} {
			command := regexp.MustCompile(`push it with 'reprise (.*)'`).FindStringSubmatch(kept[i])
			require.NotNil(t, command, kept[i])
			b.ok(strings.Fields(command[1])...)
			require.Equal(t, "ready: port 8080", b.pulledTrace(s.ref, workload).End.Reason)
		}
		n.stop()
	})
}

// TestAutoRecordEnded has a container fail before it is ready. Its trace is kept to
// be looked at, and the next container is recorded.
func TestAutoRecordEnded(t *testing.T) {
	skipWithoutProbe(t)
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := newService(b, 20)
		n := b.staging(bin, true)
		b.ok("pull", "--plain-http", "--address", n.socket, s.ref)
		c := n.start(s.ref, "", "fails", "FAIL=1")
		st := <-c.done
		require.Equal(t, uint32(3), st.ExitCode())
		eventually(t, "the trace is kept", func() bool { return strings.HasPrefix(n.recording(), "kept: ") })
		require.Contains(t, n.recording(), ".ended.trace")
		require.NotContains(t, b.ok("trace", "ls", s.ref), "sh-")
		c.remove()
		n.awaitNoDevice()
		tr, err := tracefmt.Open(b.files("state/traces")[0])
		require.NoError(t, err)
		require.Contains(t, tr.End.Reason, "stop: ")
		require.GreaterOrEqual(t, tracedPages(tr)["19"], int64(50_000))

		c = n.start(s.ref, "", "works")
		eventually(t, "the trace is attached", func() bool { return strings.HasPrefix(n.recording(), "attached sha256:") })
		c.end()
		require.Equal(t, "ready: port 8080", b.pulledTrace(s.ref, tr.Workload).End.Reason)
		require.Empty(t, b.files("state/traces"))
		n.stop()
	})
}

// TestAutoRecordKilled kills the daemon amid a recording. The container goes on, no
// part of a trace is attached or kept, and the next start is recorded.
func TestAutoRecordKilled(t *testing.T) {
	skipWithoutProbe(t)
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := newService(b, 100)
		n := b.staging(bin, true)
		b.ok("pull", "--plain-http", "--address", n.socket, s.ref)
		c := n.start(s.ref, "web", "one")
		eventually(t, "it is recorded", func() bool { return n.recording() == "recording" })
		pid := b.daemonPid()
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
		eventually(t, "another daemon", func() bool { return b.daemonPid() != pid && len(n.devices()) == 1 })
		require.Equal(t, "lost: the server was started again amid it", n.recording())
		eventually(t, "the container listens", func() bool { return c.said() == "up\n" })
		c.end()
		n.awaitNoDevice()
		require.NotContains(t, b.ok("trace", "ls", s.ref), "web")
		require.NoDirExists(t, filepath.Join(b.root, "traces"))

		c = n.start(s.ref, "web", "two")
		eventually(t, "the trace is attached", func() bool { return strings.HasPrefix(n.recording(), "attached sha256:") })
		c.end()
		require.GreaterOrEqual(t, tracedPages(b.pulledTrace(s.ref, "web"))["99"], int64(50_000))
		n.stop()
	})
}

// TestAutoRecordMixed has a container of another workload come to the device of one
// that is recorded. There is no trace of either then.
func TestAutoRecordMixed(t *testing.T) {
	skipWithoutProbe(t)
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := newService(b, 60)
		n := b.staging(bin, true)
		b.ok("pull", "--plain-http", "--address", n.socket, s.ref)
		one := n.start(s.ref, "web", "one")
		eventually(t, "it is recorded", func() bool { return n.recording() == "recording" })
		two := n.start(s.ref, "batch", "two")
		eventually(t, "it is given up", func() bool { return strings.HasPrefix(n.recording(), "not recorded: ") })
		require.Contains(t, n.recording(), "a container of workload batch has come to the same device")
		one.end()
		two.end()
		n.awaitNoDevice()
		require.NoDirExists(t, filepath.Join(b.root, "traces"))
		require.NotContains(t, b.ok("trace", "ls", s.ref), "web")
		n.stop()
	})
}
