// Package container starts a container from an image's configuration with
// runc, and tells when it is ready. It needs root and runc, no daemon.
//
// # Nouns
//
// A Stage is a child process, the program itself executed again, that is the
// first process of a new PID namespace and sits in a private mount namespace.
// It mounts the image, runs runc, and waits for the container. A program starts
// it early (NewStage), so that its start-up runs beside the work on the
// network, and tells it what to run when the image is known (Stage.Start). A
// Container is what runs in it; Ready says what makes it ready.
//
//	program ──socket── stage (PID 1, own mounts) ── runc run --detach
//	                     └ container (own PID, mount, IPC, UTS namespaces)
//
// # Clean-up
//
// The kernel cleans up, also after SIGKILL. The stage has a parent death
// signal, its end takes every process of its PID namespace along, and the last
// of them takes the mounts. All state of runc is on a tmpfs that only the stage
// sees. No cgroup is made: in the stage's namespace the cgroup hierarchies are
// read-only, and `runc --rootless=true` accepts that, on cgroup v1 and v2 alike;
// the container lives in the cgroup, and under the limits, of the program. The
// device rules that a cgroup would bring are replaced: nothing in the image's
// file system can be opened as a device (nodev), and the container lacks
// CAP_MKNOD.
//
// Only files below Config.StateDir outlive a killed program.
//
// # Use
//
// main, and TestMain, call Init before anything else. One Stage starts one
// container. Stage.Close, which every Stage needs, kills what still runs,
// unmounts, and returns when the image's device is free; the caller detaches
// the device after that. A program that itself serves the device must go on
// serving it until Close has returned, else the unmount has nobody to read from.
//
// All methods of Stage and Container are safe for concurrent use. The writers
// in Options are called from two goroutines, one for each stream.
package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Network says in which network namespace a container runs.
type Network string

const (
	// HostNetwork is the network namespace of the program. The container gets
	// copies of /etc/resolv.conf and /etc/hosts.
	HostNetwork Network = "host"
	// OwnNetwork is a new network namespace with nothing but a loopback device.
	OwnNetwork Network = "own"
)

// Mount is a bind mount of a file or directory into the container.
type Mount struct {
	Source   string // absolute; as it was mounted when the stage was made
	Target   string // absolute, in the container
	ReadOnly bool
}

// Rlimit is a resource limit, as in setrlimit(2).
type Rlimit struct {
	Type       string // "RLIMIT_NOFILE"
	Soft, Hard uint64
}

// Config says what to run, and on which file system.
type Config struct {
	// Image is the config part of the image's configuration.
	Image ocispec.ImageConfig

	// Args replace the image's Cmd.
	Args []string
	// Entrypoint, if not nil, replaces the image's Entrypoint and its Cmd.
	Entrypoint []string
	// Env entries, KEY=VALUE, replace those of the image with the same key.
	Env []string
	// Cwd, if set, replaces the image's WorkingDir.
	Cwd string
	// User, if set, replaces the image's User: name|uid[:group|gid].
	User string
	// StopSignal, if set, replaces the image's (default SIGTERM).
	StopSignal string

	// Network is the container's network. Default: HostNetwork.
	Network Network
	// Hostname of the container. Default: the host's name.
	Hostname string
	// Mounts are added to those that every container has.
	Mounts []Mount
	// Rlimits are set. Default: RLIMIT_NOFILE 1024, up to the program's own
	// hard limit.
	Rlimits []Rlimit
	// NoSeccomp leaves out the seccomp filter, for a runc built without it.
	NoSeccomp bool

	// Device is the block device that holds the image's file system, or a file
	// below /proc/PID/fd that EROFS can mount. It is mounted read-only. Exactly
	// one of Device and LowerDir is set.
	Device string
	// FSType is the type of the file system on Device. Default: ext4.
	FSType string
	// MountOptions are the options of that file system, as in mount -o.
	MountOptions string
	// LowerDir is a directory that holds the image's tree, instead of Device.
	// What is mounted below it is not part of it.
	LowerDir string
	// StateDir is where the container's writes go: an existing or new directory
	// of this container alone, on a file system that can be the upper one of an
	// overlay. The caller removes it. Default: a tmpfs, gone with the container.
	StateDir string

	// Ready says what WaitReady waits for.
	Ready Ready `json:"-"`
}

// Ready says what makes a container ready. At most one field is set; with none
// it is whichever comes first: the container listens on a TCP port, or it exits
// with status 0.
type Ready struct {
	// Port is a TCP port on which the container listens.
	Port int
	// Log matches a line of standard output or standard error.
	Log *regexp.Regexp
	// HTTP is a URL whose GET answers 2xx or 3xx. Its host is the loopback
	// address as the container sees it, or any address with HostNetwork.
	HTTP string
	// Exec is a command that exits 0 when run inside the container. It is
	// repeated, at a cost of some 30 ms of processor time each.
	Exec []string
	// Exit is the end of the container with status 0.
	Exit bool
}

// Timeline holds the moments of a start. A moment that has not come is zero.
type Timeline struct {
	Launched       time.Time // NewStage was called
	StageReady     time.Time // the stage waits for its instructions
	Requested      time.Time // Start was called
	Mounted        time.Time // the container's file system is mounted
	RuncStarted    time.Time // runc runs
	ProcessStarted time.Time // runc has started the container's process
	Exited         time.Time // the container's process has ended
}

// String gives each moment after Launched or, from Mounted on, after Requested.
func (t Timeline) String() string {
	since := func(a, b time.Time) string {
		if a.IsZero() || b.IsZero() {
			return "-"
		}
		return b.Sub(a).Round(10 * time.Microsecond).String()
	}
	return fmt.Sprintf("stage ready %s; after the request: mounted %s, runc started %s, process started %s, exited %s",
		since(t.Launched, t.StageReady), since(t.Requested, t.Mounted), since(t.Requested, t.RuncStarted),
		since(t.Requested, t.ProcessStarted), since(t.Requested, t.Exited))
}

// StartError is a container that could not be started.
type StartError struct {
	// Status is the exit status that shells give for this: 127 for a command
	// that is not in the image, 126 for one that cannot be executed, else 125.
	Status int
	// Err says what went wrong.
	Err error
}

func (e *StartError) Error() string { return "start container: " + e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// ExitedError is a container that ended before it was ready.
type ExitedError struct {
	Status int    // its exit status; 128 + signal number if a signal ended it
	Want   string // what was waited for
}

func (e *ExitedError) Error() string {
	return fmt.Sprintf("not ready: container exited with status %d before %s", e.Status, e.Want)
}

// Container is a started container. Its Stage owns it.
type Container struct {
	stage   *Stage
	ready   Ready
	stop    unix.Signal
	network Network
	proc    string // /proc of its first process, as we reach it
	host    int    // process ID of that process in our namespace

	logOnce sync.Once
	logged  chan struct{} // closed: a line matched, at logTime
	logTime time.Time

	heardOnce sync.Once
	heard     chan struct{} // closed: Listens was told of what is waited for
	heardTime time.Time
	heardPort int
	told      atomic.Bool // Listens is told of all that listens
	how       string      // it became ready; after WaitReady
}

// Pid is the process ID of the container's first process, in the namespace of
// the program; 0 if the kernel does not tell.
func (c *Container) Pid() int { return c.host }

// Timeline gives the moments so far.
func (c *Container) Timeline() Timeline { return c.stage.Timeline() }

// Wait waits for the end of the container and of its output, and returns its
// exit status: 128 + the signal's number if a signal ended it. A stage that
// ended without the container's status is an error.
func (c *Container) Wait(ctx context.Context) (int, error) {
	select {
	case <-c.stage.exited:
		return c.stage.exitStatus()
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for container: %w", ctx.Err())
	}
}

// Signal sends sig to the container's first process. Like any first process of
// a PID namespace it ignores a signal, other than SIGKILL and SIGSTOP, that it
// has no handler for. The error is os.ErrProcessDone once it has ended.
func (c *Container) Signal(sig unix.Signal) error {
	s := c.stage
	s.mu.Lock()
	defer s.mu.Unlock()
	err := os.ErrProcessDone
	if s.pidfd != nil && !s.ended {
		err = unix.PidfdSendSignal(int(s.pidfd.Fd()), sig, nil, 0)
	}
	if errors.Is(err, unix.ESRCH) {
		err = os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("signal container: %w", err)
	}
	return nil
}

// Stop sends the stop signal, and SIGKILL if the container still runs after
// grace or when ctx ends, and returns the exit status as Wait does. A container
// whose first process ignores the stop signal is killed at once.
func (c *Container) Stop(ctx context.Context, grace time.Duration) (int, error) {
	if c.ignores(c.stop) {
		grace = 0
	}
	if err := c.Signal(c.stop); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return 0, err
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-c.stage.exited:
	case <-timer.C:
	case <-ctx.Done():
	}
	if err := c.Signal(unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return 0, err
	}
	select {
	case <-c.stage.exited:
		return c.stage.exitStatus()
	case <-time.After(endGrace):
		return 0, errors.New("stop container: it does not end: is its image's device still served?")
	}
}
