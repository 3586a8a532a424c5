package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// readLoop reads what is in the image again and again, and says so each time.
const readLoop = `trap 'exit 7' TERM; while cat /data/a /data/more /app/page-* > /dev/null; do echo round; echo x >> /tmp/rounds; sleep 0.01; done; exit 3`

// A longRun is a container that outlives containerd.
type longRun struct {
	c    *ctrd
	name string
	log  string
}

// begin starts a container, whose shim writes down what it says.
func (c *ctrd) begin(name, ref string, args ...string) *longRun {
	t := c.b.t
	t.Helper()
	r := &longRun{c: c, name: name, log: filepath.Join(c.dir, name+".log")}
	r.start(c.create(name, ref, args...))
	return r
}

func (r *longRun) start(ctr client.Container) {
	t := r.c.b.t
	t.Helper()
	task, err := ctr.NewTask(r.c.ctx(), cio.LogFile(r.log))
	require.NoError(t, err, r.c.log())
	require.NoError(t, task.Start(r.c.ctx()), r.c.log())
}

// rounds is how often it has read everything.
func (r *longRun) rounds() int {
	p, _ := os.ReadFile(r.log)
	return strings.Count(string(p), "round\n")
}

// goesOn waits until it has read everything once more from now on.
func (r *longRun) goesOn() {
	r.c.b.t.Helper()
	n := r.rounds()
	eventually(r.c.b.t, r.name+" goes on", func() bool { return r.rounds() > n+1 })
}

// container and task are as containerd has them now.
func (r *longRun) container() (client.Container, client.Task) {
	t := r.c.b.t
	t.Helper()
	ctr, err := r.c.LoadContainer(r.c.ctx(), r.name)
	require.NoError(t, err, r.c.log())
	task, err := ctr.Task(r.c.ctx(), nil)
	require.NoError(t, err, r.c.log())
	return ctr, task
}

// end stops and deletes the container, which must not have failed before.
func (r *longRun) end() {
	t := r.c.b.t
	t.Helper()
	ctr, task := r.container()
	ended, err := task.Wait(r.c.ctx())
	require.NoError(t, err)
	require.NoError(t, task.Kill(r.c.ctx(), unix.SIGTERM))
	require.EqualValues(t, 7, (<-ended).ExitCode())
	_, err = task.Delete(r.c.ctx())
	require.NoError(t, err)
	require.NoError(t, ctr.Delete(r.c.ctx(), client.WithSnapshotCleanup))
}

// A gate holds back the requests to a registry that match, until it is opened.
type gate struct {
	reached chan struct{} // closed when the first one is held back
	open    func()
}

func (s *site) gate(match func(*http.Request) bool) *gate {
	opened := make(chan struct{})
	g := &gate{reached: make(chan struct{})}
	first := sync.OnceFunc(func() { close(g.reached) })
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if match(r) {
			first()
			select {
			case <-opened:
			case <-r.Context().Done():
			}
		}
		return nil
	})
	g.open = sync.OnceFunc(func() {
		s.SetFault(nil)
		close(opened)
	})
	return g
}

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

// killDaemon kills the daemon, and waits for the next one.
func (b *bench) killDaemon() {
	b.t.Helper()
	pid := b.daemonPid()
	require.NoError(b.t, unix.Kill(pid, unix.SIGKILL))
	eventually(b.t, "another daemon", func() bool { return b.daemonPid() != pid })
}

// replaceDaemon starts an upgrade; it ends once what the daemon has under way has.
func (b *bench) replaceDaemon() (wait func()) {
	var r result
	done := make(chan struct{})
	go func() {
		defer close(done)
		r = b.finish(b.command("daemon", "upgrade", "--root", b.root))
	}()
	return func() {
		<-done
		require.Zero(b.t, r.code, r.stderr)
	}
}

// unavailable is what containerd says of a plugin that it has no connection to.
const unavailable = `unavailable|connection error|error reading from server: EOF`

// pullAgain pulls as a user would who is told that something is not available
// right now: containerd waits up to 3 s before it connects to a plugin again.
func (c *ctrd) pullAgain(args []string) {
	t := c.b.t
	t.Helper()
	eventually(t, "the image is pulled", func() bool {
		r := c.b.run(args...)
		if r.code != 0 {
			require.Regexp(t, unavailable, message(r.stderr))
		}
		return r.code == 0
	})
}

// TestContainerdKills kills containerd, the daemon and both, and replaces the
// daemon, while containers run, images are pulled and containers are created.
func TestContainerdKills(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.smallSite("0s,unlimited")
		_, ordinary := b.variant(s, 0)
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		pull := []string{"pull", "--plain-http", "--address", c.socket}
		b.ok(append(pull, s.ref)...)
		b.ok(append(pull, ordinary)...)
		runs := []*longRun{
			c.begin("lazy", s.ref, "/bin/sh", "-c", readLoop),
			c.begin("ordinary", ordinary, "/bin/sh", "-c", readLoop),
		}
		goOn := func() {
			t.Helper()
			for _, r := range runs {
				r.goesOn()
			}
		}
		goOn()
		for i, kill := range []struct {
			name string
			kill func() (wait func())
		}{
			{"containerd is killed", func() func() { c.kill(); c.start(); return func() {} }},
			{"the daemon is killed", func() func() { b.killDaemon(); return func() {} }},
			{"both are killed", func() func() { c.kill(); b.killDaemon(); c.start(); return func() {} }},
			{"the daemon is replaced", b.replaceDaemon},
		} {
			t.Log(kill.name)
			lazy, ref := b.variant(s, i+1)

			// While layers are fetched.
			g := s.gate(isBlob)
			var pulled result
			done := make(chan struct{})
			go func() {
				defer close(done)
				pulled = b.finish(b.command(append(pull, ref)...))
			}()
			<-g.reached
			wait := kill.kill()
			g.open()
			<-done
			wait()
			if pulled.code != 0 {
				require.Contains(t, message(pulled.stderr), "pull "+ref)
				c.pullAgain(append(pull, ref))
			}
			goOn()
			c.hello("pulled", ref)
			c.remove(ref)

			// While a device is attached.
			c.pullAgain(append(pull, lazy))
			g = s.gate(isBlob)
			done = make(chan struct{})
			var ctr client.Container
			var err error
			go func() {
				defer close(done)
				ctr, err = c.tryCreate(c.ctx(), "amid", lazy)
			}()
			<-g.reached
			wait = kill.kill()
			g.open()
			<-done
			wait()
			eventually(t, "the container is created", func() bool {
				if err == nil {
					return true
				}
				require.Regexp(t, unavailable, err.Error())
				ctr, err = c.tryCreate(c.ctx(), "amid", lazy)
				return err == nil
			})
			code, out := c.run(ctr)
			require.Zero(t, code, out)
			require.Equal(t, "hello from the image\n", out)
			require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
			c.remove(lazy)
			goOn()
		}
		for _, r := range runs {
			r.end()
		}
		c.remove(s.ref, ordinary)
		c.emptied()
		c.stop()
		b.end(supervisor, said)
	})
}

// hello runs a container of the image to its end and deletes it.
func (c *ctrd) hello(name, ref string) {
	t := c.b.t
	t.Helper()
	ctr := c.create(name, ref)
	code, out := c.run(ctr)
	require.Zero(t, code, out)
	require.Equal(t, "hello from the image\n", out)
	require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
}

// TestContainerdMachine starts everything anew, as after the machine has been
// switched off: no mount and no device is left, and what containers have written
// is there.
func TestContainerdMachine(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.smallSite("0s,unlimited")
		supervisor, _ := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		b.ok("pull", "--plain-http", "--address", c.socket, s.ref)
		ctr := c.create("one", s.ref, "/bin/sh", "-c", "cat /data/a > /data/copy; echo x >> /data/count; cat /data/count")
		_, out := c.run(ctr)
		require.Equal(t, "x\n", out)

		c.kill()
		pid := b.daemonPid()
		require.NoError(t, supervisor.Process.Kill())
		_ = supervisor.Wait()
		_ = unix.Kill(pid, unix.SIGKILL)
		eventually(t, "everything has ended", func() bool { return len(b.processes()) == 0 })
		supervisor, said := b.daemon(true)
		c.start()
		ctr, err := c.LoadContainer(c.ctx(), "one")
		require.NoError(t, err)
		_, out = c.run(ctr)
		require.Equal(t, "x\nx\n", out)
		require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
		c.hello("two", s.ref)
		c.remove(s.ref)
		c.emptied()
		c.stop()
		b.end(supervisor, said)
	})
}
