package keeper

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fakeProcess ends when a test says so, or as its signals make it.
type fakeProcess struct {
	program string
	at      time.Duration // since the start of the test
	lost    chan struct{}
	ended   chan struct{}

	mu      sync.Mutex // guards what follows
	status  unix.WaitStatus
	peeked  bool
	deaf    bool // to all but SIGKILL
	undead  bool // SIGKILL does not end it
	signals []unix.Signal
}

func exited(code int) unix.WaitStatus { return unix.WaitStatus(code << 8) }

func (p *fakeProcess) end(status unix.WaitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = status
	close(p.ended)
}

func (p *fakeProcess) signal(sig unix.Signal) {
	p.mu.Lock()
	p.signals = append(p.signals, sig)
	dies := !p.undead && (!p.deaf || sig == unix.SIGKILL)
	p.mu.Unlock()
	select {
	case <-p.ended:
	default:
		if dies {
			p.end(unix.WaitStatus(sig))
		}
	}
}

func (p *fakeProcess) heard() []unix.Signal {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.signals
}

// world is a supervisor of fake processes.
type world struct {
	s       *supervisor
	begin   time.Time
	started chan *fakeProcess
	done    chan error
	signals chan os.Signal
}

// inWorld runs a test in a bubble with a clock of its own.
func inWorld(t *testing.T, o Options, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		o.Command = []string{"old"}
		o.Log = slog.New(slog.DiscardHandler)
		w := &world{begin: time.Now(), started: make(chan *fakeProcess), done: make(chan error, 1), signals: make(chan os.Signal)}
		o.Signals = w.signals
		filled, err := o.fill()
		require.NoError(t, err)
		w.s = &supervisor{
			o: filled, stdio: [3]int{-1, -1, -1}, mounts: -1, poke: make(chan struct{}, 1), shelf: &shelf{top: 500, most: 8},
			launch: w.launch,
			open:   func(name string) (*executable, error) { return &executable{path: name, fd: -1, script: true}, nil },
		}
		w.s.good, _ = w.s.open("old")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			defer close(w.done)
			err := w.s.run(ctx)
			w.s.close()
			w.done <- err
		}()
		test(t, w)
	})
}

func (w *world) launch(p program) (*process, error) {
	f := &fakeProcess{program: p.path, at: time.Since(w.begin), lost: make(chan struct{}), ended: make(chan struct{})}
	go func() { w.started <- f }()
	return &process{
		pid: 1 << 30, lost: f.lost, ended: f.ended, signal: f.signal, forget: func() {},
		status: func() unix.WaitStatus { return f.status },
		peek:   func() (unix.WaitStatus, bool) { return f.status, f.peeked },
	}, nil
}

// note is a message of the running child.
func (w *world) note(m message) {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.note(m, true)
}

func TestBackoff(t *testing.T) {
	inWorld(t, Options{}, func(t *testing.T, w *world) {
		var pauses []time.Duration
		p := <-w.started
		for range 12 {
			ended := time.Since(w.begin)
			p.end(exited(1))
			p = <-w.started
			pauses = append(pauses, p.at-ended)
		}
		require.Equal(t, []time.Duration{
			10 * time.Millisecond, 20 * time.Millisecond, 40 * time.Millisecond, 80 * time.Millisecond,
			160 * time.Millisecond, 320 * time.Millisecond, 640 * time.Millisecond, 1280 * time.Millisecond,
			2560 * time.Millisecond, 5 * time.Second, 5 * time.Second, 5 * time.Second,
		}, pauses)

		// Killed: at once, however often.
		for range 100 {
			ended := time.Since(w.begin)
			p.end(unix.WaitStatus(unix.SIGKILL))
			p = <-w.started
			require.Equal(t, ended, p.at)
		}
		// A crash is still one of the row ...
		ended := time.Since(w.begin)
		p.end(unix.WaitStatus(unix.SIGSEGV))
		p = <-w.started
		require.Equal(t, ended+5*time.Second, p.at)
		// ... until one has lived long.
		time.Sleep(longEnough)
		ended = time.Since(w.begin)
		p.end(exited(2))
		p = <-w.started
		require.Equal(t, ended+10*time.Millisecond, p.at)
		p.end(exited(0))
		require.NoError(t, <-w.done)
	})
}

func TestStopWhilePausing(t *testing.T) {
	inWorld(t, Options{}, func(t *testing.T, w *world) {
		p := <-w.started
		p.end(exited(7))
		synctest.Wait()
		w.signals <- unix.SIGHUP // is for a child, of which there is none
		w.signals <- unix.SIGTERM
		var exit *ExitError
		require.ErrorAs(t, <-w.done, &exit)
		require.Equal(t, 7, exit.Status)
	})
}

func TestDeadButNotGone(t *testing.T) {
	inWorld(t, Options{}, func(t *testing.T, w *world) {
		p := <-w.started
		p.undead = true
		close(p.lost)
		q := <-w.started
		require.Equal(t, farewell, q.at)
		require.Equal(t, []unix.Signal{unix.SIGKILL}, p.heard(), "it might live")
		p.end(unix.WaitStatus(unix.SIGKILL)) // gone at last: nothing happens
		synctest.Wait()

		// What the kernel knows of its end counts: it was no kill.
		q.undead, q.peeked, q.status = true, true, exited(0)
		close(q.lost)
		synctest.Wait()
		begin := time.Now()
		require.NoError(t, <-w.done)
		require.Equal(t, farewell+corpseTime, time.Since(begin))
	})
}

func TestLostThenGone(t *testing.T) {
	inWorld(t, Options{}, func(t *testing.T, w *world) {
		p := <-w.started
		close(p.lost)
		time.Sleep(farewell / 2)
		p.end(exited(0))
		require.NoError(t, <-w.done)
	})
}

func TestUpgradeIsNotReady(t *testing.T) {
	inWorld(t, Options{ReadyTimeout: time.Minute}, func(t *testing.T, w *world) {
		p := <-w.started
		w.note(message{exec: "new"})
		p.end(unix.WaitStatus(unix.SIGKILL))
		p = <-w.started
		require.Equal(t, "new", p.program)
		p = <-w.started
		require.Equal(t, "old", p.program)
		require.Equal(t, time.Minute, p.at)

		w.note(message{exec: "new"})
		w.note(message{exec: "newer"})
		p.end(exited(0))
		p = <-w.started
		require.Equal(t, "newer", p.program)
		w.note(message{ready: true})
		time.Sleep(time.Hour) // is ready: nobody minds
		p.end(unix.WaitStatus(unix.SIGKILL))
		p = <-w.started
		require.Equal(t, "newer", p.program)
		p.end(exited(0))
		require.NoError(t, <-w.done)
	})
}

func TestStopTimeout(t *testing.T) {
	inWorld(t, Options{}, func(t *testing.T, w *world) {
		p := <-w.started
		p.deaf = true
		w.signals <- unix.SIGTERM
		var exit *ExitError
		require.ErrorAs(t, <-w.done, &exit)
		require.Equal(t, 128+9, exit.Status)
		require.Equal(t, defaultStopTimeout, time.Since(w.begin))
		require.Equal(t, []unix.Signal{unix.SIGTERM, unix.SIGKILL}, p.heard())
	})
}

func TestWatchdogClock(t *testing.T) {
	inWorld(t, Options{Watchdog: time.Minute}, func(t *testing.T, w *world) {
		p := <-w.started
		p.deaf = true
		time.Sleep(time.Hour) // not ready yet: nobody minds
		w.note(message{ready: true})
		for range 100 {
			time.Sleep(50 * time.Second)
			w.note(message{watchdog: "1"})
		}
		fed := time.Since(w.begin)
		q := <-w.started
		require.Equal(t, fed+time.Minute+abortTime, q.at)
		require.Equal(t, []unix.Signal{unix.SIGABRT, unix.SIGKILL}, p.heard())
		w.note(message{watchdog: "trigger"})
		p = <-w.started
		require.Equal(t, []unix.Signal{unix.SIGABRT}, q.heard())
		require.Equal(t, q.at, p.at)
		p.end(exited(0))
		require.NoError(t, <-w.done)
	})
}

func TestOnReady(t *testing.T) {
	ready := 0
	inWorld(t, Options{OnReady: func(int) { ready++ }}, func(t *testing.T, w *world) {
		p := <-w.started
		w.note(message{ready: true})
		synctest.Wait()
		w.note(message{ready: true})
		synctest.Wait()
		require.Equal(t, 1, ready)
		p.end(unix.WaitStatus(unix.SIGKILL))
		p = <-w.started
		w.note(message{ready: true})
		synctest.Wait()
		require.Equal(t, 2, ready)
		p.end(exited(0))
		require.NoError(t, <-w.done)
	})
}
