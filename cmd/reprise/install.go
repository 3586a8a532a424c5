package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/replayer/node"
)

// installFlags are those of install and uninstall.
type installFlags struct {
	host, prefix, config string
	check, stay          bool
}

func (f *installFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.host, "host", "/", "where the host's root directory is; in a container, a mount of it or of what is needed of it: "+
		"PREFIX, /etc/reprise, /etc/systemd/system, /run/systemd and /run/reprise")
	fs.StringVar(&f.prefix, "prefix", "/usr/local", "directory on the host whose bin gets the program")
	fs.BoolVar(&f.stay, "stay", false, "then wait for SIGTERM or SIGINT, as a container that is to be kept running")
}

// installer is the host that the flags name.
func (f *installFlags) installer(cmd *cobra.Command) (*installer, error) {
	for _, dir := range []string{f.host, f.prefix} {
		if !filepath.IsAbs(dir) {
			return nil, usagef(cmd, "%s: not an absolute path", dir)
		}
	}
	if f.check && f.stay {
		return nil, usagef(cmd, "--check does not --stay")
	}
	if err := needRoot(strings.TrimPrefix(cmd.CommandPath(), "reprise "), "to write to the host's directories"); err != nil {
		return nil, err
	}
	return &installer{
		host: f.host, program: "/proc/self/exe", config: f.config,
		to: filepath.Join(f.prefix, "bin", "reprise"), units: "/etc/systemd/system", bus: "/run/systemd/private",
		out: cmd.OutOrStdout(),
	}, nil
}

func newInstall() *cobra.Command {
	var f installFlags
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Have a host's systemd run the daemon",
		Long: `Have a host's systemd run the daemon: copy this program to PREFIX/bin, write the
unit /etc/systemd/system/reprise.service, enable it and start it. If that has been
done before, what differs is replaced, and the daemon started again: devices and what
is mounted stay, whoever reads waits for some milliseconds. A program or a
configuration that does not come up is taken back, and the old one started again.

From a container, with --host, it installs on the machine that the container runs
on: the Helm chart's DaemonSet does nothing else. The daemon does not run in the
container, for the end of a container would be the end of its devices.

It does not configure containerd: 'reprise doctor' says what that needs.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			in, err := f.installer(cmd)
			if err != nil {
				return err
			}
			if f.check {
				return in.check(cmd.Context())
			}
			if err := in.install(cmd.Context()); err != nil {
				return fmt.Errorf("install: %w", err)
			}
			return f.wait(cmd.Context())
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.config, "config", "", "file that becomes /etc/reprise/config.toml (default: what is there stays)")
	cmd.Flags().BoolVar(&f.check, "check", false, "change nothing; fail unless all of it is there and the daemon answers")
	return cmd
}

func newUninstall() *cobra.Command {
	var (
		f     installFlags
		force bool
	)
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Undo what install has done",
		Long: `Stop the daemon, have systemd forget it, and remove the unit and the program. The
state directory, ` + node.DefaultRoot + `, and /etc/reprise stay.

It fails while images are served: their readers would get errors. Take the
snapshotter out of containerd's configuration and remove its containers and images
first.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			in, err := f.installer(cmd)
			if err != nil {
				return err
			}
			if !force {
				if err := in.unused(cmd.Context()); err != nil {
					return fmt.Errorf("uninstall: %w", err)
				}
			}
			if f.check {
				return nil
			}
			if err := in.uninstall(cmd.Context()); err != nil {
				return fmt.Errorf("uninstall: %w", err)
			}
			return f.wait(cmd.Context())
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&f.check, "check", false, "change nothing; fail while images are served")
	cmd.Flags().BoolVar(&force, "force", false, "also while images are served")
	return cmd
}

// wait is the rest of a container's life.
func (f *installFlags) wait(ctx context.Context) error {
	if f.stay {
		<-ctx.Done()
	}
	return nil
}

// An installer puts the daemon onto a host and takes it away. Its paths are the
// host's own; the host's root directory is where it says.
type installer struct {
	host    string
	program string // to be copied, here
	config  string // likewise; empty if it is not to be replaced
	to      string // where the program goes
	units   string // directory of units
	bus     string // systemd's socket
	out     io.Writer
}

const unitName = "reprise.service"

// here is a path of the host as this process has it.
func (in *installer) here(path string) string { return filepath.Join(in.host, path) }

func (in *installer) unit() string { return filepath.Join(in.units, unitName) }

// files are those that are to be on the host.
func (in *installer) files() []hostFile {
	files := []hostFile{
		{path: in.here(in.to), mode: 0o755, open: func() (io.ReadCloser, error) { return os.Open(in.program) }},
		{path: in.here(in.unit()), mode: 0o644, open: func() (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(unitOf(in.to))), nil
		}},
	}
	if in.config != "" {
		files = append(files, hostFile{path: in.here(configPath), mode: 0o644, open: func() (io.ReadCloser, error) { return os.Open(in.config) }})
	}
	return files
}

// install makes the host as it is to be. What it has replaced is back if the
// daemon does not come up.
func (in *installer) install(ctx context.Context) error {
	sd, err := dialSystemd(ctx, in.here(in.bus))
	if err != nil {
		return err
	}
	defer sd.Close()
	if err := sd.foreign(ctx, in.unit()); err != nil {
		return err
	}
	undo, err := in.replace()
	if err != nil {
		return errors.Join(err, undo.back())
	}
	// Who had to have the directory for a mount has made it for all.
	if err := os.Chmod(in.here(filepath.Dir(node.DefaultSocket)), 0o700); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, undo.back())
	}
	if err := in.start(ctx, sd, len(undo) > 0); err != nil {
		return in.restore(ctx, sd, undo, err)
	}
	return errors.Join(undo.forget(), in.say(ctx))
}

// replace writes what is not on the host yet.
func (in *installer) replace() (undo replaced, err error) {
	for _, f := range in.files() {
		changed, err := f.write()
		if err != nil {
			return undo, err
		}
		if changed {
			undo = append(undo, f.path)
			fmt.Fprintf(in.out, "written: %s\n", f.path)
		}
	}
	return undo, nil
}

// start has systemd run what is on the host now, whether that has just changed or
// not.
func (in *installer) start(ctx context.Context, sd *systemd, changed bool) error {
	if err := sd.enable(ctx, in.unit()); err != nil {
		return err
	}
	if !changed && in.current(ctx) {
		return nil
	}
	return sd.restart(ctx)
}

// restore gives the host back what it had before an installation that failed
// because of err.
func (in *installer) restore(ctx context.Context, sd *systemd, undo replaced, err error) error {
	if len(undo) == 0 {
		return err
	}
	ctx = context.WithoutCancel(ctx) // it may have ended amid the start
	if e := undo.back(); e != nil {
		return errors.Join(err, e)
	}
	if _, e := os.Stat(in.here(in.unit())); errors.Is(e, os.ErrNotExist) { // there was none before
		return errors.Join(err, sd.disable(ctx))
	}
	if e := in.start(ctx, sd, true); e != nil {
		return errors.Join(err, fmt.Errorf("nor does what was there before: %w", e))
	}
	return fmt.Errorf("%w; what was there before serves again", err)
}

// answerTime is how long a daemon that serves may take to answer.
const answerTime = 5 * time.Second

// server asks the daemon what it is.
func (in *installer) server(ctx context.Context) (*node.ServerInfo, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, fmt.Errorf("no daemon answers at %s", node.DefaultSocket))
	defer cancel()
	c := node.NewClient(in.here(node.DefaultSocket))
	defer c.Close()
	return c.Server(ctx)
}

// current tells whether the daemon runs, and was started after the last change
// of its files, perhaps by an installer that was killed then.
func (in *installer) current(ctx context.Context) bool {
	info, err := in.server(ctx)
	if err != nil {
		return false
	}
	for _, f := range in.files() {
		if fi, err := os.Stat(f.path); err != nil || fi.ModTime().After(info.Started) {
			return false
		}
	}
	return true
}

func (in *installer) say(ctx context.Context) error {
	info, err := in.server(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(in.out, "serving: %s, process %d, version %s, %d devices\n", node.DefaultSocket, info.Pid, info.Version, info.Devices)
	return nil
}

// check fails unless the host is as install makes it.
func (in *installer) check(ctx context.Context) error {
	for _, f := range in.files() {
		same, err := f.same()
		if err != nil {
			return err
		}
		if !same {
			return fmt.Errorf("%s: differs from what is to be installed", f.path)
		}
	}
	if !in.current(ctx) {
		return errors.New("the daemon does not answer, or is older than its files")
	}
	return in.say(ctx)
}

// unused fails while images are served. A daemon that is not there serves none,
// and nor does one that was stopped, if nobody holds its socket and devices.
func (in *installer) unused(ctx context.Context) error {
	if deaf(in.here(node.DefaultSocket)) {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, fmt.Errorf("no daemon answers at %s, so that it cannot say what is in use", node.DefaultSocket))
	defer cancel()
	c := node.NewClient(in.here(node.DefaultSocket))
	defer c.Close()
	list, err := c.List(ctx)
	if err != nil || len(list) == 0 {
		return err
	}
	var refs []string
	for _, st := range list {
		refs = append(refs, st.Ref)
	}
	return fmt.Errorf("images are served: %s", strings.Join(refs, ", "))
}

// deaf tells whether nobody listens on a socket.
func deaf(path string) bool {
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close()
	}
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}

// uninstall takes away what install has brought, if it is there.
func (in *installer) uninstall(ctx context.Context) error {
	sd, err := dialSystemd(ctx, in.here(in.bus))
	if err != nil {
		return err
	}
	defer sd.Close()
	if err := sd.foreign(ctx, in.unit()); err != nil {
		return err
	}
	if err := sd.stop(ctx); err != nil {
		return err
	}
	for _, path := range []string{in.unit(), in.to, node.DefaultSocket} {
		err := os.Remove(in.here(path))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err == nil {
			fmt.Fprintf(in.out, "removed: %s\n", in.here(path))
		}
	}
	return sd.disable(ctx)
}
