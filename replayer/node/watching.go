package node

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/recorder/probe"
)

// A watching is the probe of one recording. A nil one watches nothing.
type watching struct {
	begun  time.Time
	loaded chan struct{} // closed: p is known
	done   chan struct{} // closed: no listen is heard of any more

	p       *probe.Probe // nil if there is none
	missing []string     // after loaded

	mu    sync.Mutex // guards the following
	c     *container.Container
	ns    uint64         // its mount namespace
	early []probe.Listen // heard before there was a container
}

// maxEarly bounds what is heard while the container is being started.
const maxEarly = 1 << 10

// startWatching loads the probe, beside the opening of the image: it takes some
// tens of milliseconds. Nothing is mounted before it is there.
func startWatching() *watching {
	w := &watching{begun: time.Now(), loaded: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		p, err := probe.Start(&probe.Options{Listen: true, Start: w.begun})
		if err != nil {
			w.missing = append(w.missing, notNamed(err))
			close(w.loaded)
			return
		}
		w.p = p
		close(w.loaded)
		for l := range p.Listens() {
			w.heard(l)
		}
	}()
	return w
}

// isThere waits for the probe, and tells whether there is one.
func (w *watching) isThere() bool {
	if w == nil {
		return false
	}
	<-w.loaded
	return w.p != nil
}

func notNamed(err error) string { return "processes are not named: " + err.Error() }

// attached says which device to watch, before anything is mounted of it.
func (w *watching) attached(path string) {
	if !w.isThere() {
		return
	}
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK:
		err = w.p.AddDevice(st.Rdev)
	case err == nil:
		err = errors.New("the image is mounted without a block device: choose another --transport")
	}
	if err != nil {
		w.missing = append(w.missing, notNamed(err))
	}
}

// started says which container it is about.
func (w *watching) started(c *container.Container) {
	if !w.isThere() {
		return
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", c.Pid()), &st); err != nil {
		return // it has ended, or cannot be seen: then it is polled
	}
	c.Told()
	w.mu.Lock()
	w.c, w.ns = c, st.Ino
	early := w.early
	w.early = nil
	w.mu.Unlock()
	for _, l := range early {
		w.heard(l)
	}
}

func (w *watching) heard(l probe.Listen) {
	w.mu.Lock()
	c, ns := w.c, w.ns
	if c == nil && len(w.early) < maxEarly {
		w.early = append(w.early, l)
	}
	w.mu.Unlock()
	if c != nil && l.MountNS == ns {
		c.Listens(int(l.Addr.Port()), w.begun.Add(l.At))
	}
}

// end ends watching and hands over what was seen, with times since zero.
func (w *watching) end(out *Recording, zero time.Time) {
	if w == nil {
		return
	}
	there := w.isThere()
	out.Missing = append(out.Missing, w.missing...)
	if !there {
		return
	}
	if err := w.p.Close(); err != nil {
		out.Missing = append(out.Missing, "eBPF: "+err.Error())
	}
	<-w.done
	out.reads = w.p.Reads()
	for i := range out.reads {
		out.reads[i].At += w.begun.Sub(zero)
	}
	if s := w.p.Stats(); s.Lost > 0 {
		out.Missing = append(out.Missing, fmt.Sprintf("eBPF: %d of %d events were lost", s.Lost, s.Reads+s.Lost))
	}
}
