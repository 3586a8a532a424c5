package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

func newDaemon() *cobra.Command {
	var (
		f       nodeFlags
		metrics string
	)
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Serve images for mount and run, across kills and upgrades",
		Long: `Serve the images that mount, umount and run of the same --root ask for, over a
unix socket: ` + node.DefaultSocket + `, or reprise.sock in another root.

Its devices live on when it is killed, crashes or is upgraded, if it has a
service manager that keeps their descriptors: systemd ('reprise daemon unit'
prints a unit), or 'reprise supervise -- reprise daemon'. The next process adopts
them; who reads only waits for some milliseconds.

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
			if err := f.check(cmd); err != nil {
				return err
			}
			if err := needRoot("daemon", "to attach block devices and mount them"); err != nil {
				return err
			}
			if err := becomeFlusher(); err != nil {
				return err
			}
			return f.runDaemon(cmd, metrics)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&metrics, "metrics", "", "address for Prometheus, HOST:PORT (default: none but the socket)")
	cmd.AddCommand(newUpgrade(), newUnit())
	return cmd
}

// A daemon is a server for many.
type daemon struct {
	*node.Server
	store   *device.Store
	log     *slog.Logger
	restart chan struct{} // gets something when the next process is to take over
}

// runDaemon serves until it is told to end.
func (f *nodeFlags) runDaemon(cmd *cobra.Command, metrics string) error {
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	store, err := device.OpenStore()
	if err != nil {
		return err
	}
	root := f.absRoot()
	l, err := node.ListenDaemon(root, store)
	if err != nil {
		return err
	}
	n, err := f.open(cmd)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	d := &daemon{store: store, log: log, restart: make(chan struct{}, 1)}
	plugin := grpc.NewServer()
	o := &node.ServerOptions{Socket: node.SocketPath(root), Version: version, GRPC: plugin, Log: log}
	if store.Kept() {
		o.Keeper, o.Upgrade = store, d.upgrade
	}
	d.Server = node.NewServer(n, o)
	if err := d.Adopt(cmd.Context()); err != nil {
		log.Warn("adopt", "err", err)
	}
	sn, err := snapshotter.New(cmd.Context(), filepath.Join(root, "snapshotter"), d.Server, &snapshotter.Options{
		Request: f.fill, Log: log,
	})
	if err != nil {
		return errors.Join(err, l.Close(), d.Close(), n.Close())
	}
	defer sn.Close()
	snapshotter.Register(plugin, sn)
	defer serveMetrics(metrics, d.MetricsHandler(), log)()
	if err := store.Ready(); err != nil {
		log.Warn("the service manager cannot be told", "err", err)
	}
	log.Info("the daemon serves", "socket", o.Socket, "devices", len(d.List()), "kept", store.Kept())
	err = d.serve(cmd.Context(), l)
	if d.left(cmd.Context()) {
		d.WriteFigures()
		return err // the next process has the devices, the cache's files are in order
	}
	return errors.Join(err, d.Close(), n.Close(), os.Remove(o.Socket))
}

// fill has a device of the snapshotter made as the flags say.
func (f *nodeFlags) fill(r *node.Request) {
	r.Begun, r.Trace = time.Now(), "auto"
	r.PlainHTTP, r.HostsDir, r.Platform, r.Transport = f.plainHTTP, f.hostsDir, f.platform, f.transport
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
		d.end(signals)
	}
	if err := d.store.Stopping(); err != nil {
		d.log.Warn("the service manager cannot be told", "err", err)
	}
	stop()
	return <-served
}

// end gives up what nothing uses, and waits for the rest where nobody would
// keep it.
func (d *daemon) end(again <-chan os.Signal) {
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
	switch {
	case d.store.Supervised():
		path := r.Binary
		if path == "" {
			path = strings.TrimSuffix(d.Info().Program, " (deleted)")
		}
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

func newUnit() *cobra.Command {
	return &cobra.Command{
		Use:   "unit",
		Short: "Print a systemd unit for the daemon",
		Long: `Print a systemd unit for the daemon:

  reprise daemon unit > /etc/systemd/system/reprise.service
  systemctl daemon-reload && systemctl enable --now reprise`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), unit, self())
			return err
		},
	}
}

// unit is the daemon's. systemd.service(5), systemd.kill(5).
const unit = `[Unit]
Description=reprise: container images, loaded lazily
After=network-online.target
Wants=network-online.target
# However often it ends, its devices wait for the next start.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart=%s daemon
Restart=always
RestartSec=10ms
# systemd holds the descriptors that devices live by. They outlive kills,
# restarts, upgrades and, from systemd 254 on, also a stop: what is mounted then
# waits for the next start. 'systemctl clean --what=fdstore reprise' lets go of them for good.
FileDescriptorStoreMax=4096
FileDescriptorStorePreserve=yes
# Nothing but the daemon itself is to be ended with it.
KillMode=process
LimitNOFILE=1048576
LimitMEMLOCK=infinity
# Its memory is what others wait for: it is the last to be taken away.
OOMScoreAdjust=-999
# No PrivateMounts, ProtectSystem and the like: what it mounts must be seen by all.

[Install]
WantedBy=multi-user.target
`
