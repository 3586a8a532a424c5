package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

func newDaemon() *cobra.Command {
	var f daemonFlags
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Serve images for mount and run, across kills and upgrades",
		Long: `Serve the images that mount, umount and run of the same --root ask for, over a
unix socket: ` + node.DefaultSocket + `, or reprise.sock in another root.

Its devices live on when it is killed, crashes or is upgraded, if it has a
service manager that keeps their descriptors: systemd ('reprise daemon unit'
prints a unit), or 'reprise supervise -- reprise daemon'. The next process adopts
them; who reads only waits for some milliseconds.

Its configuration is ` + configPath + `, or the file that --config names;
flags override it. 'reprise daemon config' prints all keys with their defaults: those
of [policy] say for which images traces are replayed, and containers recorded.

On the same socket it answers containerd, whose snapshotter it is (see 'reprise
pull --help'), and kubelet, as the image service that passes everything on to the
containerd at --containerd: with --image-service-endpoint=unix://` + node.DefaultSocket + `
kubelet tells it the image pull secrets of pods. It keeps those of the images on the
node in secrets.json of its state directory, which only root can read.

Its figures are at http://ADDR/metrics, for Prometheus, with --metrics ADDR, and
always at /metrics on the socket. Whoever reaches ADDR can read them: the names of
images and registries are among them, so let it be a loopback address, such as
127.0.0.1:9464.

SIGTERM, SIGINT:
  under systemd     It ends at once. Devices in use stay with systemd, and wait for
                    the next start: 'systemctl restart' disturbs nothing. To end
                    them too, unmount them first.
  elsewhere         What nothing uses is unmounted and released. While something is
                    in use it says what, and serves on until that has ended; a
                    second signal takes the devices away from under their users.
                    'reprise supervise' passes the signal on, and kills a daemon
                    that has not ended after --stop-timeout.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, a []string) error {
			if len(a) > 0 {
				return usagef(cmd, "unknown command %q", a[0])
			}
			if err := f.load(cmd); err != nil {
				return err
			}
			if err := needRoot("daemon", "to attach block devices and mount them"); err != nil {
				return err
			}
			if err := becomeFlusher(); err != nil {
				return err
			}
			return f.run(cmd)
		},
	}
	f.add(cmd)
	addConfig(cmd, &f.config)
	cmd.AddCommand(newConfig(), newUpgrade(), newUnit(), newInstall(), newUninstall())
	return cmd
}

// daemonFlags are the daemon's, and its configuration file.
type daemonFlags struct {
	nodeFlags
	metrics, config string
	file            *config
}

func (f *daemonFlags) add(cmd *cobra.Command) {
	f.nodeFlags.add(cmd)
	f.addContainerd(cmd)
	cmd.Flags().StringVar(&f.metrics, "metrics", "", "address for Prometheus, HOST:PORT (default: none but the socket)")
}

// load checks the flags, and then reads the file and completes them with it.
func (f *daemonFlags) load(cmd *cobra.Command) (err error) {
	if err := f.check(cmd); err != nil {
		return err
	}
	if f.file, err = loadConfig(f.config); err != nil {
		return err
	}
	return f.file.apply(cmd, &f.nodeFlags)
}

// A daemon is a server for many, containerd among them.
type daemon struct {
	*node.Server
	node      *node.Node
	sn        *snapshotter.Snapshotter // nil until it is open
	endImages func()                   // ends the CRI's image service; it may be called again
	store     *device.Store
	log       *slog.Logger
	socket    string
	config    string        // the file
	restart   chan struct{} // gets something when the next process is to take over
}

// run serves until the daemon is told to end.
func (f *daemonFlags) run(cmd *cobra.Command) error {
	f.log, f.traceWait = f.file.logger(cmd.ErrOrStderr()), f.file.Policy.LookupTime.Duration
	options, endTracing, err := f.file.Tracing.start(cmd.Context(), f.log)
	if err != nil {
		return err
	}
	defer endTracing()
	store, err := device.OpenStore()
	if err != nil {
		return err
	}
	l, err := node.ListenDaemon(f.absRoot(), store)
	if err != nil {
		return err
	}
	d, err := f.newDaemon(cmd, store, grpc.NewServer(options...))
	if err != nil {
		return errors.Join(err, l.Close())
	}
	err = d.run(cmd.Context(), l, f.metrics)
	return errors.Join(err, d.leave(cmd.Context()))
}

// newDaemon has all that a daemon serves, among it the devices of the process before.
func (f *daemonFlags) newDaemon(cmd *cobra.Command, store *device.Store, plugin *grpc.Server) (*daemon, error) {
	root := f.absRoot()
	secrets := f.openSecrets(root, f.log)
	n, err := f.open(cmd)
	if err != nil {
		return nil, err
	}
	d := &daemon{
		node: n, store: store, log: f.log, socket: node.SocketPath(root), config: f.config,
		restart: make(chan struct{}, 1),
	}
	watched, more := snapshotter.NewWatched(f.log), http.NewServeMux()
	o := &node.ServerOptions{
		Socket: d.socket, Version: version, GRPC: plugin, HTTP: more, Log: f.log,
		Collectors: []prometheus.Collector{watched},
	}
	if store.Kept() {
		o.Keeper, o.Upgrade = store, d.upgrade
	}
	d.Server = node.NewServer(n, o)
	if err := d.Adopt(cmd.Context()); err != nil {
		f.log.Warn("adopt", "err", err)
	}
	d.sn, err = snapshotter.New(cmd.Context(), filepath.Join(root, "snapshotter"), d.Server, f.snapshotter())
	if err == nil {
		d.endImages, err = f.serveImages(cmd.Context(), plugin, secrets, d.sn, f.log)
	}
	if err != nil {
		return nil, errors.Join(err, d.leave(cmd.Context()))
	}
	snapshotter.Register(plugin, watched.Of(d.sn))
	more.Handle("/", d.sn.Handler())
	return d, nil
}

// leave ends what the daemon has, but for the devices that the next process gets.
func (d *daemon) leave(ctx context.Context) (err error) {
	if d.endImages != nil {
		d.endImages()
	}
	if d.sn != nil {
		err = d.sn.Close()
	}
	if d.left(ctx) {
		d.WriteFigures()
		return err // the cache's files are in order
	}
	return errors.Join(err, d.Close(), d.node.Close(), os.Remove(d.socket))
}

// snapshotter are the settings of the snapshotter.
func (f *daemonFlags) snapshotter() *snapshotter.Options {
	c := f.file
	o := &snapshotter.Options{
		Request: f.fill, Linger: c.Snapshotter.Linger.Duration, Writable: c.Snapshotter.Writable,
		RemapIDs: c.Snapshotter.RemapIDs, NoAhead: !c.Snapshotter.LookupAhead, Log: f.log,
	}
	if c.Policy.recordsAny() {
		o.Record = &snapshotter.RecordOptions{Wanted: c.Policy.records, Rules: c.rules()}
	}
	return o
}

// fill has a device of the snapshotter made as the flags and the file say.
func (f *daemonFlags) fill(r *node.Request) {
	r.Begun = time.Now()
	f.file.Policy.complete(r)
	r.PlainHTTP, r.HostsDir, r.Platform, r.Transport = f.plainHTTP, f.hostsDir, f.platform, f.transport
}

// run says that the daemon is ready, and serves.
func (d *daemon) run(ctx context.Context, l *node.DaemonListener, metrics string) error {
	defer serveMetrics(metrics, d.MetricsHandler(), d.log)()
	if err := d.store.Ready(); err != nil {
		d.log.Warn("the service manager cannot be told", "err", err)
	}
	d.log.Info("the daemon serves", "socket", d.socket, "devices", len(d.List()), "kept", d.store.Kept())
	return d.serve(ctx, l)
}

// left tells whether the devices are the next process's.
func (d *daemon) left(ctx context.Context) bool {
	if !d.store.Kept() {
		return false
	}
	return ctx.Err() == nil || !d.store.Supervised()
}

// serve answers until the daemon is to end, or to be replaced.
func (d *daemon) serve(ctx context.Context, l *node.DaemonListener) error {
	serving, stop := context.WithCancel(context.Background())
	defer stop()
	served := make(chan error, 1)
	go func() { served <- d.Serve(serving, l) }()
	signals := make(chan os.Signal, 1)
	select {
	case err := <-served:
		return err
	case <-d.restart:
	case <-ctx.Done():
		signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
		defer signal.Stop(signals)
		d.giveUp(signals)
	}
	d.log.Info("the daemon leaves: calls under way come first")
	if err := d.store.Stopping(); err != nil {
		d.log.Warn("the service manager cannot be told", "err", err)
	}
	d.endImages() // a pull would wait for what only the next process answers
	stop()
	return <-served
}

// giveUp unmounts what nothing uses, and waits for the rest where nobody would
// keep it.
func (d *daemon) giveUp(again <-chan os.Signal) {
	if d.store.Kept() && !d.store.Supervised() {
		for _, busy := range d.Busy() {
			d.log.Info("stays with the service manager", "image", busy)
		}
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	released := make(chan struct{})
	go func() { // which may wait for a registry
		defer close(released)
		busy := d.ReleaseIdle(ctx)
		for _, b := range busy {
			d.log.Warn("in use: it is served until that has ended; a second signal takes it away", "image", b)
		}
		if len(busy) > 0 {
			d.Idle(ctx, 0)
		}
	}()
	select {
	case <-released:
	case <-again:
	}
}

// upgrade makes room for the next process.
func (d *daemon) upgrade(r node.UpgradeRequest) error {
	path := cmp.Or(r.Binary, strings.TrimSuffix(d.Info().Program, " (deleted)"))
	if err := d.checkConfig(path); err != nil {
		return err
	}
	switch {
	case d.store.Supervised():
		if err := d.store.Upgrade(path); err != nil {
			return err
		}
	case r.Binary != "":
		return errors.New("systemd starts the program that its unit names: replace that file, and upgrade without --binary")
	}
	select {
	case d.restart <- struct{}{}:
	default:
	}
	return nil
}

// checkConfig refuses a configuration that the next process would not start with:
// who reads what is mounted would wait for ever. A newer program may know more keys.
func (d *daemon) checkConfig(program string) error {
	err := checkConfig(d.config)
	if err == nil || exec.Command(program, "daemon", "config", "--check", "--config="+d.config).Run() == nil {
		return nil
	}
	return err
}

// upgradeTime bounds an upgrade: a new program has some 30 s to become ready,
// and then the old one has to be started again.
const upgradeTime = 90 * time.Second

func newUpgrade() *cobra.Command {
	var root, binary string
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Replace the running daemon by a new process, perhaps of a new program",
		Long: `Replace the running daemon by a new process. Devices and what is mounted stay:
whoever reads waits for some milliseconds.

Under 'reprise supervise' the new process is that of --binary, by default of the
file that the daemon was started from; if it does not come up, the old program is
started again. Under systemd it is what the unit names: replace that file first.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if root == "" {
				return usagef(cmd, "--root is empty")
			}
			if err := needRoot("daemon upgrade", "to reach the daemon"); err != nil {
				return err
			}
			if binary != "" {
				var err error
				if binary, err = realProgram(binary); err != nil {
					return err
				}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), upgradeTime)
			defer cancel()
			return upgrade(ctx, cmd, root, binary)
		},
	}
	cmd.Flags().StringVar(&root, "root", node.DefaultRoot, "state directory")
	cmd.Flags().StringVar(&binary, "binary", "", "the new program")
	return cmd
}

// realProgram is the path of a program, without symbolic links.
func realProgram(path string) (string, error) {
	real, err := filepath.Abs(path)
	if err == nil {
		real, err = filepath.EvalSymlinks(real)
	}
	if err != nil {
		return "", err
	}
	fi, err := os.Stat(real)
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return "", fmt.Errorf("%s: not a program", path)
	}
	return real, nil
}

func upgrade(ctx context.Context, cmd *cobra.Command, root, binary string) error {
	c, err := node.Dial(ctx, root)
	if err != nil {
		return err
	}
	defer c.Close()
	before, err := c.Upgrade(ctx, node.UpgradeRequest{Binary: binary})
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	for {
		now, err := c.Server(ctx)
		if err != nil {
			return fmt.Errorf("upgrade: the daemon does not come back: %w", err)
		}
		if now.Pid == before.Pid {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if binary != "" && now.Program != binary {
			return fmt.Errorf("upgrade: %s did not become ready: %s serves again; the daemon's log may say why", binary, now.Program)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "process %d, %s, serves %d devices in the place of process %d, %s\n",
			now.Pid, now.Version, now.Devices, before.Pid, before.Version)
		return nil
	}
}
