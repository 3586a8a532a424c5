package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

func newSupervise() *cobra.Command {
	var (
		o         device.SuperviseOptions
		listeners []string
		die       bool
	)
	cmd := &cobra.Command{
		Use:   "supervise [flags] -- CMD…",
		Short: "Keep a daemon running, and its devices alive across its death",
		Long: `Keep a daemon running, where there is no systemd that does.

The daemon hands the descriptors that its devices live by to this process and
gets them back when it is started again: at once if it was killed, after a pause
of 10 ms to 5 s if it crashed. It ends when the daemon ends with status 0, or
when it gets SIGTERM or SIGINT, which it passes on; a second one kills the
daemon. Other signals are passed on, and the daemon's exit status is returned.

The protocol is systemd's, see sd_notify(3); a unit that runs the daemon under
systemd itself needs FileDescriptorStoreMax=, not this command. As process 1 of
a container it also waits for orphans.`,
		Example: "  reprise supervise -- reprise daemon --root /var/lib/reprise",
		Args:    args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if cmp.Or(o.MaxCrashes < 0, o.MaxKept < 0, o.Watchdog < 0, o.ReadyTimeout < 0, o.StopTimeout < 0) {
				return usagef(cmd, "a number or a duration is negative")
			}
			if os.Getpid() == 1 {
				return reapOrphans()
			}
			files, err := listenAll(listeners)
			defer closeListeners(files)
			if err != nil {
				return err
			}
			if die {
				o.DeathSignal = syscall.SIGKILL
			}
			o.Command, o.Files, o.Log = a, files, logger(cmd)
			return supervise(cmd, &o)
		},
	}
	cmd.Flags().SetInterspersed(false)
	fs := cmd.Flags()
	fs.StringArrayVar(&listeners, "listen", nil, "[NAME=]PATH: a unix socket to listen on, handed to the daemon as NAME (by default the file's); may be repeated")
	fs.IntVar(&o.MaxCrashes, "max-crashes", 0, "give up after so many crashes in a row, 0 for never")
	fs.IntVar(&o.MaxKept, "max-kept", 0, "descriptors that are kept at most, 0 for what the limit of open files allows")
	fs.DurationVar(&o.ReadyTimeout, "ready-timeout", 0, "how long an upgrade may take to become ready before the old program is started again (default 30s)")
	fs.DurationVar(&o.StopTimeout, "stop-timeout", 0, "how long the daemon may take to end before it is killed (default 1m30s)")
	fs.DurationVar(&o.Watchdog, "watchdog", 0, "abort a daemon that is silent for so long, 0 for never")
	fs.BoolVar(&die, "die-with-me", false, "kill the daemon if this process is killed")
	return cmd
}

// supervise passes on the signals that a service gets, and the exit status.
func supervise(cmd *cobra.Command, o *device.SuperviseOptions) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)
	defer signal.Stop(signals)
	o.Signals = signals
	// The context ends with the first of these signals, which must count once.
	return superviseStatus(device.Supervise(context.WithoutCancel(cmd.Context()), o))
}

// superviseStatus makes the daemon's exit status this program's.
func superviseStatus(err error) error {
	var exit *device.ExitError
	if errors.As(err, &exit) {
		return exitStatus(exit.Status)
	}
	return err
}

// listenAll listens on the sockets that are named [NAME=]PATH.
func listenAll(specs []string) (files []device.SuperviseFile, err error) {
	for _, spec := range specs {
		name, path, ok := strings.Cut(spec, "=")
		if !ok {
			name, path = filepath.Base(spec), spec
		}
		f, err := listenUnix(path)
		if err != nil {
			return files, fmt.Errorf("listen on %s: %w", path, err)
		}
		files = append(files, device.SuperviseFile{Name: name, File: f})
	}
	return files, nil
}

// listenUnix listens on a path for root alone. A socket that nobody listens on
// any more is replaced.
func listenUnix(path string) (*os.File, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == os.ModeSocket {
		if err := removeDeaf(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	f, err := l.File()
	l.SetUnlinkOnClose(err != nil)
	return f, err
}

// removeDeaf removes a socket that nobody listens on.
func removeDeaf(path string) error {
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close()
		return unix.EADDRINUSE
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		return os.Remove(path)
	}
	return err
}

func closeListeners(files []device.SuperviseFile) {
	for _, f := range files {
		_ = f.File.Close()
	}
}
