package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

// ps lists what is here, as JSON and as text.
func (b *bench) ps(address string) (l listing, text string) {
	b.t.Helper()
	args := []string{"ps", "--root", b.root, "--address", address}
	text = b.ok(args...)
	require.NoError(b.t, json.Unmarshal([]byte(b.ok(append(args, "--json")...)), &l))
	b.t.Logf("\n%s", text)
	return l, text
}

// TestPs looks at a node from its first image to its last.
func TestPs(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.ownSite(false)
		none := b.path("none.sock")
		l, text := b.ps(none)
		require.Empty(t, l.Images)
		require.Nil(t, l.Daemon)
		require.Contains(t, text, "No daemon answers")

		b.ok("attach", s.ref, b.recording(s))
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		l, _ = b.ps(c.socket)
		require.Empty(t, l.Images)
		require.Equal(t, b.daemonPid(), l.Daemon.Pid)

		b.ok("pull", "--plain-http", "--address", c.socket, s.ref)
		l, text = b.ps(c.socket)
		require.Len(t, l.Images, 1)
		require.Nil(t, l.Images[0].Device, "nothing uses it")
		require.Equal(t, 5, l.Images[0].Layers)
		require.Empty(t, l.Images[0].Containers)
		require.Regexp(t, `(?m)^`+s.ref+` +- +- +- +- +- +0$`, text)
		_, text = b.ps(none)
		require.Regexp(t, `(?m)^\S+/tests/small@[0-9a-f]{12} +- +- +- +- +- +0$`, text)

		r := c.begin("one", s.ref, "/bin/sh", "-c", readLoop)
		r.goesOn()
		l, text = b.ps(c.socket)
		require.Empty(t, l.Containerd)
		im := l.Images[0]
		require.Len(t, im.Containers, 1)
		require.Equal(t, snapshotter.Container{
			Namespace: "default", ID: "one", Image: s.ref, Snapshotter: "reprise", SnapshotKey: "one", State: "running",
		}, im.Containers[0].Container)
		require.True(t, im.Device.Lazy)
		require.Less(t, im.Device.Present, im.Device.Size)
		require.NotZero(t, im.Device.Present)
		require.NotEmpty(t, im.Device.Why)
		require.Regexp(t, `(?m)^`+s.ref+` +/dev/loop\d+ +lazy, \S+ \S+ of \S+ MiB +\S+ \S+ in \d+ +\S+ +\S.* +1$`, text)
		require.Contains(t, text, "\n    trace: "+im.Device.Trace+": "+im.Device.Why+"\n")
		require.Contains(t, text, "\n    container default/one, running\n")

		dir := b.mkdir("mnt")
		b.ok("mount", s.ref, dir)
		l, text = b.ps(none)
		require.Len(t, l.Images, 2)
		require.Contains(t, text, "\n    mounted at "+dir+"\n")
		require.Contains(t, text, "\n    container default/one\n", "containerd cannot be asked")
		require.Contains(t, text, "Containers have the names of their snapshots: containerd at "+none)
		b.ok("umount", dir)

		ctr, task := r.container()
		ended, err := task.Wait(c.ctx())
		require.NoError(t, err)
		require.NoError(t, task.Kill(c.ctx(), unix.SIGKILL))
		<-ended
		_, text = b.ps(c.socket)
		require.Contains(t, text, "\n    container default/one, stopped\n")
		_, err = task.Delete(c.ctx())
		require.NoError(t, err)
		require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
		c.remove(s.ref)
		c.emptied()
		l, _ = b.ps(c.socket)
		require.Empty(t, l.Images)
		c.stop()
		b.end(supervisor, said)
	})
}

// TestPsWithoutDaemon lists what commands serve by themselves.
func TestPsWithoutDaemon(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	one, two := b.mkdir("one"), b.mkdir("two")
	b.ok("mount", s.ref, one)
	b.ok("mount", "--rw", s.ref, two)
	l, text := b.ps(b.path("none.sock"))
	require.Len(t, l.Images, 2)
	for _, im := range l.Images {
		require.Equal(t, s.ref, im.Ref)
		require.NotEmpty(t, im.Manifest)
		require.Contains(t, text, "\n    mounted at "+im.Device.Dir+"\n")
		require.Equal(t, im.Device.Dir == two, im.Device.Writable)
		require.True(t, strings.HasPrefix(im.Device.Path, "/dev/"))
	}
	b.ok("umount", one)
	b.ok("umount", two)
	l, _ = b.ps(b.path("none.sock"))
	require.Empty(t, l.Images)
}

// The table, to the letter.
func TestPsTable(t *testing.T) {
	const pinned = "registry.test/java@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	stats := backstore.Stats{DemandBytes: 1 << 20, DemandRequests: 3, BackgroundBytes: 1 << 20, BackgroundRequests: 4, Stall: 53_412 * time.Microsecond}
	devices := []node.Status{
		{ID: "snapshot-7", Ref: pinned, Device: "/dev/loop3", Layers: 3, Size: 8 << 20, Present: 2 << 20, Now: node.Snapshot{Stats: stats},
			Explain: "used: 14 ranges; own trace of java", Recording: "asked for", Waiting: []string{"registry.test for 3s"}},
		{ID: "snapshot-8", Ref: "registry.test/idle:1", Device: "/dev/loop4", Size: 1 << 20, Present: 1 << 20, Explain: "not used: there is none"},
		{ID: "dev-1", Ref: "/images/config.v1.json", Device: "/dev/ublkb0", Dir: "/mnt", Explain: "not used: no trace was asked for"},
		{ID: "dev-2", Ref: "registry.test/run:1", Device: "/dev/loop5", Pid: 77, Size: 4, Explain: "odd"},
	}
	chains := []snapshotter.ChainInfo{
		{Ref: pinned, Device: "snapshot-7", Layers: 3, Containers: []string{"k8s.io/12/abc", "k8s.io/13/sandbox", "default/2/with/slash", "k8s.io/9/unknown"}},
		{Ref: "registry.test/idle:1", Device: "snapshot-8"},
		{Ref: "registry.test/pulled:1", Device: "snapshot-9", Layers: 2},
	}
	containers := map[string]snapshotter.Container{}
	for _, c := range []snapshotter.Container{
		{Namespace: "k8s.io", ID: "abc", Pod: "shop/web-1", Name: "app", Image: "registry.test/java:17", SnapshotKey: "abc", State: "running"},
		{Namespace: "k8s.io", ID: "sandbox", Pod: "shop/web-1", SnapshotKey: "sandbox", State: "running"},
		{Namespace: "default", ID: "two", Image: "registry.test/javascript:17", SnapshotKey: "with/slash", State: "created"},
	} {
		containers[c.Namespace+"/"+c.SnapshotKey] = c
	}
	l := &listing{Daemon: &node.ServerInfo{}}
	l.join(devices, chains, ctrdNames{containers: containers})
	var out bytes.Buffer
	require.NoError(t, l.print(newTable(&out)))
	require.Equal(t, strings.ReplaceAll(`IMAGE                   DEVICE       ON THIS NODE          FETCHED     READS WAITED  TRACE     CONTAINERS
/images/config.v1.json  /dev/ublkb0  all of 0 B            0 B in 0    0s            not used  0
    trace: not used: no trace was asked for
    mounted at /mnt
registry.test/idle:1    /dev/loop4   all of 1 MiB          0 B in 0    0s            not used  0
    trace: not used: there is none
    no container is on it any more: its device goes soon
registry.test/java:17   /dev/loop3   lazy, 2 MiB of 8 MiB  2 MiB in 7  53.4ms        used      4
    trace: used: 14 ranges; own trace of java
    recording: asked for
    reads wait for registry.test for 3s
    container shop/web-1/app, running
    container shop/web-1/(sandbox), running
    container default/two, created
    container k8s.io/unknown
registry.test/pulled:1  -            -                     -           -             -         0
registry.test/run:1     /dev/loop5   lazy, 0 B of 4 B      0 B in 0    0s            odd       0
    served by process 77
`, "\r", ""), out.String())
	l.Images[1].Containers = nil
	require.Equal(t, "registry.test/java@0123456789ab", (&listedImage{Ref: pinned}).name())
	require.ErrorIs(t, l.print(newTable(failingWriter{})), errFull)
}

func TestPsUsage(t *testing.T) {
	b := newBench(t)
	for _, args := range [][]string{{"ps", "x"}, {"ps", "--root="}, {"ps", "--frob"}} {
		require.Equal(t, exitUsage, b.run(args...).code, args)
	}
}
