package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// raceEnabled: the race detector takes several times the memory.
var raceEnabled bool

// TestContainerdMany starts 50 containers of 5 images at once, and deletes them:
// nothing of them stays in the daemon. The daemon takes less than
// 60 MB and 1 MB an image.
func TestContainerdMany(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.smallSite("0s,unlimited")
		supervisor, said := b.daemon(true)
		socket := filepath.Join(b.root, "reprise.sock")
		c := b.containerd(bin, socket)
		var refs []string
		for i := range variants {
			ref, _ := b.variant(s, i)
			refs = append(refs, ref)
		}
		round := func(n int) {
			for _, ref := range refs {
				b.ok("pull", "--plain-http", "--address", c.socket, ref)
			}
			c.many(refs, n, func() {
				require.Len(t, b.loops(), len(refs), "one device an image")
				memory := anonymous(t, b.daemonPid())
				t.Logf("%d containers of %d images: the daemon has %d KB of anonymous memory", n, len(refs), memory)
				if !raceEnabled {
					require.Less(t, memory, 60_000+1000*len(refs))
				}
			})
			c.remove(refs...)
			c.emptied()
		}
		round(len(refs))
		figures := func() (goroutines, descriptors float64) {
			_, text := get(t, socket, "http://reprise/metrics")
			return metric(t, text, "go_goroutines"), metric(t, text, "process_open_fds")
		}
		goroutines, descriptors := figures()
		round(50)
		eventually(t, "goroutines and descriptors as before", func() bool {
			g, d := figures()
			return g <= goroutines && d <= descriptors
		})
		c.stop()
		b.end(supervisor, said)
	})
}

// many starts n containers of the images at once, calls f while all of them run,
// and deletes them at once.
func (c *ctrd) many(refs []string, n int, f func()) {
	t := c.b.t
	t.Helper()
	ctx := c.ctx()
	tasks := make([]client.Task, n)
	containers := make([]client.Container, n)
	logs := make([]string, n)
	var all errgroup.Group
	for i := range n {
		logs[i] = filepath.Join(c.dir, fmt.Sprintf("many-%d.log", i))
		all.Go(func() (err error) {
			containers[i], err = c.tryCreate(ctx, fmt.Sprintf("many-%d", i), refs[i%len(refs)],
				"/bin/sh", "-c", "cat /data/* > /tmp/all 2>&1; echo up; exec sleep 1000")
			if err == nil {
				tasks[i], err = containers[i].NewTask(ctx, cio.LogFile(logs[i]))
			}
			if err == nil {
				err = tasks[i].Start(ctx)
			}
			return err
		})
	}
	require.NoError(t, all.Wait(), c.log())
	for i := range n {
		eventually(t, "a container is up", func() bool {
			p, _ := os.ReadFile(logs[i])
			return strings.Contains(string(p), "up\n")
		})
	}
	f()
	for i := range n {
		all.Go(func() error {
			ended, err := tasks[i].Wait(ctx)
			if err == nil {
				err = tasks[i].Kill(ctx, unix.SIGKILL)
			}
			if err == nil {
				<-ended
				_, err = tasks[i].Delete(ctx)
			}
			if err == nil {
				err = containers[i].Delete(ctx, client.WithSnapshotCleanup)
			}
			return err
		})
	}
	require.NoError(t, all.Wait(), c.log())
	for _, log := range logs {
		require.NoError(t, os.Remove(log))
	}
}

// anonymous is the memory of a process, in KB, that is not of files.
func anonymous(t *testing.T, pid int) int {
	t.Helper()
	for line := range strings.Lines(string(contentOf(t, fmt.Sprintf("/proc/%d/status", pid)))) {
		if f := strings.Fields(line); f[0] == "RssAnon:" {
			n, err := strconv.Atoi(f[1])
			require.NoError(t, err)
			return n
		}
	}
	t.Fatal("no RssAnon")
	return 0
}
