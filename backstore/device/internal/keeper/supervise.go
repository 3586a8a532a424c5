package keeper

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Supervise runs a command, keeps descriptors for it, and starts it again when
// it ends other than by its own will: at once when it was killed by SIGKILL,
// after 10 ms to 5 s, doubling, when it crashed. It returns nil when the child
// ends with status 0, an *[ExitError] when it ends otherwise after it was asked
// to or died of SIGTERM, SIGINT or SIGHUP, and a *[CrashError] if
// Options.MaxCrashes was reached. By then all that was kept is closed, so that a
// device that nobody serves any more fails what waits for it.
//
// A child that asked for an upgrade is started again however it ended. The end
// of ctx asks the child to end, with SIGTERM.
func Supervise(ctx context.Context, o *Options) error {
	s, err := newSupervisor(o)
	if err != nil {
		return fmt.Errorf("supervise: %w", err)
	}
	defer s.close()
	if err := s.run(ctx); err != nil {
		return fmt.Errorf("supervise %s: %w", s.o.Path, err)
	}
	return nil
}

// supervisor is one Supervise. run is its only goroutine but for listen, which
// acts upon notifications.
type supervisor struct {
	o       *Options
	sock    *socket
	given   []inherited // Options.Files
	stdio   [3]int
	low     int  // least number of a program's descriptor
	session bool // each child has its own
	// mounts is this process's mount namespace. If that ended with the process
	// before what is kept is released, its unmounting would wait for a device
	// that nobody can serve any more. As a descriptor it ends after them.
	mounts int
	launch func(program) (*process, error)
	open   func(name string) (*executable, error)

	grow      sync.Once      // of the descriptor table, beside the first child's start
	growing   sync.WaitGroup // the same
	listening sync.WaitGroup
	poke      chan struct{} // something of child has changed

	// of run
	quit    <-chan struct{}
	asked   bool       // to end
	corpses []*process // not waited for yet
	crashes backoff

	mu    sync.Mutex // guards what follows, and receiving
	shelf *shelf
	child child
	good  *executable // that has been ready, or the first
	next  *executable // to be tried at the next start; nil if there is none
}

// child is what is known of the running process.
type child struct {
	p        *process
	started  time.Time
	trial    *executable // that of an upgrade, as long as it has not become ready
	ready    bool
	fed      time.Time // the watchdog
	trigger  bool      // it wants to be treated as hanging
	notified bool      // OnReady was called
}

func newSupervisor(o *Options) (_ *supervisor, err error) {
	c, err := o.fill()
	if err != nil {
		return nil, err
	}
	limit, err := tableLimit()
	if err != nil {
		return nil, err
	}
	s := &supervisor{
		o: c, stdio: [3]int{-1, -1, -1}, mounts: -1, low: limit - tableHigh, launch: launch, poke: make(chan struct{}, 1),
	}
	if c.MaxKept > 0 && c.MaxKept <= fewKept {
		s.low = firstHigh
	}
	if self, err := readStat(os.Getpid()); err == nil {
		s.session = self.tty != 0
	}
	s.open = func(name string) (*executable, error) { return openExecutable(name, s.low) }
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.shelf, err = newShelf(limit, c.MaxKept); err != nil {
		return nil, err
	}
	if s.good, err = s.open(c.Path); err != nil {
		return nil, err
	}
	if err := s.openFiles(); err != nil {
		return nil, err
	}
	if s.sock, err = listen(); err != nil {
		return nil, err
	}
	s.listening.Go(func() { s.sock.wait(s.drain) })
	return s, nil
}

// openFiles duplicates what every child gets: the caller may close its own.
func (s *supervisor) openFiles() (err error) {
	const namespace = "/proc/self/ns/mnt"
	if s.mounts, err = unix.Open(namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open %s: %w", namespace, err)
	}
	if s.stdio[0], err = unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	if s.stdio[1], err = duplicateFile(s.o.Stdout); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	if s.stdio[2], err = duplicateFile(s.o.Stderr); err != nil {
		return fmt.Errorf("standard error: %w", err)
	}
	for _, f := range s.o.Files {
		fd, err := duplicateFile(f.File)
		if err != nil {
			return fmt.Errorf("file %s: %w", f.Name, err)
		}
		s.given = append(s.given, inherited{f.Name, fd})
	}
	return nil
}

// duplicateFile leaves alone whether the file blocks, as f.Fd does not.
func duplicateFile(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(n uintptr) {
		fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, firstListenFD)
	})
	if cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// corpseTime is how long the end of Supervise waits for children that are dead
// but not gone. Their devices have ended with what was kept.
const corpseTime = 10 * time.Second

// close lets go of everything.
func (s *supervisor) close() {
	s.growing.Wait()
	if s.sock != nil {
		s.sock.close()
		s.listening.Wait()
	}
	if s.shelf != nil {
		s.shelf.clear()
	}
	for _, fd := range append(s.stdio[:], s.mounts) {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	for _, f := range s.given {
		unix.Close(f.fd)
	}
	s.good.close()
	s.next.close()
	s.child.trial.close()
	t := time.NewTimer(corpseTime)
	defer t.Stop()
	for _, p := range s.corpses {
		select {
		case <-p.ended:
		case <-t.C:
			s.o.Log.Warn("a process cannot be ended", "pid", p.pid)
			t.Reset(0)
		}
		p.forget()
	}
}

// run starts children until there is a reason not to.
func (s *supervisor) run(ctx context.Context) error {
	s.quit = ctx.Done()
	for first := true; ; first = false {
		e := s.once()
		if first && e.failed != nil {
			return e.failed
		}
		again, pause, err := s.judge(e)
		if !again {
			return err
		}
		if !s.sleep(pause) {
			return e.err()
		}
	}
}

// once starts a child and returns when it is gone, all its messages dealt with.
func (s *supervisor) once() ending {
	p, err := s.start()
	if err != nil {
		return ending{failed: err}
	}
	if s.o.OnStart != nil {
		s.o.OnStart(p.pid)
	}
	w := watch{s: s, p: p}
	e := w.run()
	w.stopTimers()
	if s.sock != nil {
		s.sock.now(s.drain)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e.lived = time.Since(s.child.started)
	e.ready = s.child.ready
	select {
	case <-p.ended:
		p.forget()
	default:
		s.corpses = append(s.corpses, p)
	}
	s.bury()
	return e
}

// bury forgets corpses that are gone.
func (s *supervisor) bury() {
	left := s.corpses[:0]
	for _, p := range s.corpses {
		select {
		case <-p.ended:
			p.forget()
		default:
			left = append(left, p)
		}
	}
	clear(s.corpses[len(left):])
	s.corpses = left
}

// start starts the child. The lock is held so that no message of it is looked
// at before its number is known.
func (s *supervisor) start() (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.child = child{trial: s.next}
	b := s.good
	if s.next != nil {
		b, s.next = s.next, nil
		s.o.Log.Info("upgrade: trying", "program", b.path)
	}
	p, err := s.launch(s.program(b))
	if err != nil {
		return nil, err
	}
	s.child.p, s.child.started = p, time.Now()
	s.grow.Do(func() { s.growing.Go(func() { s.shelf.grow(s.stdio[0]) }) })
	select {
	case <-s.poke:
	default:
	}
	return p, nil
}

// program is the child to be started, with all that it gets.
func (s *supervisor) program(b *executable) program {
	p := program{
		path: b.target(), argv: s.o.Command, dir: s.o.Dir, deathSignal: s.o.DeathSignal, session: s.session,
		env: append([]string(nil), s.o.Env...),
	}
	p.fds = append(p.fds, s.stdio[:]...)
	var names []string
	for _, f := range append(s.given[:len(s.given):len(s.given)], s.shelf.inOrder()...) {
		p.fds = append(p.fds, f.fd)
		names = append(names, f.name)
	}
	set := func(name, value string) { p.env = append(p.env, name+"="+value) }
	if s.sock != nil {
		set(envNotify, s.sock.name)
	}
	set(envStoreMax, strconv.Itoa(s.shelf.most))
	if len(names) > 0 {
		set(envListenFDs, strconv.Itoa(len(names)))
		set(envListenNames, strings.Join(names, ":"))
	}
	if s.o.Watchdog > 0 {
		set(envWatchdog, strconv.FormatInt(s.o.Watchdog.Microseconds(), 10))
	}
	return p
}

// judge says whether the child is to be started again after an end, and when.
func (s *supervisor) judge(e ending) (again bool, pause time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked {
		return false, 0, e.err()
	}
	log := s.o.Log.With("end", e.String(), "lived", e.lived.Round(time.Millisecond))
	if b := s.child.trial; b != nil {
		log.Warn("upgrade: the new program did not become ready: back to the old one", "program", b.path, "old", s.good.path)
		b.close()
		s.child.trial = nil
		return true, 0, nil
	}
	if s.next != nil {
		return true, 0, nil
	}
	if e.done() {
		return false, 0, e.err()
	}
	pause = s.crashes.pause(e)
	if n := s.crashes.crashes; pause > 0 && s.o.MaxCrashes > 0 && n >= s.o.MaxCrashes {
		return false, 0, &CrashError{Crashes: n, Last: e.String()}
	}
	log.Warn("the child ended: starting it again", "pause", pause)
	return true, pause, nil
}

// sleep waits; false if the child is not to be started again after all.
func (s *supervisor) sleep(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			return true
		case <-s.quit:
			return false
		case sig := <-s.o.Signals:
			if isStop(sig) {
				return false
			}
		}
	}
}

func isStop(sig os.Signal) bool { return sig == unix.SIGTERM || sig == unix.SIGINT }
