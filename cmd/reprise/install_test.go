package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/replayer/node"
)

func TestUnitOf(t *testing.T) {
	require.Equal(t, packagedUnit, unitOf(unitProgram))
	for program, want := range map[string]string{
		"/opt/reprise/bin/reprise": "/opt/reprise/bin/reprise",
		"/a b/reprise":             `"/a b/reprise"`,
		"/100%/reprise":            "/100%%/reprise",
	} {
		require.Contains(t, unitOf(program), "\nExecStart="+want+" daemon\n")
	}
}

func TestHostFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	file := func(text string) hostFile {
		return hostFile{path: path, mode: 0o640, open: open(text)}
	}
	write := func(text string, change bool) {
		t.Helper()
		f := file(text)
		changed, err := f.write()
		require.NoError(t, err)
		require.Equal(t, change, changed)
		requireFile(t, path, text)
	}
	write("one", true)
	write("one", false)
	require.NoError(t, replaced{path}.back()) // there was none before
	require.NoFileExists(t, path)

	write("one", true)
	write("two", true)
	require.NoError(t, replaced{path}.back())
	requireFile(t, path, "one")

	long := strings.Repeat("x", 1<<20)
	write(long, true)
	write(long[1:]+"y", true)
	write(long[1:], true)
	require.NoError(t, replaced{path}.forget())
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o640), fi.Mode())
	left, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, left, 1)
}

func requireFile(t *testing.T, path, text string) {
	t.Helper()
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, text, string(p))
}

// A testHost is one with systemd, where the directories that an installation
// writes to are its own.
type testHost struct {
	*installer
	sd   *testSystemd
	b    *bench
	said strings.Builder
}

func newTestHost(t *testing.T, b *bench) *testHost {
	h := &testHost{sd: newTestSystemd(t, b), b: b}
	// All that differs from a system's instance: what a user's may not do.
	limits := "OOMScoreAdjust=0\nLimitNOFILE=1024\nLimitMEMLOCK=65536\n"
	h.sd.boot(b, `
		mount -t tmpfs tmpfs /var/lib && mkdir /run/upper /run/work || exit 3
		mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc || exit 3
		mkdir -p /etc/systemd/user/`+unitName+`.d /etc/reprise || exit 3
		printf '%s' '[Service]
`+limits+b.unitEnv()+`' >/etc/systemd/user/`+unitName+`.d/test.conf`)
	h.installer = &installer{
		host: h.sd.inside("/"), program: b.executable(), to: b.path("prefix/bin/reprise"),
		units: b.path("home/.config/systemd/user"), bus: "/run/own/systemd/private", out: &h.said,
	}
	return h
}

// pid is the daemon's process.
func (h *testHost) pid() int {
	h.b.t.Helper()
	info, err := h.server(h.b.t.Context())
	require.NoError(h.b.t, err)
	return info.Pid
}

// TestInstall installs the daemon, again, with a program and a configuration that
// do not come up, and removes it.
func TestInstall(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	ref, _ := b.loadImage()
	h := newTestHost(t, b)
	ctx := t.Context()
	require.ErrorContains(t, h.check(ctx), "differs from what is to be installed")
	require.NoError(t, h.install(ctx))
	require.Contains(t, h.said.String(), "serving: "+node.DefaultSocket)
	require.NoError(t, h.check(ctx))
	require.True(t, h.sd.ctl("is-enabled", unitName))
	pid := h.pid()
	require.NoError(t, h.install(ctx))
	require.Equal(t, pid, h.pid(), "started again, though nothing has changed")

	ro := b.mkdir("ro")
	h.sd.ok(b, "mount", "--root", node.DefaultRoot, ref, ro)
	list := func() []os.DirEntry {
		names, err := os.ReadDir(h.sd.inside(ro))
		require.NoError(t, err)
		return names
	}
	require.NotEmpty(t, list())
	t.Run("configuration", func(t *testing.T) {
		h.config = b.write("config.toml", "# nothing\n")
		require.NoError(t, h.install(ctx))
		require.NotEqual(t, pid, h.pid(), "the old configuration")
		pid = h.pid()
		require.NoError(t, h.check(ctx))
	})
	t.Run("bad configuration", func(t *testing.T) {
		b.write("config.toml", "there_is_no_such_key = 1\n")
		require.ErrorContains(t, h.install(ctx), "what was there before serves again")
		requireFile(t, h.here(configPath), "# nothing\n")
		b.write("config.toml", "# nothing\n")
		require.NoError(t, h.check(ctx))
	})
	t.Run("bad program", func(t *testing.T) {
		good := h.program
		h.program = b.write("bad", "#!/bin/sh\nexit 1\n")
		require.ErrorContains(t, h.install(ctx), "what was there before serves again")
		h.program = good
		require.NoError(t, h.check(ctx))
	})
	require.NotEmpty(t, list())
	require.ErrorContains(t, h.unused(ctx), "images are served: "+ref)
	h.sd.ok(b, "umount", "--root", node.DefaultRoot, ro)
	require.NoError(t, h.unused(ctx))

	require.NoError(t, h.uninstall(ctx))
	for _, path := range []string{h.to, h.unit(), node.DefaultSocket} {
		require.NoFileExists(t, h.here(path))
	}
	require.False(t, h.sd.ctl("is-active", unitName))
	require.False(t, h.sd.ctl("is-enabled", unitName))
	require.NoError(t, h.unused(ctx))
	require.NoError(t, h.uninstall(ctx), "again")
	h.sd.end()
}

// A daemon that another way has brought stays as it is.
func TestInstallForeign(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	h := newTestHost(t, b)
	require.NoError(t, os.WriteFile(h.here("/etc/systemd/user/"+unitName), []byte(packagedUnit), 0o644))
	require.True(t, h.sd.ctl("daemon-reload"))
	require.ErrorContains(t, h.install(t.Context()), "remove the package that brought it first")
	require.ErrorContains(t, h.uninstall(t.Context()), "remove the package that brought it first")
	require.NoFileExists(t, h.here(h.to))
	h.sd.end()
}

func TestInstallWithoutSystemd(t *testing.T) {
	in := &installer{host: t.TempDir(), bus: "/run/systemd/private"}
	require.ErrorContains(t, in.install(t.Context()), "no systemd that could run the daemon")
	require.ErrorContains(t, in.uninstall(t.Context()), "no systemd that could run the daemon")
	require.NoError(t, in.unused(t.Context()))
}

func open(text string) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(text)), nil }
}
