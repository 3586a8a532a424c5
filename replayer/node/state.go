package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// Each mount point has a state file below Root, which says what is mounted
// there and is locked by the process that serves it. A file that nobody locks
// is what a killed process has left: whoever comes next takes the mount away,
// whose device is dead, and the file.

// MountState is the state file of a mount.
type MountState struct {
	Dir     string    `json:"dir"`
	Ref     string    `json:"ref"`
	Device  string    `json:"device"`  // empty while it is being mounted
	Backing string    `json:"backing"` // what the kernel calls the device's backing file
	Pid     int       `json:"pid"`
	Started time.Time `json:"started"`
}

// ErrNotMounted is a directory at which no image of this state directory is
// mounted.
var ErrNotMounted = errors.New("no image of this state directory is mounted there")

// maxState bounds a state file, in bytes.
const maxState = 1 << 20

// How long a new mount waits for the one before it to be gone, and how often
// that is looked at: locks cannot be waited for with a limit.
const (
	stateWait = 5 * time.Second
	statePoll = 5 * time.Millisecond
)

// errLocked is a state file that another process serves.
var errLocked = errors.New("it is locked")

// statePath is the state file of a mount point.
func statePath(root, dir string) string {
	return filepath.Join(root, "mounts", digest.FromString(dir).Encoded()[:16]+".json")
}

// A stateFile is one that this process has locked.
type stateFile struct {
	f    *os.File
	path string
}

// openState locks the state file at path; flags are those of os.OpenFile. It
// fails with errLocked while another process has it.
func openState(path string, flags int) (*stateFile, error) {
	for {
		f, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			return nil, err
		}
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			err = errLocked
		}
		if err == nil && !names(path, f) { // its owner has removed it meanwhile
			_ = f.Close()
			continue
		}
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		return &stateFile{f, path}, nil
	}
}

// names tells whether path is, still, the file f.
func names(path string, f *os.File) bool {
	have, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(have, now)
}

// read returns what the file says; nothing if it says nothing yet.
func (s *stateFile) read() MountState {
	p, err := io.ReadAll(io.NewSectionReader(s.f, 0, maxState))
	if err != nil {
		return MountState{}
	}
	m, _ := parseState(p)
	return m
}

func parseState(p []byte) (m MountState, err error) {
	if len(p) == 0 {
		return m, nil
	}
	err = json.Unmarshal(p, &m)
	return m, err
}

func (s *stateFile) write(m MountState) error {
	p, err := json.Marshal(m)
	if err == nil {
		err = s.f.Truncate(0)
	}
	if err == nil {
		_, err = s.f.WriteAt(append(p, '\n'), 0)
	}
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// upper is where the writable layer of the mount is.
func (s *stateFile) upper() string { return strings.TrimSuffix(s.path, ".json") + ".upper" }

// remove removes the file and the writable layer, and then gives up the lock.
func (s *stateFile) remove() error {
	var errs []error
	for _, path := range []string{s.upper(), s.path} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, s.f.Close())...)
}

// reap takes away the mount of a killed process, whose state file this is.
func (s *stateFile) reap() error {
	m := s.read()
	if m.Device != "" && mountedAt(m.Dir, m.Device) && m.Backing == backingOf(m.Device) {
		return device.UnmountLazy(m.Dir)
	}
	return nil
}

// claimState locks the state file of a mount point for a new mount there,
// taking away what a killed process has left. It waits for a moment for a
// mount that is just ending.
func (n *Node) claimState(ctx context.Context, dir string) (*stateFile, error) {
	path := statePath(n.o.Root, dir)
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	s, err := openState(path, os.O_RDWR|os.O_CREATE)
	for until := time.Now().Add(stateWait); errors.Is(err, errLocked) && !isMountPoint(dir) && time.Now().Before(until); {
		if err := pause(ctx, statePoll); err != nil {
			return nil, err
		}
		s, err = openState(path, os.O_RDWR|os.O_CREATE)
	}
	if errors.Is(err, errLocked) {
		return nil, fmt.Errorf("mount point %s: another reprise process has an image there already; unmount it with 'reprise umount %s' or name another directory", dir, dir)
	}
	if err != nil {
		return nil, err
	}
	if err := s.reap(); err != nil {
		_ = s.f.Close()
		return nil, fmt.Errorf("mount point %s: take away the mount of a killed process: %w", dir, err)
	}
	return s, nil
}

// Reap takes away the mount at dir, an absolute path, if process pid served it
// and was killed: a dead mount answers nothing but errors. It waits for the
// process to be gone.
func Reap(ctx context.Context, root, dir string, pid int) error {
	path := statePath(root, dir)
	for {
		s, err := openState(path, os.O_RDWR)
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil
		case errors.Is(err, errLocked): // its descriptors are being closed one by one
			if p, err := os.ReadFile(path); err == nil {
				if m, _ := parseState(p); m.Pid != 0 && m.Pid != pid {
					return nil
				}
			}
			if err := pause(ctx, statePoll); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		if m := s.read(); m.Pid != pid {
			return s.f.Close()
		}
		return errors.Join(s.reap(), s.remove())
	}
}

// Unmount unmounts the image at dir that has its state below root, and waits
// until the process that serves it has released everything.
func Unmount(ctx context.Context, root, dir string) error {
	if err := unmount(ctx, root, resolveDir(dir)); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

func unmount(ctx context.Context, root, dir string) error {
	path := statePath(root, dir)
	f, m, err := readState(ctx, path)
	if err != nil {
		return err
	}
	defer f.Close()
	if mountedAt(dir, m.Device) {
		err := device.Unmount(dir)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("files on it are in use, 'fuser -vm %s' shows by whom: %w", dir, unix.EBUSY)
		}
		if err != nil {
			return err
		}
	}
	return awaitGone(ctx, path, f, m)
}

// readState reads the state file of a mount, once it is mounted.
func readState(ctx context.Context, path string) (*os.File, MountState, error) {
	for {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNotMounted
		}
		if err != nil {
			return nil, MountState{}, err
		}
		p, err := io.ReadAll(io.LimitReader(f, maxState))
		m, bad := parseState(p)
		if err == nil && bad == nil && m.Device != "" {
			return f, m, nil
		}
		_ = f.Close()
		if err != nil {
			return nil, m, err
		}
		s, err := openState(path, os.O_RDWR)
		switch {
		case err == nil: // left by a process that was killed before it had mounted
			return nil, m, errors.Join(ErrNotMounted, s.remove())
		case errors.Is(err, os.ErrNotExist):
			continue
		case !errors.Is(err, errLocked):
			return nil, m, err
		}
		if err := pause(ctx, statePoll); err != nil {
			return nil, m, fmt.Errorf("process %d is about to mount there, and does not come to an end: %w", m.Pid, err)
		}
	}
}

// awaitGone waits until the server of a mount has removed its state file, or
// removes what a killed one left.
func awaitGone(ctx context.Context, path string, f *os.File, m MountState) error {
	for names(path, f) {
		s, err := openState(path, os.O_RDWR)
		if err == nil {
			if !names(path, f) { // a new mount's, already
				return s.f.Close()
			}
			return errors.Join(s.reap(), s.remove())
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, errLocked) {
			return err
		}
		if err := pause(ctx, statePoll); err != nil {
			return fmt.Errorf("process %d still serves %s, which is in use elsewhere, by open files or in another mount namespace: %w", m.Pid, m.Device, err)
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
