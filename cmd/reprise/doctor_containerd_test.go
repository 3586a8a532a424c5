package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/snapshotter"
)

// Configurations that people have: what is wrong in them is found, with a cure
// that, put into the file, is one.
func TestCheckContainerdConfig(t *testing.T) {
	const (
		proxy     = "[proxy_plugins.reprise]\n type = \"snapshot\"\n address = \"/r/reprise.sock\"\n"
		exports   = "[proxy_plugins.reprise.exports]\n root = \"/r/snapshotter\"\n"
		told      = " enable_remote_snapshot_annotations = \"true\"\n"
		cri2      = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n snapshotter = \"reprise\"\n"
		cri3      = "[plugins.'io.containerd.cri.v1.images']\n snapshotter = \"reprise\"\n"
		annotated = " disable_snapshot_annotations = false\n"
		unpack    = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n platform = \"linux\"\n snapshotter = \"reprise\"\n"
	)
	tests := []struct {
		name, version, config string
		// grades of findings, as "name=grade"; "ok" of those that are not named
		want string
		says []string // somewhere in details and remedies
		only bool     // nothing is looked at behind the last of want
	}{
		{name: "1.6", version: "1.6.20~ds1", config: "version = 2\n" + proxy + cri2 + annotated},
		{name: "1.7", version: "1.7.24", config: "version = 2\n" + proxy + exports + cri2 + annotated},
		{name: "2.0", version: "v2.0.1", config: "version = 3\n" + proxy + exports + cri3 + annotated},
		{name: "2.1, local pulls", version: "v2.1.4", config: "version = 3\n" + proxy + exports + cri3 + annotated},
		{name: "2.4, a file of version 2", version: "2.4.2+unknown", config: "version = 2\n" + proxy + exports + cri2 + annotated},
		{name: "2.4, version 4", version: "v2.4.2", config: "version = 4\n" + proxy + exports + cri3 + annotated},
		{
			name: "2.1, transfer service", version: "v2.1.4", config: "version = 3\n" + proxy + exports + told + cri3 + unpack,
			says: []string{"by the transfer service"},
		},
		{
			name: "2.1, transfer service without unpacking", version: "v2.1.4", config: "version = 3\n" + proxy + exports + told + cri3,
			want: "pulls=warn", says: []string{"has no unpack_config for reprise", "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n    platform = \"linux\"\n    snapshotter = \"overlayfs\"\n"},
		},
		{
			name: "2.1, transfer service without annotations", version: "v2.1.4", config: "version = 3\n" + proxy + exports + cri3 + unpack,
			want: "pulls=warn", says: []string{"does not tell the snapshotter", `enable_remote_snapshot_annotations = "true"`},
		},
		{
			name: "2.1, local pulls without annotations", version: "v2.1.4",
			config: "version = 3\n" + proxy + exports + cri3 + " use_local_image_pull = true\n",
			want:   "pulls=warn", says: []string{"not told of which image", "[plugins.\"io.containerd.cri.v1.images\"]\n    disable_snapshot_annotations = false"},
		},
		{
			name: "2.1, local pulls by another setting", version: "v2.1.4",
			config: "version = 3\n" + proxy + exports + told + cri3 + " max_concurrent_downloads = 8\n" + unpack,
			want:   "pulls=warn", says: []string{"disable_snapshot_annotations = false"},
		},
		{
			name: "1.6, no annotations by default", version: "1.6.20", config: "version = 2\n" + proxy + cri2,
			want: "pulls=warn", says: []string{"[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n    disable_snapshot_annotations = false"},
		},
		{
			name: "1.7, discarded layers, no exports", version: "1.7.24",
			config: "version = 2\n" + proxy + cri2 + annotated + " discard_unpacked_layers = true\n",
			want:   "layers=warn disk=warn", says: []string{"discard_unpacked_layers = false", "[proxy_plugins.reprise.exports]\n    root = \"/r/snapshotter\""},
		},
		{
			name: "2.0, discarded layers, wrong exports", version: "v2.0.0",
			config: "version = 3\n" + proxy + "[proxy_plugins.reprise.exports]\n root = \"/elsewhere\"\n" + cri3 + annotated + " discard_unpacked_layers = true\n",
			want:   "layers=warn disk=warn", says: []string{"kubelet watches the disk of /elsewhere, the images are in /r/snapshotter"},
		},
		{name: "nothing, 1.6", version: "1.6.20", config: "version = 2\n", want: "snapshotter=-", says: []string{`address = "/r/reprise.sock"`}, only: true},
		{name: "nothing, 2.4", version: "v2.4.2", config: "", want: "snapshotter=-", says: []string{`root = "/r/snapshotter"`}, only: true},
		{
			name: "wrong type", version: "1.6.20", config: "version = 2\n" + strings.Replace(proxy, "snapshot", "content", 1) + cri2,
			want: "snapshotter=warn", says: []string{`of type "content"`}, only: true,
		},
		{
			name: "another socket", version: "1.6.20", config: "version = 2\n" + strings.Replace(proxy, "/r/", "/old/", 1) + cri2 + annotated,
			want: "snapshotter=warn", says: []string{"/old/reprise.sock, the daemon of /r at /r/reprise.sock", `address = "/r/reprise.sock"`},
		},
		{
			name: "another name", version: "1.6.20",
			config: "version = 2\n" + strings.Replace(proxy, ".reprise]", ".lazy]", 1) + strings.Replace(cri2, "reprise", "lazy", 1) + annotated,
			says:   []string{"proxy plugin lazy", "they use lazy"},
		},
		{
			name: "pods have another", version: "1.7.24", config: "version = 2\n" + proxy,
			want: "pods=-", says: []string{"they use overlayfs", `snapshotter = "reprise"`}, only: true,
		},
		{
			name: "pods of a runtime", version: "1.7.24",
			config: "version = 2\n" + proxy + exports + "[plugins.'io.containerd.grpc.v1.cri'.containerd]\n" + annotated + "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.lazy]\n snapshotter = \"reprise\"\n",
			says:   []string{"those of the runtimes lazy use reprise, others overlayfs"},
		},
		{
			name: "pods of a runtime, 2.0", version: "2.0.0",
			config: "version = 3\n" + proxy + exports + "[plugins.'io.containerd.cri.v1.images']\n" + annotated + "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.lazy]\n snapshotter = \"reprise\"\n",
			says:   []string{"those of the runtimes lazy use reprise"},
		},
		{
			name: "as Docker installs it", version: "1.7.24", config: "disabled_plugins = [\"cri\"]\n" + proxy,
			want: "pods=-", says: []string{"the CRI plugin is disabled"}, only: true,
		},
		{name: "too old", version: "1.5.9", config: "version = 2\n" + proxy + cri2 + annotated, want: "containerd=warn", says: []string{"1.6 or later"}},
		{name: "not TOML", version: "1.6.20", config: "version = 2\n[proxy", want: "configuration=warn", says: []string{"config.toml: line 2, column "}, only: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x := factsOf(t, tt.config)
			x.version = tt.version
			list := x.findings()
			want := map[string]grade{}
			last := ""
			for _, w := range strings.Fields(tt.want) {
				name, g, _ := strings.Cut(w, "=")
				want[name], last = grade(g), name
			}
			var all strings.Builder
			for _, f := range list {
				g, ok := want[f.Name]
				delete(want, f.Name)
				if !ok {
					g = fine
				}
				require.Equal(t, g, f.Grade, "%+v", f)
				require.Equal(t, g == lacking, f.Remedy != "" && g != without, "%+v", f)
				all.WriteString(f.Detail + "\n" + f.Remedy + "\n")
			}
			require.Empty(t, want, "%+v", list)
			for _, s := range tt.says {
				require.Contains(t, all.String(), s)
			}
			require.Equal(t, tt.only, last != "" && last == list[len(list)-1].Name, "%+v", list)
		})
	}
}

// factsOf is a configuration whose containerd runs and has loaded it.
func factsOf(t *testing.T, config string) *ctrdFacts {
	t.Helper()
	x := &ctrdFacts{root: "/r", ctrdFlags: ctrdFlags{config: filepath.Join(t.TempDir(), "config.toml"), snapshotter: "reprise"}}
	x.pause, x.pauseHere = "pause:1", snapshotter.ImageState{There: true, Unpacked: true}
	require.NoError(t, os.WriteFile(x.ctrdFlags.config, []byte(config), 0o600))
	if x.config, x.readErr = readCtrdConfig(x.ctrdFlags.config); x.config != nil {
		x.snapshotter, _ = x.config.proxy(x.snapshotter, x.socket())
		x.config.Root = t.TempDir()
		require.NoError(t, os.Symlink("/r/snapshotter", x.assumed()))
	}
	return x
}

// Every cure, written into the file as it is printed, is one.
func TestContainerdCures(t *testing.T) {
	for _, version := range []string{"1.6.20", "1.7.24", "v2.0.1", "v2.4.2"} {
		t.Run(version, func(t *testing.T) {
			major3 := strings.HasPrefix(version, "v2")
			config := "version = 2\n"
			if major3 {
				config = "version = 3\n"
			}
			tables := map[string][]string{}
			for range 5 {
				text := config
				for table, lines := range tables {
					text += table + "\n" + strings.Join(lines, "\n") + "\n"
				}
				x := factsOf(t, text)
				x.version = version
				left := 0
				for _, f := range x.findings() {
					if f.Grade == fine {
						continue
					}
					left++
					apply(tables, f.Remedy)
				}
				if left == 0 {
					return
				}
			}
			t.Fatalf("in vain: %v", tables)
		})
	}
}

// apply does what a remedy says first: it puts the lines below a table's name there.
func apply(tables map[string][]string, remedy string) {
	table := ""
	for i, line := range strings.Split(remedy, "\n") {
		text := strings.TrimSpace(line)
		switch {
		case i == 0:
		case !strings.HasPrefix(line, " "):
			return // another way
		case strings.HasPrefix(text, "["):
			table = text
		default:
			tables[table] = append(tables[table], text)
		}
	}
}

func TestContainerdImports(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	write("conf.d/a.toml", "[proxy_plugins.reprise]\ntype='snapshot'\naddress='/a'\n[plugins.p.t]\nx=1\n")
	write("conf.d/b.toml", "imports=['../main.toml']\n[proxy_plugins.reprise]\ntype='snapshot'\naddress='/b'\n[plugins.p.t]\ny=2\n")
	for version, keeps := range map[string]bool{"2": false, "3": true} {
		c, err := readCtrdConfig(write("main.toml", "version="+version+"\nimports=['conf.d/*.toml']\n[plugins.p]\nz=3\n"))
		require.NoError(t, err)
		require.Equal(t, "/b", c.Proxies["reprise"].Address)
		require.Equal(t, int64(2), lookup[int64](c.Plugins, "p", "t", "y"))
		require.Equal(t, keeps, lookup[int64](c.Plugins, "p", "z") == 3, "version %s merges tables", version)
		require.Equal(t, keeps, lookup[int64](c.Plugins, "p", "t", "x") == 1)
	}
	_, err := readCtrdConfig(write("bad.toml", "imports=['gone.toml']\n"))
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Contains(t, err.Error(), "gone.toml")
	_, err = readCtrdConfig(write("glob.toml", "imports=['*[']\n"))
	require.ErrorIs(t, err, filepath.ErrBadPattern)
}

// What is known of the containerd that runs, and of the sandboxes' image.
func TestCheckContainerdFacts(t *testing.T) {
	const config = "version = 2\n[proxy_plugins.reprise]\ntype='snapshot'\naddress='/r/reprise.sock'\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter='reprise'\ndisable_snapshot_annotations=false\n"
	tests := []struct {
		name   string
		change func(*ctrdFacts)
		of     string
		grade  grade
		says   string
	}{
		{"not loaded", func(x *ctrdFacts) { x.loaded = errdefs.ErrNotFound }, "snapshotter", lacking, "but not in the containerd that runs"},
		{"failed to load", func(x *ctrdFacts) { x.loaded = errors.New("boom") }, "snapshotter", lacking, "could not be loaded: boom"},
		{"no daemon", func(x *ctrdFacts) { x.answers = errors.New("boom") }, "snapshotter", lacking, "no snapshotter answers at /r/reprise.sock: no such file or directory"},
		{"stopped", func(x *ctrdFacts) { x.version, x.askErr = "", unix.ECONNREFUSED }, "containerd", lacking, "does not answer"},
		{"for root", func(x *ctrdFacts) { x.version, x.askErr = "", os.ErrPermission }, "containerd", without, "for root only"},
		{"disk by a link", func(*ctrdFacts) {}, "disk", fine, "by the link "},
		{"disk unseen", func(x *ctrdFacts) { x.config.Root = "/c" }, "disk", lacking, "ln -s /r/snapshotter /c/io.containerd.snapshotter.v1.reprise; or containerd 1.6.32"},
		{"disk, 1.6 with exports", func(x *ctrdFacts) { x.version = "1.6.32" }, "disk", lacking, "[proxy_plugins.reprise.exports]"},
		{"disk, 1.7 without exports", func(x *ctrdFacts) { x.version = "1.7.15" }, "disk", fine, "by the link "},
		{"sandbox not pulled", func(x *ctrdFacts) { x.pauseHere = snapshotter.ImageState{} }, "sandbox image", fine, "pulled with the first pod"},
		{"sandbox unpacked", func(*ctrdFacts) {}, "sandbox image", fine, "unpacked for reprise"},
		{"sandbox elsewhere", func(x *ctrdFacts) { x.pauseHere = snapshotter.ImageState{There: true, Content: true} }, "sandbox image", fine, "with the next pod"},
		{"sandbox lost", func(x *ctrdFacts) { x.pauseHere = snapshotter.ImageState{There: true} }, "sandbox image", lacking, "images rm pause:1"},
		{"sandbox unknown", func(x *ctrdFacts) { x.pauseErr = errors.New("boom") }, "sandbox image", lacking, "boom"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x := factsOf(t, config)
			x.version = "1.6.20"
			tt.change(x)
			f := findingOf(t, x.findings(), tt.of)
			require.Equal(t, tt.grade, f.Grade, "%+v", f)
			require.Contains(t, f.Detail+f.Remedy, tt.says)
		})
	}
	x := &ctrdFacts{config: new(ctrdConfig), readErr: os.ErrNotExist, askErr: unix.ENOENT}
	list := x.findings()
	require.Len(t, list, 1, "there is no containerd")
	require.Equal(t, without, list[0].Grade)
}

func findingOf(t *testing.T, list []finding, name string) finding {
	t.Helper()
	for _, f := range list {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("nothing is said of %s: %+v", name, list)
	return finding{}
}

// TestDoctorContainerd asks containerds that run: wired, with a daemon that has
// gone, and with a sandbox image that cannot start.
func TestDoctorContainerd(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.ownSite(false)
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		config := filepath.Join(c.dir, "config.toml")
		doctor := func(more ...string) []finding {
			t.Helper()
			args := append([]string{"doctor", "--json", "--root", b.root, "--address", c.socket, "--containerd-config", config}, more...)
			r := b.run(args...)
			require.Empty(t, r.stderr)
			var d diagnosis
			require.NoError(t, json.Unmarshal([]byte(r.stdout), &d))
			return d.Findings
		}
		list := doctor()
		for _, name := range []string{"containerd", "configuration", "snapshotter"} {
			require.Equal(t, fine, findingOf(t, list, name).Grade, "%+v", list)
		}
		require.Equal(t, "the CRI plugin is disabled", findingOf(t, list, "pods").Detail)
		f := findingOf(t, doctor("--snapshotter", "other"), "snapshotter")
		require.Equal(t, fine, f.Grade, "the plugin at the daemon's socket is meant: %+v", f)

		// With pods, as the configuration says; and their image, which this is.
		config = b.write("pods.toml", "version = 2\n[proxy_plugins.reprise]\ntype='snapshot'\naddress='"+filepath.Join(b.root, "reprise.sock")+"'\n"+
			"[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image='"+s.ref+"'\n"+
			"[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter='reprise'\ndisable_snapshot_annotations=false\n")
		require.Contains(t, findingOf(t, doctor(), "sandbox image").Detail, "pulled with the first pod")
		b.ok("pull", "--plain-http", "--address", c.socket, "--namespace", ctrdNamespace, s.ref)
		require.Contains(t, findingOf(t, doctor(), "sandbox image").Detail, "unpacked for reprise")
		c.dropImage(ctrdNamespace, s.ref)

		// An ordinary image that another snapshotter has unpacked, without its layers.
		ref := b.pushOrdinary(s)
		config = strings.ReplaceAll(config, "pods.toml", "ordinary.toml")
		p, err := os.ReadFile(b.path("pods.toml"))
		require.NoError(t, err)
		b.write("ordinary.toml", strings.ReplaceAll(string(p), s.ref, ref))
		b.ok("pull", "--plain-http", "--address", c.socket, "--namespace", ctrdNamespace, "--snapshotter", "native", ref)
		require.Contains(t, findingOf(t, doctor(), "sandbox image").Detail, "with the next pod")
		c.discardLayers(ctrdNamespace, ref)
		f = findingOf(t, doctor(), "sandbox image")
		require.Equal(t, lacking, f.Grade, "%+v", f)
		require.Contains(t, f.Remedy, "images rm "+ref)
		c.dropImage(ctrdNamespace, ref)

		require.NoError(t, supervisor.Process.Signal(unix.SIGTERM))
		require.NoError(t, supervisor.Wait(), said())
		f = findingOf(t, doctor(), "snapshotter")
		require.Equal(t, lacking, f.Grade)
		require.Contains(t, f.Detail, "no snapshotter answers")
		require.Contains(t, f.Remedy, "start the daemon")
		c.stop()
		f = findingOf(t, doctor(), "containerd")
		require.Equal(t, lacking, f.Grade, "%+v", f)
		require.Contains(t, f.Detail, "does not answer at "+c.socket)
	})
}

// discardLayers takes the layers of an image out of containerd's content store.
func (c *ctrd) discardLayers(namespace, ref string) {
	t := c.b.t
	t.Helper()
	ctx := namespaces.WithNamespace(c.ctx(), namespace)
	im, err := c.GetImage(ctx, ref)
	require.NoError(t, err)
	m, err := images.Manifest(ctx, c.ContentStore(), im.Target(), platforms.Default())
	require.NoError(t, err)
	for _, l := range m.Layers {
		require.NoError(t, c.ContentStore().Delete(ctx, l.Digest))
	}
}

func (c *ctrd) dropImage(namespace, ref string) {
	c.b.t.Helper()
	ctx := namespaces.WithNamespace(c.ctx(), namespace)
	require.NoError(c.b.t, c.ImageService().Delete(ctx, ref, images.SynchronousDelete()))
}
