package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options say where a container's streams go. nil is fine.
type Options struct {
	// Stdin is the container's standard input. Default: /dev/null.
	Stdin *os.File
	// Stdout and Stderr get what the container writes. Default: nowhere.
	Stdout, Stderr io.Writer
}

// endGrace is how long Close lets a stage kill and unmount before it kills the
// stage, and how long it waits for the end after that.
const endGrace = 10 * time.Second

var errNoRunc = errors.New("runc: not found in PATH: install the package runc")

// Stage is the child process that runs one container. Close it.
type Stage struct {
	conn   *net.UnixConn
	proc   *os.Process
	stdin  ownership
	stderr tail // what the stage itself says: why it died
	logs   [2]*logWatch

	askOnce  sync.Once
	up       chan struct{} // closed: the stage is ready
	settled  chan struct{} // closed: the container has started, or will not
	exited   chan struct{} // closed: the container has ended and its output is through, or the stage is gone
	gone     chan struct{} // closed: the stage is gone, nothing of it is left
	waited   chan struct{} // closed: the process has been waited for
	waitErr  error         // of the stage; after waited
	silent   chan struct{} // closed: all of the stage's own words are in stderr
	output   sync.WaitGroup
	sendMu   sync.Mutex // guards sending on conn, nextExec
	nextExec int

	mu      sync.Mutex // guards what follows
	times   Timeline
	pid     int      // of the container's first process, in the stage's namespace
	pidfd   *os.File // of the same; nil before the start and after Close
	started bool
	failure error // why the container did not start, or its status is not known
	ended   bool  // status is known
	status  int
	execs   map[int]chan report
}

// NewStage starts a stage and returns at once; Start waits until it is ready.
// A ctx that has ended starts nothing; it has no influence after that.
//
// It needs root, runc, and that main has called Init.
func NewStage(ctx context.Context, o *Options) (*Stage, error) {
	if o == nil {
		o = &Options{}
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start stage: %w", err)
	}
	if !initialized {
		return nil, errors.New("start stage: main does not call container.Init")
	}
	if _, err := exec.LookPath("runc"); err != nil {
		return nil, errNoRunc
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("start stage: %w: containers need root: use sudo", os.ErrPermission)
	}
	s := &Stage{
		up: make(chan struct{}), settled: make(chan struct{}), exited: make(chan struct{}),
		gone: make(chan struct{}), waited: make(chan struct{}), silent: make(chan struct{}), execs: map[int]chan report{},
		times: Timeline{Launched: time.Now()},
	}
	if err := s.launch(o); err != nil {
		return nil, fmt.Errorf("start stage: %w", err)
	}
	return s, nil
}

// launch makes the stage's descriptors and the process, and the goroutines that
// end with it.
func (s *Stage) launch(o *Options) (err error) {
	var ours, theirs []*os.File
	defer func() {
		closeAll(theirs)
		if err != nil {
			closeAll(ours)
		}
	}()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket pair: %w", err)
	}
	socket := os.NewFile(uintptr(pair[0]), "stage")
	defer socket.Close()
	theirs = append(theirs, os.NewFile(uintptr(pair[1]), "stage"))
	for range 3 { // the stage's own words, then the container's output
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("pipe: %w", err)
		}
		ours, theirs = append(ours, r), append(theirs, w)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	theirs = append(theirs, null)
	stdin := null
	if o.Stdin != nil {
		stdin = o.Stdin
		s.stdin.save(stdin)
	}
	conn, err := net.FileConn(socket)
	if err != nil {
		return fmt.Errorf("socket pair: %w", err)
	}
	s.conn = conn.(*net.UnixConn)
	cmd := stageCommand(null, theirs[1], theirs[0], stdin, theirs[2], theirs[3])
	if err := s.spawn(cmd); err != nil {
		_ = s.conn.Close()
		return err
	}
	go s.listen(ours[0])
	s.logs[0], s.logs[1] = s.pump(ours[1], o.Stdout, nil), s.pump(ours[2], o.Stderr, s.settled)
	go s.follow()
	return nil
}

// stageCommand executes this program as a stage: what it says itself goes to
// said, and extra are its descriptors from fdConn on.
func stageCommand(null, said *os.File, extra ...*os.File) *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{stageName}, Env: os.Environ(), Dir: "/",
		Stdin: null, Stdout: said, Stderr: said, ExtraFiles: extra,
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
			Pdeathsig:  syscall.SIGKILL,
			Setsid:     true, // a terminal's Ctrl-C is for the program to pass on
		},
	}
}

// spawn starts the process and waits for it on a thread of its own: the death
// signal is sent when the parent's *thread* ends, so the thread must last as
// long as the stage.
func (s *Stage) spawn(cmd *exec.Cmd) error {
	begun := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		begun <- err
		if err == nil {
			s.waitErr = cmd.Wait()
			close(s.waited)
		}
	}()
	err := <-begun
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("new mount and PID namespaces: %w: needs root with CAP_SYS_ADMIN", err)
	}
	s.proc = cmd.Process
	return err
}

// pump copies a stream until its writers are gone. What is read before hold is
// closed waits for it, and is dropped if the container did not start: it is
// runc's message, which the error repeats.
func (s *Stage) pump(r *os.File, w io.Writer, hold <-chan struct{}) *logWatch {
	watch := new(logWatch)
	s.output.Add(1)
	go func() {
		defer s.output.Done()
		defer r.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			watch.line(buf[:n])
			if n > 0 && hold != nil {
				<-hold
				if hold = nil; !s.hasStarted() {
					w = nil
				}
			}
			if n > 0 && w != nil {
				if _, werr := w.Write(buf[:n]); werr != nil {
					w = nil // go on reading: the container must not block
				}
			}
			if err != nil {
				watch.end()
				return
			}
		}
	}()
	return watch
}

// listen keeps what the stage itself writes.
func (s *Stage) listen(r *os.File) {
	_, _ = io.Copy(&s.stderr, r)
	_ = r.Close()
	close(s.silent)
}

func (s *Stage) hasStarted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.started
}

// follow takes the stage's reports until the stage is gone.
func (s *Stage) follow() {
	buf := make([]byte, maxMessage)
	for {
		var r report
		files, err := receive(s.conn, buf, &r)
		if err != nil {
			break
		}
		s.note(r, files)
	}
	<-s.waited
	<-s.silent
	s.finish()
}

// finish settles what is still open when the stage's process has ended.
func (s *Stage) finish() {
	s.mu.Lock()
	ended := s.ended
	if !ended && s.failure == nil {
		s.failure = s.death()
	}
	for id, ch := range s.execs {
		delete(s.execs, id)
		close(ch)
	}
	s.mu.Unlock()
	closeOnce(s.settled)
	if !ended {
		s.drain()
	}
	<-s.exited
	s.stdin.restore()
	close(s.gone)
}

// drain tells of the container's end once all it wrote has been passed on.
func (s *Stage) drain() {
	s.output.Wait()
	close(s.exited)
}

// death says why a stage ended before its container.
func (s *Stage) death() error {
	why := "closed"
	if s.waitErr != nil {
		why = s.waitErr.Error()
	}
	if said := strings.TrimSpace(s.stderr.String()); said != "" {
		why = said
	}
	return errors.New("stage ended: " + why)
}

// closeOnce closes a channel that only follow's goroutine closes.
func closeOnce(ch chan struct{}) {
	select {
	case <-ch:
	default:
		close(ch)
	}
}

// note takes in one report.
func (s *Stage) note(r report, files []*os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := moment(r.At)
	switch r.Event {
	case evReady:
		s.times.StageReady = at
		close(s.up)
	case evMounted:
		s.times.Mounted = at
	case evRunc:
		s.times.RuncStarted = at
	case evStarted:
		s.times.ProcessStarted = at
		if len(files) == 1 {
			s.started, s.pid, s.pidfd = true, r.Pid, files[0]
			files = nil
		}
		closeOnce(s.settled)
	case evFailed:
		s.failure = &StartError{Status: r.Status, Err: errors.New(r.Text)}
		closeOnce(s.settled)
	case evExited:
		s.times.Exited = at
		s.ended, s.status = true, r.Status
		go s.drain()
	case evExec:
		if ch, ok := s.execs[r.ID]; ok {
			delete(s.execs, r.ID)
			ch <- r // has room
		}
	}
	closeAll(files)
}
