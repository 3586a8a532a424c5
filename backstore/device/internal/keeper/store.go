package keeper

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a keeper may take to accept a message, and to act upon
// it. One that is busy for longer is taken to be lost.
const patience = 10 * time.Second

// Store is this process's side of its service manager: systemd, or [Supervise].
//
// Descriptors are named ID.ROLE: ID is what they belong to, ROLE has no dot.
type Store struct {
	addr       *net.UnixAddr // nil: nobody keeps anything
	limit      int
	watchdog   time.Duration
	supervised bool

	mu   sync.Mutex // guards what follows
	fds  []inherited
	kept map[string]int // what the keeper holds, by name
}

// OpenStore finds the service manager in the environment, and what it kept. It
// must be called early, and once: it removes the variables, and descriptors that
// were handed over are closed on exec only from then on. Without a service
// manager it returns a Store that keeps nothing.
func OpenStore() (*Store, error) {
	s, err := openStore(takeEnvironment())
	if err != nil {
		return nil, fmt.Errorf("open descriptor store: %w", err)
	}
	return s, nil
}

func openStore(e environment) (*Store, error) {
	lifeline, supervised, err := e.lifeline()
	if err != nil {
		return nil, err
	}
	addr, err := e.socket()
	if err != nil {
		return nil, err
	}
	fds, err := e.descriptors(supervised)
	if err != nil {
		return nil, err
	}
	s := &Store{
		addr: addr, limit: e.limit(), watchdog: e.watchdog(), supervised: supervised,
		fds: fds, kept: make(map[string]int),
	}
	for _, d := range fds {
		if !listens(d.fd) {
			s.kept[d.name]++
		}
	}
	if supervised {
		if err := arm(lifeline); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// arm tells the keeper that the lifeline will not be closed before this
// process ends: nothing here closes it.
func arm(fd int) error {
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, firstHigh)
	if err != nil {
		if high, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, fd); err != nil {
			return fmt.Errorf("%s: descriptor %d: %w", envKeeper, fd, err)
		}
	}
	unix.Close(fd)
	// A keeper that has died in the meantime is no reason not to serve.
	_ = unix.Sendto(high, []byte{1}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
	return nil
}

// listens tells a listening socket from a kept descriptor.
func listens(fd int) bool {
	v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err == nil && v != 0
}

// Kept reports whether there is a service manager. Whether systemd's unit
// allows descriptors (FileDescriptorStoreMax=) can only be told from version
// 254 on: then Store fails where it does not.
func (s *Store) Kept() bool { return s.addr != nil }

// Supervised reports whether the service manager is [Supervise].
func (s *Store) Supervised() bool { return s.supervised }

// Store has the service manager keep a duplicate of fd. When it returns nil the
// descriptor is safe. A name that is stored again has both descriptors until it
// is removed. One open file is kept once, whatever its names.
func (s *Store) Store(name string, fd int) error {
	if err := cmp.Or(checkName(name), s.count(name)); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	if err := s.sendAndWait(storeMessage(name), fd); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.addr != nil {
		s.kept[name]++
	}
	return nil
}

// count fails where the keeper would drop one more descriptor silently.
func (s *Store) count(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, k := range s.kept {
		n += k
	}
	if s.limit > 0 && n >= s.limit && s.kept[name] == 0 {
		return fmt.Errorf("the service manager keeps no more than %d descriptors: %w", s.limit, unix.EXFULL)
	}
	return nil
}

// Remove has the service manager close what it keeps by the name. Nothing by
// that name is no error.
func (s *Store) Remove(name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	if err := s.sendAndWait(removeMessage(name)); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.kept, name)
	return nil
}

// Names are the names of all that the service manager keeps, sorted.
func (s *Store) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.kept))
	for name := range s.kept {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Ready says that this process serves.
func (s *Store) Ready() error { return s.say(messageReady) }

// Stopping says that this process is about to end by its own decision.
func (s *Store) Stopping() error { return s.say(messageStopping) }

// Status describes the state of this process to people in a line.
func (s *Store) Status(text string) error {
	text = oneLine(text)
	return s.say("STATUS=" + text[:min(len(text), maxMessage-64)])
}

// Watchdog is the time within which the service manager wants [Store.Alive] to
// be called again and again; 0 if it does not.
func (s *Store) Watchdog() time.Duration { return s.watchdog }

// Alive says that this process does not hang.
func (s *Store) Alive() error { return s.say(messageWatchdog) }

func (s *Store) say(text string) error {
	if err := s.send(text); err != nil {
		what, _, _ := strings.Cut(text, "=")
		return fmt.Errorf("notify %s: %w", what, err)
	}
	return nil
}

// Upgrade names the program that the next start of this process is to use,
// which is whenever this one ends, by itself or not. [Supervise] alone knows it.
func (s *Store) Upgrade(path string) error {
	if !s.supervised || s.addr == nil {
		return fmt.Errorf("upgrade to %s: %w: not under reprise supervise", path, errors.ErrUnsupported)
	}
	if !filepath.IsAbs(path) || strings.ContainsAny(path, "\n\x00") {
		return fmt.Errorf("upgrade to %q: not an absolute path", path)
	}
	if err := s.sendAndWait(assignmentExec + path); err != nil {
		return fmt.Errorf("upgrade to %s: %w", path, err)
	}
	return nil
}

// IDs are those of the descriptors that were handed over and not taken yet,
// sorted. A descriptor whose name has no dot has its name for an ID.
func (s *Store) IDs() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for _, d := range s.fds {
		if id, _ := split(d.name); !listens(d.fd) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// Take hands over the descriptors of one ID, by role. They are the caller's to
// close; the service manager keeps its own. Of two by one name it is the newer,
// as far as the service manager keeps them in order; the other is closed.
func (s *Store) Take(id string) map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := make(map[string]int)
	s.fds = slices.DeleteFunc(s.fds, func(d inherited) bool {
		is, role := split(d.name)
		if is != id || listens(d.fd) {
			return false
		}
		if _, ok := taken[role]; ok {
			unix.Close(d.fd)
		} else {
			taken[role] = d.fd
		}
		return true
	})
	return taken
}

// split takes a descriptor's name apart.
func split(name string) (id, role string) {
	if i := strings.LastIndexByte(name, '.'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return name, ""
}

// Listener is a listening socket that was handed over.
type Listener struct {
	// Name is that of the unit, FileDescriptorName=, or of SuperviseOptions.Files.
	Name string
	net.Listener
}

// Listeners are the listening sockets that were handed over, in their order.
// They are the caller's to close. A second call returns none.
func (s *Store) Listeners() ([]Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []Listener
	var failed error
	s.fds = slices.DeleteFunc(s.fds, func(d inherited) bool {
		if !listens(d.fd) {
			return false
		}
		f := os.NewFile(uintptr(d.fd), d.name)
		l, err := net.FileListener(f)
		_ = f.Close()
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("listener %s: %w", d.name, err))
			return true
		}
		found = append(found, Listener{Name: d.name, Listener: l})
		return true
	})
	return found, failed
}

// Close closes the descriptors that were handed over and not taken. The service
// manager keeps its own.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.fds {
		unix.Close(d.fd)
	}
	s.fds = nil
	return nil
}

// send sends one message. Each has its own connection: a service manager that
// was restarted in between is found again.
func (s *Store) send(text string, fds ...int) error {
	if s.addr == nil {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, s.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	werr := raw.Write(func(fd uintptr) bool {
		for {
			err = unix.Sendmsg(int(fd), []byte(text), rights, nil, unix.MSG_NOSIGNAL)
			if !errors.Is(err, unix.EINTR) {
				return !errors.Is(err, unix.EAGAIN)
			}
		}
	})
	return cmp.Or(werr, err)
}

// sendAndWait sends one message and waits until it has been acted upon.
func (s *Store) sendAndWait(text string, fds ...int) error {
	if s.addr == nil {
		return nil
	}
	if err := s.send(text, fds...); err != nil {
		return err
	}
	return s.barrier()
}

// barrier waits until all messages before it have been acted upon. The service
// manager says so by closing the descriptor that comes with it.
func (s *Store) barrier() error {
	var pair [2]int
	if err := unix.Pipe2(pair[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("barrier: pipe: %w", err)
	}
	r := os.NewFile(uintptr(pair[0]), "barrier")
	defer r.Close()
	err := s.send(messageBarrier, pair[1])
	unix.Close(pair[1])
	if err != nil {
		return fmt.Errorf("barrier: %w", err)
	}
	if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return fmt.Errorf("barrier: %w", err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		return fmt.Errorf("barrier: no answer from the service manager: %w", err)
	}
	return s.alive()
}

// alive tells an answer from the end of the service manager, which closes the
// barrier's descriptor as well.
func (s *Store) alive() error {
	conn, err := net.DialUnix("unixgram", nil, s.addr)
	if err != nil {
		return fmt.Errorf("the service manager is gone: %w", err)
	}
	return conn.Close()
}
