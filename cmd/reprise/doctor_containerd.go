package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

const groupContainerd = "containerd"

// ctrdNamespace is that of Kubernetes.
const ctrdNamespace = "k8s.io"

// Where containerd is by default.
const (
	defaultCtrdSocket = "/run/containerd/containerd.sock"
	defaultCtrdConfig = "/etc/containerd/config.toml"
)

// A ctrdFlags says which containerd is meant.
type ctrdFlags struct{ address, config, snapshotter string }

// ctrdFacts are what is known of containerd and its way to the daemon.
type ctrdFacts struct {
	ctrdFlags
	root    string // of the daemon
	serving bool   // its socket is there

	config  *ctrdConfig // nil where it cannot be read
	readErr error       // why; os.ErrNotExist where there is none

	askErr    error  // it cannot be asked
	version   string // empty where it cannot be asked
	loaded    error  // why the snapshotter is not loaded
	answers   error  // why nobody answers at the address of the configuration
	pause     string // the sandboxes' image
	pauseErr  error
	pauseHere snapshotter.ImageState
}

// ctrdAnswers is how long containerd may take.
const ctrdAnswers = 3 * time.Second

// checkContainerd looks at containerd's configuration, and asks it.
func checkContainerd(ctx context.Context, root string, f ctrdFlags) []finding {
	ctx, cancel := context.WithTimeout(ctx, ctrdAnswers)
	defer cancel()
	x := &ctrdFacts{ctrdFlags: f, root: root}
	if abs, err := filepath.Abs(root); err == nil {
		x.root = abs
	}
	x.serving = unix.Access(x.socket(), unix.F_OK) == nil
	x.config, x.readErr = readCtrdConfig(f.config)
	if errors.Is(x.readErr, os.ErrNotExist) && !exists(f.config) {
		x.config = new(ctrdConfig)
	}
	var proxy *proxyPlugin
	if x.config != nil {
		x.snapshotter, proxy = x.config.proxy(f.snapshotter, x.socket())
	}
	x.ask(ctx)
	if proxy != nil {
		x.answers = snapshotter.CheckPlugin(ctx, proxy.Address)
	}
	return x.findings()
}

func exists(path string) bool { return !errors.Is(unix.Access(path, unix.F_OK), unix.ENOENT) }

// socket is where containerd has to find the daemon.
func (x *ctrdFacts) socket() string { return node.SocketPath(x.root) }

// ask asks the containerd that runs.
func (x *ctrdFacts) ask(ctx context.Context) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", x.address) // gRPC would go on trying
	if err != nil {
		x.askErr = err
		return
	}
	_ = conn.Close()
	c, err := snapshotter.OpenContainerd(ctx, x.address)
	if err != nil {
		x.askErr = err
		return
	}
	defer c.Close()
	if x.version, x.askErr = c.Version(ctx); x.askErr != nil {
		return
	}
	if x.loaded = c.Loaded(ctx, x.snapshotter); x.loaded != nil {
		return
	}
	if x.config != nil {
		x.pause = x.config.cri().sandbox
	}
	if x.pause == "" {
		x.pause, x.pauseErr = c.PauseImage(ctx, ctrdNamespace)
	}
	if x.pause != "" {
		x.pauseHere, x.pauseErr = c.Image(ctx, ctrdNamespace, x.pause, x.snapshotter)
	}
}

// is tells whether containerd is of that version or a later one, also where it
// can only be told by its configuration.
func (x *ctrdFacts) is(major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(strings.TrimPrefix(x.version, "v"), "%d.%d", &a, &b); n < 2 {
		if a, b = 1, 6; x.config != nil && x.config.Version >= 3 {
			a, b = 2, 1
		}
	}
	return a > major || a == major && b >= minor
}

// findings say what there is, until something is not there that the rest rests on.
func (x *ctrdFacts) findings() []finding {
	if x.version == "" && !errors.Is(x.askErr, os.ErrPermission) && x.config != nil && x.readErr != nil {
		return []finding{x.finding("containerd", without, "none that listens at "+x.address+": 'reprise pull' and pods need one")}
	}
	list := []finding{x.checkVersion(), x.checkConfig()}
	if x.config == nil {
		return list
	}
	f, wired := x.checkPlugin()
	list = append(list, f)
	if !wired {
		return list
	}
	cri := x.config.cri()
	f, used := x.checkPods(&cri)
	list = append(list, f)
	if !used {
		return list
	}
	list = append(list, x.checkPulls(&cri), x.checkDiscard(&cri), x.checkDisk())
	return append(list, x.checkSandbox()...)
}

func (x *ctrdFacts) finding(name string, g grade, detail string) finding {
	return finding{Group: groupContainerd, Name: name, Grade: g, Detail: detail}
}

func (x *ctrdFacts) checkVersion() finding {
	const name = "containerd"
	switch {
	case errors.Is(x.askErr, os.ErrPermission):
		return x.finding(name, without, "cannot be asked: "+x.address+" is for root only")
	case x.askErr != nil:
		f := x.finding(name, x.ifWanted(), fmt.Sprintf("does not answer at %s: %s", x.address, reasonOf(x.askErr)))
		f.Remedy = "start it: systemctl start containerd; or say where it listens: --address"
		return f
	case !x.is(1, 6):
		f := x.finding(name, lacking, "version "+x.version+" is too old")
		f.Remedy = "containerd 1.6 or later"
		return f
	}
	return x.finding(name, fine, "version "+x.version+", at "+x.address)
}

// ifWanted is the grade of what is wrong if somebody means to use the snapshotter:
// the daemon serves, or the configuration names it.
func (x *ctrdFacts) ifWanted() grade {
	if x.serving {
		return lacking
	}
	if x.config != nil {
		if _, p := x.config.proxy(x.snapshotter, x.socket()); p != nil {
			return lacking
		}
	}
	return without
}

// reasonOf is an error without what the line names anyway.
func reasonOf(err error) string {
	var op *net.OpError
	var no unix.Errno
	if errors.As(err, &op) && errors.As(err, &no) {
		return no.Error()
	}
	return err.Error()
}

func (x *ctrdFacts) checkConfig() finding {
	const name = "configuration"
	switch {
	case x.config == nil && errors.Is(x.readErr, os.ErrPermission):
		return x.finding(name, without, "cannot be read: "+x.readErr.Error())
	case x.config == nil:
		f := x.finding(name, lacking, x.readErr.Error())
		f.Remedy = "correct it: containerd does not start with it; or name another: --containerd-config"
		return f
	case x.readErr != nil:
		return x.finding(name, fine, "no "+x.ctrdFlags.config+": containerd has its defaults")
	}
	return x.finding(name, fine, fmt.Sprintf("%s, version %d", x.ctrdFlags.config, max(1, x.config.Version)))
}

// checkPlugin follows the way from containerd to the daemon.
func (x *ctrdFacts) checkPlugin() (f finding, wired bool) {
	const name = "snapshotter"
	_, p := x.config.proxy(x.snapshotter, x.socket())
	switch {
	case p == nil:
		f = x.finding(name, x.ifWanted(), "containerd does not know "+x.snapshotter)
		f.Remedy = x.change(x.proxyLines()...)
		return f, false
	case p.Type != "snapshot":
		f = x.finding(name, lacking, fmt.Sprintf("proxy plugin %s is of type %q", x.snapshotter, p.Type))
		f.Remedy = x.change("[proxy_plugins."+x.snapshotter+"]", `  type = "snapshot"`)
		return f, false
	case p.Address != x.socket():
		f = x.finding(name, lacking, fmt.Sprintf("proxy plugin %s is at %s, the daemon of %s at %s", x.snapshotter, p.Address, x.root, x.socket()))
		f.Remedy = x.change("[proxy_plugins."+x.snapshotter+"]", `  address = "`+x.socket()+`"`) + "\nor name the daemon's state directory: reprise doctor --root DIR"
	case x.answers != nil:
		f = x.finding(name, lacking, fmt.Sprintf("proxy plugin %s: no snapshotter answers at %s: %s", x.snapshotter, p.Address, x.noAnswer()))
		f.Remedy = "start the daemon: systemctl start reprise ('reprise daemon unit' prints its unit)"
	case x.version != "" && errdefs.IsNotFound(x.loaded):
		f = x.finding(name, lacking, "proxy plugin "+x.snapshotter+" is in the configuration, but not in the containerd that runs")
		f.Remedy = "systemctl restart containerd: containers go on running"
	case x.version != "" && x.loaded != nil:
		f = x.finding(name, lacking, fmt.Sprintf("proxy plugin %s could not be loaded: %v", x.snapshotter, x.loaded))
		f.Remedy = "systemctl restart containerd: containers go on running"
	default:
		f = x.finding(name, fine, fmt.Sprintf("proxy plugin %s at %s, which answers", x.snapshotter, p.Address))
	}
	return f, true
}

// noAnswer is why, in few words.
func (x *ctrdFacts) noAnswer() string {
	_, p := x.config.proxy(x.snapshotter, x.socket())
	conn, err := net.Dial("unix", p.Address)
	if err != nil {
		return reasonOf(err)
	}
	_ = conn.Close()
	return x.answers.Error()
}

// change is a remedy: what to write into the configuration.
func (x *ctrdFacts) change(lines ...string) string {
	return "in " + x.ctrdFlags.config + ", then systemctl restart containerd:\n  " + strings.Join(lines, "\n  ")
}

func (x *ctrdFacts) proxyLines() []string {
	lines := []string{
		"[proxy_plugins." + x.snapshotter + "]",
		`  type = "snapshot"`,
		`  address = "` + x.socket() + `"`,
	}
	if x.exports() {
		lines = append(lines, x.exportLines()...)
	}
	return lines
}

func (x *ctrdFacts) exportLines() []string {
	return []string{"[proxy_plugins." + x.snapshotter + ".exports]", `  root = "` + x.state() + `"`}
}

// state is the snapshotter's directory.
func (x *ctrdFacts) state() string { return filepath.Join(x.root, "snapshotter") }

// imagesTable is where the configuration says how pods' images are pulled.
func (x *ctrdFacts) imagesTable() string {
	if x.config.Version >= 3 || x.config.Version == 0 && x.is(2, 0) {
		return `[plugins."` + pluginImages + `"]`
	}
	return `[plugins."` + pluginCRI + `".containerd]`
}

// checkPods tells whose pods use the snapshotter. That none do is nobody's fault.
func (x *ctrdFacts) checkPods(cri *criSettings) (f finding, used bool) {
	const name = "pods"
	uses := cri.uses(x.snapshotter)
	switch {
	case cri.disabled:
		return x.finding(name, without, "the CRI plugin is disabled"), false
	case len(uses) == 0:
		f = x.finding(name, without, "they use "+cri.snapshotter+": their images are not loaded lazily")
		f.Remedy = x.change(x.imagesTable(), `  snapshotter = "`+x.snapshotter+`"`, "  disable_snapshot_annotations = false")
		return f, false
	case slices.Contains(uses, ""):
		return x.finding(name, fine, "they use "+x.snapshotter), true
	}
	return x.finding(name, fine, "those of the runtimes "+strings.Join(uses, ", ")+" use "+x.snapshotter+", others "+cri.snapshotter), true
}

// checkPulls tells whether the snapshotter is told of which image a layer is. From
// version 2.1 on, containerd pulls in one of two ways.
func (x *ctrdFacts) checkPulls(cri *criSettings) finding {
	const name = "pulls"
	if !x.is(2, 1) || cri.local {
		if cri.annotations {
			return x.finding(name, fine, "the snapshotter is told of which image a layer is")
		}
		f := x.finding(name, lacking, "the snapshotter is not told of which image a layer is: pods cannot pull images in overlaybd format")
		f.Remedy = x.change(x.imagesTable(), "  disable_snapshot_annotations = false")
		return f
	}
	_, p := x.config.proxy(x.snapshotter, x.socket())
	told, unpacks := p.Exports["enable_remote_snapshot_annotations"] == "true", x.config.unpacks(x.snapshotter)
	if told && unpacks {
		return x.finding(name, fine, "by the transfer service, which tells the snapshotter of which image a layer is")
	}
	f := x.finding(name, lacking, "the transfer service pulls for pods, and ")
	switch {
	case !unpacks:
		f.Detail += "has no unpack_config for " + x.snapshotter + ": it downloads images whole and unpacks nothing"
	default:
		f.Detail += "does not tell the snapshotter of which image a layer is: it cannot pull images in overlaybd format"
	}
	f.Remedy = x.change(x.imagesTable(), "  disable_snapshot_annotations = false") +
		"\nwhich has the CRI pull without the transfer service; or, for that:\n  " + strings.Join(x.transferLines(), "\n  ")
	return f
}

// transferLines have the transfer service pull for the snapshotter. Who says for
// which it unpacks has to say so of all.
func (x *ctrdFacts) transferLines() []string {
	lines := []string{"[proxy_plugins." + x.snapshotter + ".exports]", `  enable_remote_snapshot_annotations = "true"`}
	for _, name := range []string{"overlayfs", x.snapshotter} {
		if !x.config.unpacks(name) {
			lines = append(lines, `[[plugins."`+pluginTransfer+`".unpack_config]]`, `  platform = "linux"`, `  snapshotter = "`+name+`"`)
		}
	}
	return lines
}

func (x *ctrdFacts) checkDiscard(cri *criSettings) finding {
	const name = "layers"
	if !cri.discard {
		return x.finding(name, fine, "of ordinary images are kept, so that they can be unpacked for another snapshotter, too")
	}
	f := x.finding(name, lacking, "of ordinary images are discarded once they are unpacked: what was unpacked for another snapshotter cannot start")
	f.Remedy = x.change(x.imagesTable(), "  discard_unpacked_layers = false")
	return f
}

// exports tells whether containerd knows exports of proxy plugins.
// https://github.com/containerd/containerd/issues/10095
func (x *ctrdFacts) exports() bool {
	var a, b, c int
	if n, _ := fmt.Sscanf(strings.TrimPrefix(x.version, "v"), "%d.%d.%d", &a, &b, &c); n < 3 {
		return x.is(1, 7)
	}
	return a > 1 || b > 7 || b == 7 && c >= 16 || b == 6 && c >= 32
}

// assumed is where kubelet looks for the images if nobody says where they are.
func (x *ctrdFacts) assumed() string {
	return filepath.Join(cmp.Or(x.config.Root, "/var/lib/containerd"), "io.containerd.snapshotter.v1."+x.snapshotter)
}

// checkDisk tells whether kubelet learns where the images are.
func (x *ctrdFacts) checkDisk() finding {
	const name = "disk"
	if !x.exports() {
		if to, err := os.Readlink(x.assumed()); err == nil && to == x.state() {
			return x.finding(name, fine, "kubelet watches that of "+to+", by the link "+x.assumed())
		}
		f := x.finding(name, lacking, "kubelet looks for the images at "+x.assumed()+", and does not see their disk filling up")
		f.Remedy = "ln -s " + x.state() + " " + x.assumed() + "; or containerd 1.6.32, 1.7.16 or later, which can be told where they are"
		return f
	}
	_, p := x.config.proxy(x.snapshotter, x.socket())
	switch root := p.Exports["root"]; root {
	case x.state():
		return x.finding(name, fine, "kubelet watches that of "+root)
	case "":
		f := x.finding(name, lacking, "kubelet is not told where the images are, and does not see that disk filling up")
		f.Remedy = x.change(x.exportLines()...)
		return f
	default:
		f := x.finding(name, lacking, "kubelet watches the disk of "+root+", the images are in "+x.state())
		f.Remedy = x.change(x.exportLines()...)
		return f
	}
}

// checkSandbox looks for the image that every pod begins with.
func (x *ctrdFacts) checkSandbox() []finding {
	if x.version == "" || x.loaded != nil {
		return nil
	}
	f := x.finding("sandbox image", fine, cmp.Or(x.pause, "containerd's own")+": pulled with the first pod")
	switch s := x.pauseHere; {
	case x.pauseErr != nil:
		f.Grade, f.Detail = lacking, fmt.Sprintf("%s: containerd does not say what it has of it: %v", cmp.Or(x.pause, "the pods'"), x.pauseErr)
		f.Remedy = "see containerd's log: journalctl -u containerd"
	case !s.There:
	case s.Unpacked:
		f.Detail = x.pause + ": unpacked for " + x.snapshotter
	case s.Content:
		f.Detail = x.pause + ": unpacked for " + x.snapshotter + " with the next pod"
	default:
		f.Grade = lacking
		f.Detail = x.pause + " was unpacked for another snapshotter and its layers discarded: pods do not start"
		f.Remedy = fmt.Sprintf("ctr --address %s -n %s images rm %s: it is pulled again with the next pod", x.address, ctrdNamespace, x.pause)
	}
	return []finding{f}
}
