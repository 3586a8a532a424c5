package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
)

// readyEnv is set for a mount's server: it says how mounting went on readyFD.
const (
	readyEnv = "REPRISE_MOUNT_SERVER"
	readyFD  = 3
)

type mountFlags struct {
	nodeFlags
	traceFlags
	writable, foreground bool
	complete             bool
	completeOptions      backstore.CompleteOptions
}

func newMount() *cobra.Command {
	var f mountFlags
	cmd := &cobra.Command{
		Use:   "mount REF DIR",
		Short: "Mount an image lazily; returns once it is mounted",
		Long: `Mount an image lazily at an existing directory. A process in the background
serves it until it is unmounted, with 'reprise umount' or umount(8).

REF is a converted image at a registry, an OCI layout (oci:DIR[:TAG]), or a
config.v1.json.`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			if err := needRoot("mount", "to attach a block device and mount it"); err != nil {
				return err
			}
			if f.foreground {
				return f.serve(cmd, a[0], a[1])
			}
			return f.spawn(cmd, a[0], a[1])
		},
	}
	f.nodeFlags.add(cmd)
	f.traceFlags.add(cmd)
	fs := cmd.Flags()
	fs.BoolVar(&f.writable, "rw", false, "mount read-write; what is written goes to the upper layer of a config.v1.json, or is dropped when the image is unmounted")
	fs.BoolVar(&f.foreground, "foreground", false, "serve from this process, until unmounted or interrupted")
	fs.BoolVar(&f.complete, "complete", false, "download the rest of the image in the background")
	fs.DurationVar(&f.completeOptions.Delay, "complete-delay", 10*time.Second, "with --complete: wait so long first")
	fs.DurationVar(&f.completeOptions.Jitter, "complete-jitter", 5*time.Second, "with --complete: and a random time up to this")
	fs.Int64Var(&f.completeOptions.Rate, "complete-rate", 0, "with --complete: bytes a second, 0 for no limit")
	return cmd
}

func (f *mountFlags) check(cmd *cobra.Command) error {
	if o := f.completeOptions; o.Delay < 0 || o.Jitter < 0 || o.Rate < 0 {
		return usagef(cmd, "--complete-delay, --complete-jitter and --complete-rate cannot be negative")
	}
	return cmp.Or(f.nodeFlags.check(cmd), f.traceFlags.check(cmd))
}

// spawn starts this program again as the server of the mount and waits until
// that says it is mounted.
func (f *mountFlags) spawn(cmd *cobra.Command, ref, dir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	server := exec.Command(self, serverArgs(cmd, ref, dir)...)
	server.Env = append(os.Environ(), readyEnv+"=1")
	server.ExtraFiles = []*os.File{w}
	server.Stderr = os.Stderr // until it is mounted
	server.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = server.Start()
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("start the mount's server: %w", err)
	}
	stop := context.AfterFunc(cmd.Context(), func() { _ = server.Process.Signal(syscall.SIGTERM) })
	defer stop()
	said, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	var m mountReady
	if json.Unmarshal(said, &m) != nil {
		_ = server.Wait()
		return fmt.Errorf("mount %s: the mount's server ended before it had mounted: %s", ref, server.ProcessState)
	}
	if m.Error != "" {
		_ = server.Wait()
		return errors.New(m.Error)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s mounted at %s, served by process %d\n", m.State.Ref, m.State.Dir, m.State.Pid)
	if f.explain {
		fmt.Fprintf(cmd.ErrOrStderr(), "trace:    %s\n", m.Trace)
	}
	return server.Process.Release()
}

// serverArgs is the command line that makes a server of the same mount.
func serverArgs(cmd *cobra.Command, ref, dir string) []string {
	args := []string{"mount", "--foreground"}
	cmd.Flags().Visit(func(f *pflag.Flag) { args = append(args, "--"+f.Name+"="+f.Value.String()) })
	return append(args, "--", ref, dir)
}

// mountReady is what a server says once.
type mountReady struct {
	State node.MountState `json:"state"`
	Trace string          `json:"trace,omitempty"`
	Error string          `json:"error,omitempty"`
}

// serve mounts and stays until the image is unmounted. A server that was
// spawned tells its parent how that went, and only the parent tells the user.
func (f *mountFlags) serve(cmd *cobra.Command, ref, dir string) error {
	if os.Getenv(readyEnv) == "" {
		return f.mountAndWait(cmd, ref, dir, func(m mountReady) {
			if f.explain {
				fmt.Fprintf(cmd.ErrOrStderr(), "trace:    %s\n", m.Trace)
			}
		})
	}
	syscall.CloseOnExec(readyFD)
	_ = os.Unsetenv(readyEnv)
	parent := os.NewFile(readyFD, "ready")
	said := false
	err := f.mountAndWait(cmd, ref, dir, func(m mountReady) {
		said = true
		detachOutput(f.root)
		_ = json.NewEncoder(parent).Encode(m) // a parent that is gone does not want to know
		_ = parent.Close()
	})
	if err != nil && !said {
		_ = json.NewEncoder(parent).Encode(mountReady{Error: err.Error()})
		return exitStatus(exitFailed)
	}
	return err
}

func (f *mountFlags) mountAndWait(cmd *cobra.Command, ref, dir string, ready func(mountReady)) error {
	n, err := f.open(cmd)
	if err != nil {
		return err
	}
	goodbye := func() {}
	defer func() { goodbye() }()
	o := &node.MountOptions{Image: f.image(nil), Writable: f.writable, Plan: f.plan()}
	o.Begin = func(s node.MountState) (err error) {
		goodbye, err = startWatch(n.Root(), s)
		return err
	}
	if f.complete {
		o.Complete = &f.completeOptions
	}
	m, err := n.Mount(cmd.Context(), ref, dir, o)
	if err != nil {
		return errors.Join(err, n.Close())
	}
	said := mountReady{State: m.State}
	if f.explain {
		_, said.Trace = m.Image.Trace(cmd.Context())
	}
	ready(said)
	return errors.Join(m.Wait(cmd.Context()), end(cmd, m), n.Close())
}

// end unmounts. Where files on the mount are in use it takes the mount out of
// the way and serves them until they are closed, or a second signal comes.
func end(cmd *cobra.Command, m *node.Mount) error {
	err := m.Close()
	if !errors.Is(err, syscall.EBUSY) {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "reprise: files on %s are in use: they are served until they are closed; a second signal ends that\n", m.State.Dir)
	err = m.Detach()
	if err == nil {
		err = m.Wait(context.WithoutCancel(cmd.Context()))
	}
	return errors.Join(err, m.Close())
}

// detachOutput gives the terminal and the working directory back; what the
// server says later goes to a file in the state directory.
func detachOutput(root string) {
	path := filepath.Join(root, "mounts", "server.log")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		f, err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	if err != nil {
		return
	}
	for fd := 1; fd <= 2; fd++ {
		_ = syscall.Dup3(int(f.Fd()), fd, 0)
	}
	_ = f.Close()
	_ = os.Chdir("/")
}

func newUmount() *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:     "umount DIR",
		Aliases: []string{"unmount"},
		Short:   "Unmount an image and end its server",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if root == "" {
				return usagef(cmd, "--root is empty")
			}
			if err := needRoot("umount", "to unmount"); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			err := node.Unmount(ctx, root, a[0])
			if errors.Is(err, node.ErrNotMounted) {
				err = fmt.Errorf("%w (%s; another one is named with --root)", err, root)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&root, "root", node.DefaultRoot, "state directory")
	return cmd
}
