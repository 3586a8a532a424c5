package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/replayer/node"
)

// An image that is mounted, or that a container runs on, is served by a process
// of its own, unless there is a daemon:
//
//	mount ── (gone once it is mounted)      run
//	  └ keep ── serve                        └ serve
//
// keep, or run itself, holds the descriptors and starts serve again when it is
// killed.

// Hidden commands.
const (
	serveName = "serve-image"
	keepName  = "keep-image"
)

// keepSocketFD is where keep finds the listening socket.
const keepSocketFD = 3

// firstRequest is how long a server waits to be asked.
const firstRequest = 10 * time.Second

// self is the program that runs.
func self() string {
	path, err := os.Executable()
	if err != nil {
		return "/proc/self/exe"
	}
	if _, err := os.Stat(path); err != nil { // replaced since
		return "/proc/self/exe"
	}
	return path
}

func (f *nodeFlags) absRoot() string {
	root, err := filepath.Abs(f.root)
	if err != nil {
		return f.root
	}
	return root
}

// serveArgs is the command line of a private server.
func (f *nodeFlags) serveArgs(cmd *cobra.Command, r *node.Request) []string {
	args := append([]string{self(), serveName, "--root=" + f.absRoot()}, f.ofProcess(cmd)...)
	if r.Writable {
		args = append(args, "--writable")
	}
	if r.Leased || r.Dir == "" {
		args = append(args, "--for-run")
	}
	return append(args, r.ID)
}

// daemonTime bounds how long a daemon may take to say who it is.
const daemonTime = 2 * time.Second

// daemon is the daemon of the state directory, nil if none answers, or if what
// it mounts would not be seen here.
func (f *nodeFlags) daemon(cmd *cobra.Command) *node.Client {
	ctx, cancel := context.WithTimeout(cmd.Context(), daemonTime)
	defer cancel()
	c, err := node.Dial(ctx, f.absRoot())
	if err != nil {
		return nil
	}
	info, err := c.Server(ctx)
	if err == nil && info.SameMounts() {
		return c
	}
	_ = c.Close()
	return nil
}

// server is the daemon, or a new server of this one image, which this process
// keeps.
func (f *nodeFlags) server(cmd *cobra.Command, r *node.Request) (s node.Devices, end func() error, err error) {
	if c := f.daemon(cmd); c != nil {
		f.warnOfDaemon(cmd)
		return c, c.Close, nil
	}
	p, err := node.StartPrivate(r.ID, &node.PrivateOptions{
		Root: f.absRoot(), Command: f.serveArgs(cmd, r), Dir: "/", Stderr: os.Stderr, Log: logger(cmd),
	})
	if err != nil {
		return nil, nil, err
	}
	return p, p.Close, nil
}

// warnOfDaemon says which flags were given in vain.
func (f *nodeFlags) warnOfDaemon(cmd *cobra.Command) {
	for _, name := range processFlags {
		if fl := cmd.Flags().Lookup(name); fl != nil && fl.Changed {
			logger(cmd).Warn("the daemon serves the image, with its own setting", "flag", "--"+name)
		}
	}
}

func newServe() *cobra.Command {
	var (
		f                nodeFlags
		writable, forRun bool
	)
	cmd := &cobra.Command{
		Use: serveName + " ID", Short: "Serve one image", Hidden: true,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if writable {
				if err := becomeFlusher(); err != nil {
					return err
				}
			}
			if forRun { // it ends when its client does, whatever signals come
				signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
			}
			return f.serveImage(cmd, a[0])
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&writable, "writable", false, "")
	cmd.Flags().BoolVar(&forRun, "for-run", false, "")
	return cmd
}

// serveImage serves until its device is gone.
func (f *nodeFlags) serveImage(cmd *cobra.Command, id string) error {
	store, err := device.OpenStore()
	if err != nil {
		return err
	}
	listeners, err := store.Listeners()
	if err != nil || len(listeners) != 1 {
		return errors.Join(err, fmt.Errorf("%d listening sockets were handed over instead of one", len(listeners)))
	}
	o := &node.ServerOptions{Keeper: store, Socket: node.PrivateSocket(f.root, id), Version: version, Log: logger(cmd)}
	keeper := os.Getppid()
	o.Orphaned = func() bool { // the client is the keeper
		return !store.Supervised() || os.Getppid() != keeper
	}
	n, err := f.open(cmd)
	var s *node.Server
	if err != nil {
		s = node.NewBrokenServer(err, o)
	} else {
		s = node.NewServer(n, o)
		if err := s.Adopt(cmd.Context()); err != nil {
			o.Log.Warn("adopt", "err", err)
		}
	}
	if err := store.Ready(); err != nil {
		o.Log.Warn("the keeper cannot be told", "err", err)
	}
	var reap sync.WaitGroup
	reap.Go(func() {
		if err := node.Reap(f.root); err != nil {
			o.Log.Warn("take away what killed processes have left", "err", err)
		}
	})
	err = serveUntilIdle(cmd.Context(), s, listeners[0], o.Log)
	reap.Wait()
	err = errors.Join(err, s.Close())
	if n != nil {
		err = errors.Join(err, n.Close())
	}
	if e := os.Remove(o.Socket); !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// serveUntilIdle answers until there is nothing left to serve. When ctx ends it
// unmounts: open files are served until they are closed.
func serveUntilIdle(ctx context.Context, s *node.Server, l device.Listener, log *slog.Logger) error {
	serving, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(serving, l) }()
	s.Idle(ctx, firstRequest)
	if ctx.Err() != nil {
		for _, busy := range s.ReleaseIdle(context.Background()) {
			log.Warn("files on a mount are in use: they are served until they are closed; a second signal ends that", "mount", busy)
		}
		s.Detach()
		s.Idle(context.Background(), 0)
	}
	stop()
	return <-served
}

func newKeep() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use: keepName + " ID -- CMD…", Short: "Keep the server of one image", Hidden: true,
		Args: args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			socket := os.NewFile(keepSocketFD, "socket")
			syscall.CloseOnExec(keepSocketFD)
			signals := make(chan os.Signal, 4)
			signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			return node.Keep(a[0], socket, &node.PrivateOptions{
				Root: f.root, Command: a[1:], Stderr: os.Stderr, Signals: signals, Log: log,
			})
		},
	}
	cmd.Flags().StringVar(&f.root, "root", node.DefaultRoot, "")
	return cmd
}

// spawnKeeper starts a keeper, and through it a server, that outlive this
// process.
func (f *nodeFlags) spawnKeeper(cmd *cobra.Command, r *node.Request) (*keeperProcess, error) {
	socket, err := node.Listen(f.absRoot(), r.ID)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	log, err := os.OpenFile(filepath.Join(f.absRoot(), "server.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, errors.Join(err, os.Remove(node.PrivateSocket(f.absRoot(), r.ID)))
	}
	defer log.Close()
	args := append([]string{keepName, "--root=" + f.absRoot(), "--", r.ID}, f.serveArgs(cmd, r)...)
	k := exec.Command(self(), args...)
	k.Args[0] = "reprise"
	k.Dir = "/"
	k.Stdout, k.Stderr = log, log
	k.ExtraFiles = []*os.File{socket}
	k.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := startFlusher(k, r.Writable); err != nil {
		return nil, errors.Join(fmt.Errorf("start the mount's keeper: %w", err), os.Remove(node.PrivateSocket(f.absRoot(), r.ID)))
	}
	return newKeeperProcess(k, node.PrivateSocket(f.absRoot(), r.ID), log.Name()), nil
}

// A keeperProcess is a keeper in another process.
type keeperProcess struct {
	*node.Client
	ended chan struct{} // closed: it has
	cmd   *exec.Cmd
}

func newKeeperProcess(k *exec.Cmd, socket, log string) *keeperProcess {
	p := &keeperProcess{ended: make(chan struct{}), cmd: k}
	p.Client = node.NewKeptClient(socket, p.ended, func() error {
		return fmt.Errorf("the mount's keeper ended (%s); %s may say why", k.ProcessState, log)
	})
	go func() {
		_ = k.Wait()
		close(p.ended)
	}()
	return p
}

// settle waits until nothing is left of a mount that has failed.
func (p *keeperProcess) settle() {
	select {
	case <-p.ended:
	case <-time.After(settleTime):
		_ = p.cmd.Process.Signal(unix.SIGTERM)
	}
	_ = p.Close()
}

const settleTime = 20 * time.Second

// startFlusher starts a process, as an IO flusher if set is true.
func startFlusher(cmd *exec.Cmd, set bool) error {
	if set {
		defer onFlusher()()
	}
	return cmd.Start()
}
