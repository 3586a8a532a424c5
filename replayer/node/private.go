package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// ListenerName is the control socket's among the descriptors that a keeper hands
// to a server.
const ListenerName = "control"

// maxKept is how many descriptors a keeper of one device holds at most.
const maxKept = 16

// maxCrashes in a row is when a keeper gives a server up.
const maxCrashes = 5

// forEver is how long a server that was told to end may take: it serves files
// that are in use until they are closed.
const forEver = 10000 * time.Hour

// A Private is a server of one device that this process, or one that it starts,
// keeps.
type Private struct {
	*Client
	ID      string
	signals chan os.Signal
	asked   atomic.Bool   // for the device
	quiet   atomic.Bool   // the server is ending, as it should
	ended   chan struct{} // closed: the keeper has ended
	err     error         // after ended: why
	closed  sync.Once
}

// PrivateOptions say how to start a private server.
type PrivateOptions struct {
	Root string
	// Command is the server's; it is given the listening socket under
	// ListenerName. It ends by itself when its device is gone.
	Command []string
	Dir     string   // its working directory, this process's by default
	Stderr  *os.File // where it says what it has to say
	Log     *slog.Logger
	// Signals are passed on to the server; the second SIGTERM or SIGINT kills it.
	Signals chan os.Signal

	begun func(pid int) // a process was started
}

// Listen makes the control socket of a private server. The file outlives the
// process; who serves or keeps the device removes it.
func Listen(root, id string) (*os.File, error) {
	if err := makeDevicesDir(root); err != nil {
		return nil, err
	}
	l, err := listen(PrivateSocket(root, id))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.File()
}

// StartPrivate starts a server of the device id, and keeps it: it is started
// again whenever it is killed, and adopts what there is. It returns when the
// process is there, and so does not stand in line behind other processes that
// its caller starts.
func StartPrivate(id string, o *PrivateOptions) (*Private, error) {
	socket, err := Listen(o.Root, id)
	if err != nil {
		return nil, err
	}
	k := *o
	if k.Signals == nil {
		k.Signals = make(chan os.Signal, 4)
	}
	p := &Private{Client: NewClient(PrivateSocket(o.Root, id)), ID: id, signals: k.Signals, ended: make(chan struct{})}
	k.Log = slog.New(untilQuiet{cmp.Or(o.Log, slog.Default()).Handler(), &p.quiet})
	p.Client.lost = p.ended
	p.Client.err = func() error { return p.err }
	begun := make(chan struct{})
	var once sync.Once
	k.begun = func(int) { once.Do(func() { close(begun) }) }
	go func() {
		defer close(p.ended)
		p.err = Keep(id, socket, &k)
		_ = socket.Close()
	}()
	select {
	case <-begun:
	case <-p.ended:
	}
	return p, nil
}

// Keep is the keeper of a private server: it returns when that has ended by
// itself, or cannot be started, and takes away what is left then.
func Keep(id string, socket *os.File, o *PrivateOptions) error {
	err := device.Supervise(context.Background(), &device.SuperviseOptions{
		Command: o.Command, Dir: o.Dir, Stdout: o.Stderr, Stderr: o.Stderr,
		Files:   []device.SuperviseFile{{Name: ListenerName, File: socket}},
		MaxKept: maxKept, MaxCrashes: maxCrashes, StopTimeout: forEver, Signals: o.Signals, OnStart: o.begun, Log: o.Log,
	})
	var exit *device.ExitError
	if errors.As(err, &exit) && !hasState(o.Root, id) {
		err = nil // it had done all that was to be done
	}
	if err != nil {
		err = fmt.Errorf("the image's server: %w", err)
	}
	return errors.Join(err, clear(o.Root, id))
}

func hasState(root, id string) bool {
	_, err := os.Stat(statePath(root, id))
	return err == nil
}

// clear takes away what is left of a device whose server will not come back.
func clear(root, id string) error {
	all, err := lockDevices(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer all.Close()
	s, err := readState(statePath(root, id))
	if err == nil {
		err = s.reap(root)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, removeIfThere(PrivateSocket(root, id)))
}

// Done is closed when the server has ended and is not started again.
func (p *Private) Done() <-chan struct{} { return p.ended }

// Err says why the server was not started again, after Done; nil if it ended by
// itself, with its device.
func (p *Private) Err() error { return p.err }

// Attach implements [Devices].
func (p *Private) Attach(ctx context.Context, r *Request, say func(string)) (*Status, error) {
	p.asked.Store(true)
	return p.Client.Attach(ctx, r, say)
}

// Release implements [Devices].
func (p *Private) Release(ctx context.Context, id string, lazily bool) error {
	p.quiet.Store(true) // the server ends with its device
	err := p.Client.Release(ctx, id, lazily)
	if err != nil {
		p.quiet.Store(false)
	}
	return err
}

// untilQuiet logs nothing any more once it is told so: what a keeper has to say
// of a server that ends as it should is nobody's concern.
type untilQuiet struct {
	slog.Handler
	quiet *atomic.Bool
}

func (h untilQuiet) Enabled(ctx context.Context, l slog.Level) bool {
	return !h.quiet.Load() && h.Handler.Enabled(ctx, l)
}

func (h untilQuiet) WithAttrs(a []slog.Attr) slog.Handler {
	return untilQuiet{h.Handler.WithAttrs(a), h.quiet}
}

func (h untilQuiet) WithGroup(name string) slog.Handler {
	return untilQuiet{h.Handler.WithGroup(name), h.quiet}
}

// endingTime is how long a server may take to end by itself, which it does when
// its device is gone.
const endingTime = 20 * time.Second

// Close waits for the server's end, and brings it about if there was no device,
// or if it takes long.
func (p *Private) Close() error {
	p.closed.Do(func() {
		p.quiet.Store(true)
		if p.asked.Load() {
			t := time.NewTimer(endingTime)
			select {
			case <-p.ended:
			case <-t.C:
			}
			t.Stop()
		}
		p.Kill()
		_ = p.Client.Close()
	})
	return nil
}

// Kill ends the server, and its device if it has one, at once.
func (p *Private) Kill() {
	for {
		select {
		case <-p.ended:
			return
		case p.signals <- unix.SIGTERM: // the second one kills
		}
	}
}
