package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A layer is mounted and written by a process of its own, which is this
// program started again under the name childName. Were it a thread of the
// process that also serves the device, then a kill could leave that thread
// waiting in the kernel for a write that nobody serves any more, and the
// process with it. This way the death of the server makes every write fail,
// and the death of the child closes the mount.
const childName = "reprise-apply-layer"

// A task is what the child is told, as JSON in its first argument. The layer,
// still compressed, is its standard input.
type task struct {
	Device string `json:"device"`
	First  bool   `json:"first"` // the file system is new
}

// A report is what the child answers, as JSON on its standard output.
type report struct {
	DiffID  digest.Digest `json:"diffID"`
	Applied applied       `json:"applied"`
	Error   string        `json:"error,omitempty"`
	NotRoot bool          `json:"notRoot,omitempty"`
}

func init() {
	if len(os.Args) == 2 && os.Args[0] == childName {
		os.Exit(childMain(os.Args[1]))
	}
}

func childMain(arg string) int {
	var t task
	if err := json.Unmarshal([]byte(arg), &t); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	unix.Umask(0)
	// For what is removed; see hold. Where it is refused, less is held.
	const files = 1 << 17
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files})
	r, err := runTask(t, os.Stdin)
	if err != nil {
		r.Error, r.NotRoot = err.Error(), errors.Is(err, errNotRoot)
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return 1
	}
	return 0
}

func runTask(t task, layer io.Reader) (r report, err error) {
	// One thread and one processor: ext4 keeps an allocation cursor a
	// processor, so a thread that moves scatters small files.
	runtime.LockOSThread()
	pin()
	m, err := mountExt4(t.Device)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if t.First {
		if err := resetTimes(m.fd); err != nil {
			return r, err
		}
	}
	u := newUnpacker(layer)
	defer u.Close()
	if r.Applied, err = applyTar(context.Background(), m.fd, u); err != nil {
		return r, err
	}
	if r.DiffID, err = u.finish(); err != nil {
		return r, fmt.Errorf("read layer: %w", err)
	}
	return r, m.sync()
}

// pin keeps the calling thread on the last processor that it may use.
func pin() {
	var allowed, one unix.CPUSet
	if unix.SchedGetaffinity(0, &allowed) != nil {
		return
	}
	for cpu := len(allowed)*64 - 1; cpu >= 0; cpu-- {
		if allowed.IsSet(cpu) {
			one.Set(cpu)
			_ = unix.SchedSetaffinity(0, &one) // only costs reproducibility
			return
		}
	}
}

// resetTimes sets the times of what mkfs made to 0, as the reference has them.
func resetTimes(root int) error {
	var zero [2]unix.Timespec
	for _, name := range []string{"lost+found", "."} {
		if err := unix.UtimesNanoAt(root, name, zero[:], unix.AT_SYMLINK_NOFOLLOW); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("set times of /%s: %w", name, err)
		}
	}
	return nil
}

// runChild lets a child do t with the layer in: a file, or a spool, whose own
// error is returned in preference to what the child makes of it.
func runChild(ctx context.Context, t task, in io.Reader) (r report, err error) {
	runtime.LockOSThread() // see childCommand
	defer runtime.UnlockOSThread()
	arg, err := json.Marshal(t)
	if err != nil {
		return r, err
	}
	var out, said bytes.Buffer
	cmd := childCommand(ctx, "/proc/self/exe", string(arg))
	cmd.Args[0] = childName
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := runFed(cmd, in); err != nil || out.Len() == 0 {
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		if out.Len() == 0 {
			return r, fmt.Errorf("apply layer: child process: %w %s", errors.Join(err, io.ErrUnexpectedEOF), strings.TrimSpace(said.String()))
		}
		return r, err
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return r, fmt.Errorf("apply layer: child process: %w", err)
	}
	switch {
	case r.NotRoot:
		return r, errNotRoot
	case r.Error != "":
		return r, errors.New(r.Error)
	}
	return r, nil
}

// runFed runs cmd with in as its standard input. The error is in's own.
func runFed(cmd *exec.Cmd, in io.Reader) error {
	s, ok := in.(*spool)
	if !ok {
		cmd.Stdin = in
		return cmd.Run()
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.Stdin = r
	err = cmd.Start()
	r.Close()
	if err != nil {
		w.Close()
		return err
	}
	_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	src := &errReader{r: s}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(w, src) // the child, gone, is no error here
		w.Close()
	}()
	err = cmd.Wait()
	s.stop()
	<-copied
	if src.err != nil && !errors.Is(src.err, os.ErrClosed) {
		return src.err
	}
	return err
}

// childCommand prepares a program that dies with this process. The caller's
// goroutine must stay on its thread until the program has ended: the kernel
// watches the thread that started it.
func childCommand(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// An errReader remembers how its reader failed.
type errReader struct {
	r   io.Reader
	err error
}

func (e *errReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		e.err = err
	}
	return n, err
}
