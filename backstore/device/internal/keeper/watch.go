package keeper

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watch looks after one child until it is gone.
type watch struct {
	s    *supervisor
	p    *process
	ours bool // the keeper has killed it

	// nil while they have no meaning
	ready *time.Timer // for an upgrade's program
	last  *time.Timer // for one that was aborted
	stop  *time.Timer
	dog   *time.Timer
}

// run returns how the child ended.
func (w *watch) run() ending {
	if w.s.trial() {
		w.ready = time.NewTimer(w.s.o.ReadyTimeout)
	}
	for {
		select {
		case <-w.p.ended:
			return ending{status: w.p.status(), ours: w.ours}
		case <-w.p.lost:
			return w.lost()
		case <-w.s.quit:
			w.s.quit = nil
			w.ask(unix.SIGTERM)
		case sig := <-w.s.o.Signals:
			w.pass(sig)
		case <-w.s.poke:
			w.look()
		case <-expired(w.ready):
			w.s.o.Log.Warn("the new program is not ready in time", "pid", w.p.pid, "after", w.s.o.ReadyTimeout)
			w.kill()
		case <-expired(w.last):
			w.kill()
		case <-expired(w.stop):
			w.s.o.Log.Warn("the child does not end in time: killing it", "pid", w.p.pid, "after", w.s.o.StopTimeout)
			w.p.signal(unix.SIGKILL)
		case <-expired(w.dog):
			w.bark()
		}
	}
}

func expired(t *time.Timer) <-chan time.Time {
	if t == nil {
		return nil
	}
	return t.C
}

func (w *watch) stopTimers() {
	for _, t := range []*time.Timer{w.ready, w.last, w.stop, w.dog} {
		if t != nil {
			t.Stop()
		}
	}
}

// farewell is how long a process may take from releasing its descriptors to
// being gone before the next one is started beside it.
const farewell = 10 * time.Millisecond

// lost is called when the child's descriptor table is gone. Usually the rest
// follows at once. If not, the kernel already knows how it ends.
func (w *watch) lost() ending {
	t := time.NewTimer(farewell)
	defer t.Stop()
	select {
	case <-w.p.ended:
		return ending{status: w.p.status(), ours: w.ours}
	case <-t.C:
	}
	status, known := w.p.peek()
	if !known {
		status = unix.WaitStatus(unix.SIGKILL)
	}
	w.p.signal(unix.SIGKILL) // also one that merely closed its lifeline
	w.s.o.Log.Warn("the child is dead but not gone: not waiting for it", "pid", w.p.pid)
	return ending{status: status, ours: w.ours}
}

// ask has the child end, the second time by force.
func (w *watch) ask(sig unix.Signal) {
	if w.s.asked {
		w.p.signal(unix.SIGKILL)
		return
	}
	w.s.asked = true
	w.p.signal(sig)
	w.stop = time.NewTimer(w.s.o.StopTimeout)
}

func (w *watch) pass(sig os.Signal) {
	n, ok := sig.(unix.Signal)
	switch {
	case !ok:
	case isStop(sig):
		w.ask(n)
	default:
		w.p.signal(n)
	}
}

// kill ends a child that is to be replaced.
func (w *watch) kill() {
	w.ours = true
	w.ready, w.last, w.dog = nil, nil, nil
	w.p.signal(unix.SIGKILL)
}

// look takes in what the child has said.
func (w *watch) look() {
	ready, news, trigger := w.s.news()
	if w.ours {
		return
	}
	if trigger {
		w.abort("it says so itself")
		return
	}
	if !ready {
		return
	}
	if w.ready != nil {
		w.ready.Stop()
		w.ready = nil
	}
	if news && w.s.o.OnReady != nil {
		w.s.o.OnReady(w.p.pid)
	}
	if w.dog == nil && w.s.o.Watchdog > 0 {
		w.dog = time.NewTimer(w.s.o.Watchdog)
	}
}

// bark looks whether the child has been silent for too long.
func (w *watch) bark() {
	if left := w.s.o.Watchdog - w.s.silence(); left > 0 {
		w.dog.Reset(left)
		return
	}
	w.abort("it is silent")
}

// abortTime is how long an aborted child may take to write down why.
const abortTime = 2 * time.Second

// abort ends a child that hangs so that it says where.
func (w *watch) abort(why string) {
	w.s.o.Log.Warn("the child hangs: aborting it", "pid", w.p.pid, "because", why)
	w.ours = true
	w.p.signal(unix.SIGABRT)
	w.ready, w.dog = nil, nil
	w.last = time.NewTimer(abortTime)
}
