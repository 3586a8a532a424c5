package node

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A table tells when the mount table of this process changes.
type table struct {
	mu   sync.Mutex // guards what follows
	subs map[any]chan struct{}
	stop *os.File // closing it ends the goroutine; nil while there is none
	wg   sync.WaitGroup
}

// subscribe returns a channel that gets something after each change, under a
// key of the subscriber's.
func (t *table) subscribe(key any) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.subs == nil {
		t.subs = map[any]chan struct{}{}
	}
	ch := make(chan struct{}, 1)
	t.subs[key] = ch
	if t.stop == nil {
		t.start()
	}
	return ch
}

// unsubscribe ends it. Without subscribers nobody looks at the table.
func (t *table) unsubscribe(key any) {
	t.mu.Lock()
	delete(t.subs, key)
	var stop *os.File
	if len(t.subs) == 0 {
		stop, t.stop = t.stop, nil
	}
	t.mu.Unlock()
	if stop != nil {
		_ = stop.Close()
	}
}

// start begins to look. Where it cannot, subscribers have their own timers.
func (t *table) start() {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return
	}
	r, w, err := os.Pipe()
	if err != nil {
		_ = f.Close()
		return
	}
	t.stop = w
	t.wg.Go(func() {
		defer f.Close()
		defer r.Close()
		t.look(int32(f.Fd()), int32(r.Fd()))
	})
}

// look waits for changes until the other end of the pipe is closed. The kernel
// signals a change as an exception (proc_pid_mountinfo(5)).
func (t *table) look(mounts, stop int32) {
	for {
		fds := []unix.PollFd{{Fd: mounts, Events: unix.POLLPRI}, {Fd: stop, Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents != 0 {
			t.changed()
		}
	}
}

func (t *table) changed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ch := range t.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// wait returns when nobody looks any more.
func (t *table) wait() { t.wg.Wait() }
