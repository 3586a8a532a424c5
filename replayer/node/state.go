package node

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
)

// Each device has a state file below Root, Root/devices/ID.json, from before it
// appears until after it is gone: enough to open the same image at the same
// version, without asking the registry, and to go on serving the device. The
// file names the socket of the device's server. Where nobody listens there, not
// even a keeper that is about to start the server again, the device is dead:
// whoever comes next takes away its mount and its files.

// stateVersion is that of the state file's format.
const stateVersion = 1

// maxState bounds a state file, in bytes.
const maxState = 16 << 20

// A state is what a state file says.
type state struct {
	Version int     `json:"version"`
	Request Request `json:"request"` // as it was made
	Dir     string  `json:"dir,omitempty"`
	Socket  string  `json:"socket"`
	Pid     int     `json:"pid"` // of the server
	// Restarts is how often another server has adopted the device.
	Restarts int `json:"restarts"`

	Image  *imageState   `json:"image,omitempty"`  // nil until it is open
	Device *device.State `json:"device,omitempty"` // nil until it is about to appear
	// Path is the device's, Backing what the kernel calls its backing file.
	Path     string `json:"path,omitempty"`
	Backing  string `json:"backing,omitempty"`
	Mounted  bool   `json:"mounted,omitempty"`
	Replayed bool   `json:"replayed,omitempty"` // the replay has ended
	// Recording says that a container is being recorded, which the next server
	// cannot go on with.
	Recording bool `json:"recording,omitempty"`
	// Figures are the server's, as it last wrote them down, and Before those of
	// the servers before.
	Figures *backstore.Stats `json:"figures,omitempty"`
	Before  *backstore.Stats `json:"before,omitempty"`
}

// An imageState pins what an image consists of.
type imageState struct {
	Manifest digest.Digest        `json:"manifest,omitempty"`
	Config   ocispec.Image        `json:"config"`
	FSType   string               `json:"fs_type"`
	Layers   []ocispec.Descriptor `json:"layers,omitempty"` // at the registry or in the layout
	Local    *backstore.Config    `json:"local,omitempty"`  // of a config.v1.json
	// Upper is the writable layer that is dropped in the end; empty without one.
	Upper string `json:"upper,omitempty"`
}

// ErrNotMounted is a directory at which no image of this state directory is
// mounted.
var ErrNotMounted = errors.New("no image of this state directory is mounted there")

// How long a new mount waits for the one before it to be gone, and how often
// that is looked at.
const (
	stateWait = 5 * time.Second
	statePoll = 5 * time.Millisecond
)

// NewID makes a device's name.
func NewID() string { return "dev-" + strings.ToLower(rand.Text()[:16]) }

// devicesDir holds the state files, and the sockets of private servers.
func devicesDir(root string) string { return filepath.Join(root, "devices") }

func statePath(root, id string) string { return filepath.Join(devicesDir(root), id+".json") }
func upperPath(root, id string) string { return filepath.Join(devicesDir(root), id+".upper") }

// makeDevicesDir makes it, with Root and its parents.
func makeDevicesDir(root string) error {
	err := os.MkdirAll(root, 0o711)
	if err == nil {
		err = os.MkdirAll(devicesDir(root), 0o700)
	}
	if err != nil {
		return fmt.Errorf("state directory: %w; name another with --root", err)
	}
	return nil
}

// write replaces the state file; where durable is set it returns when that is
// on disk.
func (s *state) write(root string, durable bool) error {
	p, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := replaceFile(statePath(root, s.Request.ID), append(p, '\n'), durable); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// tempSuffix is what a state file is called while it is being written.
const tempSuffix = ".tmp"

// reserved is the disk space that is kept for the state that has to be written
// when the cache may have filled the disk, in bytes.
const reserved = 32 << 10

// reserve keeps space for a state file that is going to be written.
func (s *state) reserve(root string) error {
	f, err := os.OpenFile(statePath(root, s.Request.ID)+tempSuffix, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, reserved)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("write state: reserve space: %s: %w", f.Name(), err)
	}
	return errors.Join(err, f.Close())
}

// replaceFile writes a file that is never seen half, with the space that was
// reserved for it. One at a time writes it.
func replaceFile(path string, p []byte, durable bool) error {
	f, err := os.OpenFile(path+tempSuffix, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(p, 0); err == nil {
		err = f.Truncate(int64(len(p)))
	}
	if err == nil && durable {
		err = unix.Fdatasync(int(f.Fd()))
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if durable {
		return syncDir(filepath.Dir(path))
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func readState(path string) (*state, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return nil, err
	}
	s, err := parseState(p)
	if err == nil && s.Request.ID+".json" != filepath.Base(path) {
		err = fmt.Errorf("it is of device %.80q", s.Request.ID)
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	return s, nil
}

func parseState(p []byte) (*state, error) {
	s := new(state)
	if err := json.Unmarshal(p, s); err != nil {
		return nil, err
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("version %d, this program knows %d", s.Version, stateVersion)
	}
	if err := checkID(s.Request.ID); err != nil {
		return nil, err
	}
	if d := s.Device; d != nil && d.ID != s.Request.ID {
		return nil, fmt.Errorf("it describes device %.80q", d.ID)
	}
	return s, nil
}

// states reads all state files of a root. What cannot be read is in err, beside
// the others.
func states(root string) (list []*state, err error) {
	names, err := filepath.Glob(filepath.Join(globEscape.Replace(devicesDir(root)), "*.json"))
	var errs []error
	for _, name := range names {
		s, e := readState(name)
		switch {
		case e == nil:
			list = append(list, s)
		case !errors.Is(e, os.ErrNotExist): // gone since
			errs = append(errs, e)
		}
	}
	return list, errors.Join(append(errs, err)...)
}

var globEscape = strings.NewReplacer(`*`, `\*`, `?`, `\?`, `[`, `\[`, `\`, `\\`)

// stateOf finds the device that is mounted, or about to be, at a directory.
func stateOf(root, dir string) (*state, error) {
	list, err := states(root)
	for _, s := range list {
		if s.Dir == dir {
			return s, nil
		}
	}
	return nil, errors.Join(ErrNotMounted, err)
}

// remove removes the files of a device that is gone.
func (s *state) remove(root string) error {
	id := s.Request.ID
	err := backstore.RemoveUpper(upperPath(root, id))
	return errors.Join(err, removeIfThere(statePath(root, id)+tempSuffix), removeIfThere(statePath(root, id)))
}

// mountedHere reports whether the device is mounted at its directory. Another
// device may have got its name since.
func (s *state) mountedHere() bool {
	return s.Path != "" && s.Dir != "" && mountedAt(s.Dir, s.Path) && s.Backing == backingOf(s.Path)
}

// reap takes away what is left of a device that nobody serves.
func (s *state) reap(root string) error {
	if s.mountedHere() {
		if err := device.UnmountLazy(s.Dir); err != nil {
			return err
		}
	}
	err := s.remove(root)
	if filepath.Dir(s.Socket) == devicesDir(root) { // a private server's
		err = errors.Join(err, removeIfThere(s.Socket))
	}
	return err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// lockDevices keeps others from claiming mount points and from reaping.
func lockDevices(root string) (*os.File, error) { return lockDir(devicesDir(root), unix.LOCK_EX) }

// Reap takes away the dead mounts and the files that killed servers and keepers
// have left below root.
func Reap(root string) error {
	all, err := lockDevices(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer all.Close()
	list, err := states(root)
	errs := []error{err}
	for _, s := range list {
		if !listening(s.Socket) {
			errs = append(errs, s.reap(root))
		}
	}
	return errors.Join(append(errs, reapSockets(root), reapHalves(root))...)
}

// writing is how long a state file takes to be written at most.
const writing = time.Minute

// reapHalves removes what was being written by a process that was killed.
func reapHalves(root string) error {
	names, err := filepath.Glob(filepath.Join(globEscape.Replace(devicesDir(root)), "*"+tempSuffix))
	for _, name := range names {
		if fi, e := os.Stat(name); e == nil && time.Since(fi.ModTime()) > writing {
			err = errors.Join(err, removeIfThere(name))
		}
	}
	return err
}

// reapSockets removes those sockets of private servers at which nobody listens.
func reapSockets(root string) error {
	names, err := filepath.Glob(filepath.Join(globEscape.Replace(devicesDir(root)), "*"+socketSuffix))
	for _, name := range names {
		if !listening(name) {
			err = errors.Join(err, removeIfThere(name))
		}
	}
	return err
}

// claim writes the state file of a new device, whose mount point is nobody
// else's then. It takes away what is left there of a dead one, and waits for a
// moment for a mount that is just ending.
func (s *state) claim(ctx context.Context, root string) error {
	for until := time.Now().Add(stateWait); ; {
		ok, err := s.tryClaim(root)
		if ok || err != nil {
			return err
		}
		if isMountPoint(s.Dir) || time.Now().After(until) {
			return fmt.Errorf("mount point %s: another reprise process has an image there already; unmount it with 'reprise umount %s' or name another directory", s.Dir, s.Dir)
		}
		if err := pause(ctx, statePoll); err != nil {
			return err
		}
	}
}

func (s *state) tryClaim(root string) (ok bool, err error) {
	if err := makeDevicesDir(root); err != nil {
		return false, err
	}
	all, err := lockDevices(root)
	if err != nil {
		return false, err
	}
	defer all.Close()
	other, err := stateOf(root, s.Dir)
	if other != nil && other.Request.ID != s.Request.ID {
		if listening(other.Socket) {
			return false, nil
		}
		if err := other.reap(root); err != nil {
			return false, fmt.Errorf("mount point %s: take away the mount of a killed process: %w", s.Dir, err)
		}
	} else if err != nil && !errors.Is(err, ErrNotMounted) {
		return false, err
	}
	if err := checkMountPoint(s.Dir); err != nil {
		return false, err
	}
	return true, s.write(root, false)
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
