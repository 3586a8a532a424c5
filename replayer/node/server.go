package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore/device"
)

// Devices serve the devices of images: a [Server] in this process, a [Client]
// in another.
type Devices interface {
	// Attach opens an image and makes its device, mounted if the request says
	// so, and returns when that is done. A device that is there already is what
	// it returns then; it is mounted again if it is not any more. say, if not nil, is told what is logged meanwhile. When
	// ctx ends first, and nobody else waits, all is undone.
	Attach(ctx context.Context, r *Request, say func(line string)) (*Status, error)
	// Status describes a device; with trace set, when it is known whether its trace
	// is used.
	Status(ctx context.Context, id string, trace bool) (*Status, error)
	// Quiesce ends the replay. After failAfter, unless that is 0, reads fail.
	Quiesce(ctx context.Context, id string, failAfter time.Duration) (*Status, error)
	// Fail makes reads fail from now on.
	Fail(ctx context.Context, id string) error
	// Release unmounts the device, lazily if asked to, and returns when nothing
	// is left of it. The error matches EBUSY while files on it are in use.
	Release(ctx context.Context, id string, lazily bool) error
	// Lease keeps a device that is leased for as long as ctx lasts. It returns
	// before that only if the device is gone.
	Lease(ctx context.Context, id string) error
}

// ServerOptions are the settings of a [Server]. A zero field means its default.
type ServerOptions struct {
	// Keeper makes devices outlive the process. Default: they do not.
	Keeper Keeper
	// Socket is where clients reach the server. It is what tells its devices
	// from those of other servers of the same root.
	Socket string
	// LeaseGrace is how long a client of a leased device may be gone, 5 s by
	// default.
	LeaseGrace time.Duration
	// Orphaned, if set, tells that no client will come any more.
	Orphaned func() bool
	// Version of the program.
	Version string
	// Upgrade is asked to make room for the next process, which may be another
	// program's. Default: it cannot be done.
	Upgrade func(UpgradeRequest) error
	// GRPC, if set, answers gRPC on the same socket.
	GRPC http.Handler
	// CallGrace is how long gRPC calls may take that are under way when the server
	// ends, 10 s by default. Their contexts end then.
	CallGrace time.Duration
	// Collectors, if any, are more figures for Prometheus.
	Collectors []prometheus.Collector
	// HTTP, if set, answers what clients ask of the same socket and the server does
	// not know; see [Client.Get].
	HTTP http.Handler
	// Log receives warnings, slog.Default() by default.
	Log *slog.Logger

	opened func(*Image) error // an image is open, nothing has been read of it
}

// A Server makes devices of images and serves them. [Server.Close] it, or end
// the process: then the next one adopts what a keeper holds.
type Server struct {
	n          *Node
	o          ServerOptions
	broken     error // why there is no node
	table      table
	metrics    metrics
	calls      *calls
	started    time.Time
	recordings recordings
	leaving    chan struct{} // closed by Close and Leave
	wg         sync.WaitGroup

	mu      sync.Mutex // guards what follows
	devices map[string]*served
	seen    bool          // there was a request
	change  chan struct{} // gets something when a device is forgotten
	closed  bool
}

var _ Devices = (*Server)(nil)

// defaultLease is how long a client may be gone.
const defaultLease = 5 * time.Second

// defaultCallGrace is how long a gRPC call may hold up the end of the server.
const defaultCallGrace = 10 * time.Second

// NewServer makes a server of devices on n, which is to be closed after it.
func NewServer(n *Node, o *ServerOptions) *Server {
	s := newServer(o)
	s.n = n
	s.o.Log = cmp.Or(s.o.Log, n.o.Log)
	return s
}

// NewBrokenServer answers every request for a device with err: a state
// directory that cannot be opened, say.
func NewBrokenServer(err error, o *ServerOptions) *Server {
	s := newServer(o)
	s.broken = err
	s.o.Log = cmp.Or(s.o.Log, slog.Default())
	return s
}

func newServer(o *ServerOptions) *Server {
	s := &Server{
		started: time.Now(), leaving: make(chan struct{}),
		devices: map[string]*served{}, change: make(chan struct{}, 1),
	}
	if o != nil {
		s.o = *o
	}
	s.o.LeaseGrace = cmp.Or(s.o.LeaseGrace, defaultLease)
	s.calls = newCalls(s.o.GRPC, cmp.Or(s.o.CallGrace, defaultCallGrace))
	if s.o.Keeper != nil {
		s.o.Keeper = &mortalKeeper{Keeper: s.o.Keeper, log: cmp.Or(s.o.Log, slog.Default())}
	}
	return s
}

// Attach implements [Devices].
func (s *Server) Attach(ctx context.Context, r *Request, say func(string)) (*Status, error) {
	if err := checkID(r.ID); err != nil {
		return nil, err
	}
	for {
		st, err := s.attach(ctx, r, say)
		if !errors.Is(err, device.ErrGone) || ctx.Err() != nil {
			return st, err
		}
		// What the server before had begun could not be adopted.
	}
}

func (s *Server) attach(ctx context.Context, r *Request, say func(string)) (*Status, error) {
	d, isNew, err := s.register(ctx, r)
	if err != nil {
		return nil, err
	}
	if say != nil {
		defer d.log.follow(say)()
	}
	if isNew {
		go d.attach()
	}
	if err := d.await(ctx); err != nil {
		return nil, err
	}
	if !isNew {
		if err := d.remount(); err != nil {
			return nil, err
		}
	}
	d.joined(r)
	return d.status(), nil
}

// register finds the device of a request or makes one.
func (s *Server) register(ctx context.Context, r *Request) (d *served, isNew bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, fmt.Errorf("%s: the server is ending", r.Ref)
	}
	s.seen = true
	if d := s.devices[r.ID]; d != nil {
		return d, false, nil
	}
	d = s.newServed(ctx, r)
	s.devices[r.ID] = d
	return d, true, nil
}

// unseen takes back that there was a request.
func (s *Server) unseen() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = false
}

func (s *Server) forget(d *served) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.devices, d.id)
	select {
	case s.change <- struct{}{}:
	default:
	}
}

// device is one that is attached.
func (s *Server) device(ctx context.Context, id string) (*served, error) {
	s.mu.Lock()
	d := s.devices[id]
	s.mu.Unlock()
	if d == nil {
		return nil, fmt.Errorf("device %.80q: %w", id, ErrNoDevice)
	}
	select {
	case <-d.ready:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if d.failed() != nil {
		return nil, fmt.Errorf("device %s: %w", id, ErrNoDevice)
	}
	return d, nil
}

// all are the devices, attached or not, in order of their IDs.
func (s *Server) all() []*served {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*served, 0, len(s.devices))
	for _, d := range s.devices {
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b *served) int { return strings.Compare(a.id, b.id) })
	return list
}

// List describes the devices that are attached.
func (s *Server) List() []Status {
	var list []Status
	for _, d := range s.all() {
		select {
		case <-d.ready:
			if d.failed() == nil {
				list = append(list, *d.status())
			}
		default:
		}
	}
	return list
}

// Status implements [Devices].
func (s *Server) Status(ctx context.Context, id string, trace bool) (*Status, error) {
	d, err := s.device(ctx, id)
	if err != nil {
		return nil, err
	}
	if trace {
		d.im.Trace(ctx)
		d.im.replay.awaitPlan(ctx)
	}
	return d.status(), nil
}

// Quiesce implements [Devices].
func (s *Server) Quiesce(ctx context.Context, id string, failAfter time.Duration) (*Status, error) {
	d, err := s.device(ctx, id)
	if err != nil {
		return nil, err
	}
	d.quiesce(failAfter)
	return d.status(), nil
}

// Fail implements [Devices].
func (s *Server) Fail(ctx context.Context, id string) error {
	d, err := s.device(ctx, id)
	if err == nil {
		d.im.fail()
	}
	return err
}

// Release implements [Devices]. A device that is not there has been released.
func (s *Server) Release(ctx context.Context, id string, lazily bool) error {
	s.mu.Lock()
	d := s.devices[id]
	s.mu.Unlock()
	if d == nil {
		return nil
	}
	return d.release(ctx, lazily)
}

// Lease implements [Devices].
func (s *Server) Lease(ctx context.Context, id string) error {
	d, err := s.device(ctx, id)
	if err != nil {
		return err
	}
	defer d.hold()()
	select {
	case <-d.gone:
		return fmt.Errorf("device %s: %w", id, ErrNoDevice)
	case <-ctx.Done():
		return nil
	}
}

// adoptTime bounds how long Adopt waits for images that cannot be opened now:
// they are tried on.
const adoptTime = 10 * time.Second

// Adopt takes over the devices of the process before, and takes away what it has
// left of others. It is called once, before requests are served.
func (s *Server) Adopt(ctx context.Context) error {
	if s.broken != nil || s.o.Keeper == nil {
		return s.broken
	}
	list, err := states(s.n.o.Root)
	errs := []error{err}
	ctx, cancel := context.WithTimeout(ctx, adoptTime)
	defer cancel()
	var g errgroup.Group
	for _, st := range list {
		if st.Socket != s.o.Socket {
			continue
		}
		d := s.adopted(st)
		fds := s.o.Keeper.Take(d.id)
		go d.adopt(fds)
		g.Go(func() error {
			select {
			case <-d.ready:
			case <-ctx.Done():
			}
			return nil
		})
	}
	errs = append(errs, s.dropOrphans())
	_ = g.Wait()
	return errors.Join(errs...)
}

// adopted registers the device of a state file.
func (s *Server) adopted(st *state) *served {
	d := s.newServed(context.Background(), &st.Request)
	d.state = *st
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devices[d.id] = d
	s.seen = true
	return d
}

// dropOrphans lets go of descriptors of devices that have no state file: they
// had not appeared yet, or were about to be gone.
func (s *Server) dropOrphans() error {
	var errs []error
	for _, name := range s.o.Keeper.Names() {
		id, _, ok := strings.Cut(name, ".")
		s.mu.Lock()
		known := s.devices[id] != nil
		s.mu.Unlock()
		if !ok || known {
			continue
		}
		closeAll(s.o.Keeper.Take(id))
		errs = append(errs, s.o.Keeper.Remove(name))
	}
	return errors.Join(errs...)
}

// Idle returns when the server has nothing left to do: its last device is gone,
// or nobody has asked for one in the time.
func (s *Server) Idle(ctx context.Context, first time.Duration) {
	t := time.NewTimer(first)
	defer t.Stop()
	for late := false; ; {
		s.mu.Lock()
		idle := len(s.devices) == 0 && (s.seen || late)
		s.mu.Unlock()
		if idle {
			return
		}
		select {
		case <-s.change:
		case <-t.C:
			late = true
		case <-ctx.Done():
			return
		}
	}
}

// Busy says which devices are in use, a line each.
func (s *Server) Busy() (lines []string) {
	for _, d := range s.all() {
		where := "leased"
		if d.state.Dir != "" {
			where = "mounted at " + d.state.Dir
		}
		lines = append(lines, d.state.Request.Ref+" "+where)
	}
	return lines
}

// ReleaseIdle unmounts and releases what nothing uses, and says what is left.
func (s *Server) ReleaseIdle(ctx context.Context) (busy []string) {
	for _, d := range s.all() {
		if d.state.Request.Leased && d.leases() > 0 {
			continue
		}
		once, cancel := context.WithTimeout(ctx, time.Second)
		if err := d.release(once, false); err != nil && !errors.Is(err, errBusy) {
			s.o.Log.Warn("release", "image", d.state.Request.Ref, "err", err)
		}
		cancel()
	}
	return s.Busy()
}

// Detach takes all mounts out of the directory tree at once. Files on them that
// are open are served until they are closed.
func (s *Server) Detach() {
	for _, d := range s.all() {
		if err := d.unmount(true); err != nil {
			s.o.Log.Warn("unmount", "image", d.state.Request.Ref, "dir", d.state.Dir, "err", err)
		}
	}
}

func (d *served) leases() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.holders
}

// Close gives up what is being attached, unmounts lazily, and releases all
// devices, whose users get errors.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	var errs []error
	for _, d := range s.all() {
		errs = append(errs, d.close())
	}
	s.leave()
	s.wg.Wait()
	s.table.wait()
	return errors.Join(errs...)
}

// close is release by force.
func (d *served) close() error {
	select {
	case <-d.ready:
	default:
		d.stop(errors.New("the server is ending"))
		<-d.ready
	}
	if d.failed() != nil {
		<-d.gone
		return nil
	}
	// Unmounting may wait for bytes, and so may who keeps files open.
	fail := time.AfterFunc(lastReads, d.im.fail)
	defer fail.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), lastReads)
	defer cancel()
	err := d.release(ctx, true)
	if err == nil {
		return nil
	}
	d.im.fail()
	again, cancel := context.WithTimeout(context.Background(), lastReads)
	defer cancel()
	if err = d.release(again, true); !errors.Is(err, errBusy) {
		return err
	}
	// Files that are open keep the kernel's device; it goes with the last of them.
	return errors.Join(fmt.Errorf("%s: %w", d.state.Request.Ref, err), d.state.remove(d.s.n.o.Root))
}

func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.leaving:
	default:
		close(s.leaving)
	}
}

// Info describes the server.
func (s *Server) Info() ServerInfo {
	i := ServerInfo{Pid: os.Getpid(), Version: s.o.Version, Started: s.started, Mounts: mountNamespace(), Kept: s.o.Keeper != nil}
	i.Program, _ = os.Executable()
	s.mu.Lock()
	defer s.mu.Unlock()
	i.Devices = len(s.devices)
	return i
}

// SameMounts tells whether this process sees what the server mounts.
func (i *ServerInfo) SameMounts() bool { return i.Mounts != "" && i.Mounts == mountNamespace() }

// mountNamespace names that of this process.
func mountNamespace() string {
	name, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return ""
	}
	return name
}
