package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// envKills is how often the daemon is killed; from 100 on the last tenth of the
// kills are 1 to 5 s apart, the others 5 to 60 ms.
const envKills = "REPRISE_KILLS"

func kills(def int) int {
	if n, err := strconv.Atoi(os.Getenv(envKills)); err == nil {
		return n
	}
	return def
}

func killPause(i, of int) time.Duration {
	if of >= 100 && i >= of-of/10 {
		return time.Duration(1000+rand.IntN(4000)) * time.Millisecond
	}
	return time.Duration(5+rand.IntN(55)) * time.Millisecond
}

// A daemonBench is a daemon under its supervisor, with a writable and a
// read-only image mounted through it, and a load on both.
type daemonBench struct {
	*bench
	supervisor *exec.Cmd
	upper      string   // config.v1.json of the writable image
	dirs       []string // mount points
	loads      []*devicetest.Load
}

// startDaemon starts `reprise supervise -- reprise daemon`.
func (b *bench) startDaemon() *exec.Cmd {
	b.t.Helper()
	program := b.executable()
	cmd := exec.Command(program, "supervise", "--", program, "daemon", "--root", b.root)
	cmd.Args[0] = "reprise"
	cmd.Env = b.env
	log, err := os.Create(b.path("daemon.log"))
	require.NoError(b.t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(b.t, cmd.Start())
	eventually(b.t, "the daemon listens", func() bool { // else mount makes a server of its own
		_, err := os.Stat(filepath.Join(b.root, "reprise.sock"))
		return err == nil
	})
	b.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Signal(unix.SIGKILL)
			_ = cmd.Wait()
		}
		if b.t.Failed() {
			p, _ := os.ReadFile(log.Name())
			b.t.Logf("the daemon's log:\n%s", p[max(0, len(p)-4000):])
		}
	})
	return cmd
}

// child waits for the one child of a process, other than the process not.
func child(t testing.TB, of, not int) (pid int) {
	eventually(t, "a new child of the supervisor", func() bool {
		p, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", of, of))
		for tid := range tasks(of) {
			if more, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", of, tid)); err == nil {
				p = append(p, more...)
			}
		}
		for _, f := range strings.Fields(string(p)) {
			if n, err := strconv.Atoi(f); err == nil && n != not && !isZombie(n) {
				pid = n
				return true
			}
		}
		return false
	})
	return pid
}

func tasks(pid int) map[string]bool {
	names := map[string]bool{}
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, e := range entries {
		names[e.Name()] = true
	}
	return names
}

func isZombie(pid int) bool {
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, after, _ := strings.Cut(string(p), ") ")
	return strings.HasPrefix(after, "Z") || strings.HasPrefix(after, "X")
}

// loadImage puts an image with the files of a Load at a registry, and on disk
// as a config.v1.json with an upper layer.
func (b *bench) loadImage() (ref, config string) {
	b.t.Helper()
	tree := b.mkdir("tree")
	require.NoError(b.t, devicetest.WriteTree(tree, 6, 1024))
	var layer testLayer
	for _, path := range b.files("tree") {
		p, err := os.ReadFile(path)
		require.NoError(b.t, err)
		layer = append(layer, testFile{name: filepath.Base(path), body: p})
	}
	writeLayout(b.t, b.mkdir("source"), []testLayer{layer}, v1.ImageConfig{})
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(b.t, err)
	s := b.site("5ms,400mbit", g)
	ref = s.addr + "/tests/load:obd"
	converted := b.mkdir("converted")
	b.ok("convert", "--device-size", "268435456", "oci:"+b.path("source"), ref)
	b.ok("convert", "--device-size", "268435456", "oci:"+b.path("source"), "oci:"+converted+":obd")
	return ref, b.localConfig(converted)
}

// localConfig describes the image in a layout, with an empty upper layer.
func (b *bench) localConfig(layout string) string {
	b.t.Helper()
	read := func(path string, v any) {
		p, err := os.ReadFile(path)
		require.NoError(b.t, err)
		require.NoError(b.t, json.Unmarshal(p, v))
	}
	var index v1.Index
	read(filepath.Join(layout, "index.json"), &index)
	var m v1.Manifest
	read(filepath.Join(layout, "blobs", "sha256", index.Manifests[0].Digest.Encoded()), &m)
	var c backstore.Config
	for _, l := range m.Layers {
		c.Lowers = append(c.Lowers, backstore.ConfigLayer{File: filepath.Join(layout, "blobs", "sha256", l.Digest.Encoded())})
	}
	c.Upper.Data = b.upper(256 << 20)
	p, err := json.Marshal(c)
	require.NoError(b.t, err)
	return b.write("config.v1.json", string(p))
}

func newDaemonBench(t *testing.T) *daemonBench {
	skipUnprivileged(t)
	b := &daemonBench{bench: newBench(t)}
	ref, config := b.loadImage()
	b.supervisor, b.upper = b.startDaemon(), config
	for _, m := range [][]string{{"--rw", config}, {ref}} {
		dir := b.mkdir(fmt.Sprint("mnt", len(b.dirs)))
		eventually(t, "the daemon mounts", func() bool {
			r := b.run(append(append([]string{"mount"}, m...), dir)...)
			require.Zero(t, r.code, r.stderr)
			return true
		})
		b.dirs = append(b.dirs, dir)
	}
	for i, o := range []devicetest.LoadOptions{{Readers: 3, Writer: true}, {Readers: 3}} {
		l, err := devicetest.StartLoad(b.dirs[i], o)
		require.NoError(t, err)
		b.loads = append(b.loads, l)
	}
	return b
}

func (b *daemonBench) failed() bool {
	return b.loads[0].Failed() || b.loads[1].Failed()
}

// finish ends the loads, unmounts, and looks at what was written.
func (b *daemonBench) finish(what string) {
	b.t.Helper()
	for i, l := range b.loads {
		result, err := l.Stop()
		if err != nil {
			b.t.Error(err)
		}
		b.t.Logf("%s, %s: %v", what, b.dirs[i], result)
	}
	for _, dir := range b.dirs {
		b.ok("umount", dir)
	}
	flat := b.path("flat")
	b.ok("image", "dump", b.upper, flat)
	devicetest.Tool(b.t, "e2fsck", "-fn", flat)
	require.NoError(b.t, b.supervisor.Process.Signal(unix.SIGTERM))
	require.NoError(b.t, b.supervisor.Wait())
	b.settled()
}

// TestDaemonKills kills the daemon at random moments while images that it
// serves are read and written.
func TestDaemonKills(t *testing.T) {
	b := newDaemonBench(t)
	n := kills(40)
	pid := 0
	for i := 0; i < n && !b.failed(); i++ {
		pid = child(t, b.supervisor.Process.Pid, pid)
		time.Sleep(killPause(i, n))
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	}
	b.finish(fmt.Sprint(n, " kills"))
}

// TestDaemonUpgrades replaces the program of the daemon under the same load.
func TestDaemonUpgrades(t *testing.T) {
	b := newDaemonBench(t)
	before := child(t, b.supervisor.Process.Pid, 0)
	for i := range 3 {
		program := b.path(fmt.Sprint("reprise-", i))
		copyFile(t, b.path("reprise"), program)
		require.NoError(t, os.Chmod(program, 0o755))
		b.ok("daemon", "upgrade", "--root", b.root, "--binary", program)
		now := child(t, b.supervisor.Process.Pid, before)
		require.NotEqual(t, before, now)
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", now))
		require.NoError(t, err)
		require.Equal(t, program, exe)
		before = now
	}
	b.finish("3 upgrades")
}
