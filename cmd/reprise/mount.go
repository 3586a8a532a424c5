package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
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
		Long: `Mount an image lazily at an existing directory. The daemon, or a process in the
background where there is none, serves it until it is unmounted, with 'reprise
umount' or umount(8). A second process in the background starts the first again
should it be killed, and the mount goes on.

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
			return f.mount(cmd, a[0], a[1])
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

// request asks for the mount.
func (f *mountFlags) request(ref, dir string) *node.Request {
	r := f.nodeFlags.request(ref, &f.traceFlags)
	r.Dir, r.Writable = dir, f.writable
	if f.complete {
		r.Complete = &f.completeOptions
	}
	return &r
}

// mount has the daemon mount the image, or a new process in the background.
func (f *mountFlags) mount(cmd *cobra.Command, ref, dir string) error {
	r := f.request(ref, dir)
	if c := f.daemon(cmd); c != nil {
		defer c.Close()
		f.warnOfDaemon(cmd)
		return f.attach(cmd, c, r)
	}
	k, err := f.spawnKeeper(cmd, r)
	if err != nil {
		return fmt.Errorf("mount %s: %w", ref, err)
	}
	if err := f.attach(cmd, k, r); err != nil {
		k.settle()
		return err
	}
	return k.Close()
}

// attach asks for the mount and says how that went.
func (f *mountFlags) attach(cmd *cobra.Command, s node.Devices, r *node.Request) error {
	st, err := s.Attach(cmd.Context(), r, func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) })
	if err != nil {
		if cmd.Context().Err() != nil {
			err = errors.Join(fmt.Errorf("mount %s: %w", r.Ref, context.Cause(cmd.Context())), undo(cmd, s, r.ID))
		}
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s mounted at %s, served by process %d\n", st.Ref, st.Dir, st.Pid)
	if f.explain {
		if st, err = s.Status(cmd.Context(), st.ID, true); err != nil {
			return err
		}
		explainTrace(cmd.ErrOrStderr(), st.Explain)
	}
	return nil
}

// undoTime bounds the undoing of what has been interrupted.
const undoTime = 15 * time.Second

// undo takes away what may have been mounted just before an interrupt.
func undo(cmd *cobra.Command, s node.Devices, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), undoTime)
	defer cancel()
	err := s.Release(ctx, id, true)
	if errors.Is(err, node.ErrServerEnded) {
		return nil
	}
	return err
}

// serve mounts and stays until the image is unmounted, as the keeper of the
// process that serves it.
func (f *mountFlags) serve(cmd *cobra.Command, ref, dir string) error {
	signals := make(chan os.Signal, 4)
	r := f.request(ref, dir)
	p, err := node.StartPrivate(r.ID, &node.PrivateOptions{
		Root: f.absRoot(), Command: f.serveArgs(cmd, r), Dir: "/", Stderr: os.Stderr, Log: logger(cmd), Signals: signals,
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", ref, err)
	}
	if err := f.attach(cmd, p, r); err != nil {
		return errors.Join(err, p.Close())
	}
	select {
	case <-p.Done():
		return p.Err()
	case <-cmd.Context().Done():
	}
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT) // the next one ends it at once
	defer signal.Stop(signals)
	signals <- unix.SIGTERM
	<-p.Done()
	return p.Err()
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
