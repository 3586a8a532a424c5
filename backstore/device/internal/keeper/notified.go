package keeper

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// drain acts upon all notifications that have arrived.
func (s *supervisor) drain(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		r, err := s.sock.receive(fd)
		switch {
		case err == nil:
			s.handle(r)
		case !errors.Is(err, unix.EINTR): // EAGAIN, or closed
			return
		}
	}
}

// handle acts upon one notification and closes what it came with, unless it is
// to be kept.
func (s *supervisor) handle(r received) {
	defer func() { closeFDs(r.fds) }()
	p := s.child.p
	if p == nil || r.pid <= 0 || !descends(r.pid, p.pid) {
		s.o.Log.Debug("notification of a stranger", "pid", r.pid)
		return
	}
	m, err := parseMessage(r.text)
	if err == nil {
		err = r.bad
	}
	if err != nil {
		s.o.Log.Warn("notification is ignored", "pid", r.pid, "err", err)
		return
	}
	if m.barrier { // its descriptor is closed: that is the answer
		if len(r.fds) != 1 {
			s.o.Log.Warn("BARRIER=1 without exactly one descriptor", "pid", r.pid)
		}
		return
	}
	if m.remove && m.name != "" {
		s.shelf.remove(m.name)
	}
	if m.store {
		s.keep(m.name, r.fds)
		r.fds = nil
	}
	s.note(m, r.pid == p.pid)
}

// keep takes descriptors over.
func (s *supervisor) keep(name string, fds []int) {
	if name == "" {
		name = anonymousName
	}
	for _, fd := range fds {
		if err := s.shelf.put(name, fd); err != nil {
			s.o.Log.Error("a descriptor is not kept", "err", err)
		}
	}
}

// note takes in what the child says of itself. Its own children may not choose
// what is started next.
func (s *supervisor) note(m message, self bool) {
	c := &s.child
	if m.ready && !c.ready {
		c.ready, c.fed = true, time.Now()
		if c.trial != nil {
			s.o.Log.Info("upgrade: done", "program", c.trial.path)
			s.good.close()
			s.good, c.trial = c.trial, nil
		}
	}
	switch m.watchdog {
	case "1":
		c.fed = time.Now()
	case "trigger":
		c.trigger = true
	}
	if m.status != "" || m.stopping {
		s.o.Log.Debug("the child says", "status", m.status, "stopping", m.stopping)
	}
	if m.exec != "" && self {
		s.upgrade(m.exec)
	}
	if m.ready || c.trigger {
		select {
		case s.poke <- struct{}{}:
		default:
		}
	}
}

// upgrade opens the program that the next start is to use: what the path names
// now, not what it may name then.
func (s *supervisor) upgrade(path string) {
	b, err := s.open(path)
	if err != nil {
		s.o.Log.Error("upgrade: the new program is ignored", "err", err)
		return
	}
	s.next.close()
	s.next = b
}

// trial reports whether the child is an upgrade's.
func (s *supervisor) trial() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.child.trial != nil
}

// news is what the child has said of itself, and whether being ready is new.
func (s *supervisor) news() (ready, news, trigger bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &s.child
	news = c.ready && !c.notified
	c.notified = c.ready
	return c.ready, news, c.trigger
}

// silence is how long the child has not fed the watchdog.
func (s *supervisor) silence() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.child.fed)
}
