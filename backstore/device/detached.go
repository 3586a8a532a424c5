package device

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
)

// MountDetached mounts the file system on the device, as [Mount] does, but
// nowhere: the mount is the descriptor, and ends with it unless [MoveMount] gives
// it a place, here or in a process that the descriptor was sent to, in that
// one's mount namespace. It is close-on-exec.
func (d *Device) MountDetached(fstype string, readOnly bool, data string) (fd int, err error) {
	m := detached{source: d.Path(), dir: -1, fstype: fstype, readOnly: readOnly, data: data,
		readAheadKB: usualReadAheadKB}
	if readOnly {
		m.data = withoutJournal(fstype, data)
	}
	if at, ok := d.at.(*fuseErofsDevice); ok {
		m.dir, m.source = at.session.MountFD(), filepath.Base(m.source)
		m.data = withOption(m.data, directIO)
		m.readAheadKB = max(at.a.ReadAheadKB, 0)
	}
	fd, err = m.mount()
	if err != nil {
		return -1, fmt.Errorf("mount %s as %s: %w", d.Path(), fstype, explain(err, fstype, "fsmount(2)"))
	}
	return fd, nil
}

// detached is a mount to be made. All of it may wait for the device.
type detached struct {
	source   string
	dir      int // directory that source is in; -1: source is a path
	fstype   string
	readOnly bool
	data     string
	// readAheadKB is for file systems without a device that would have it.
	readAheadKB int
}

// usualReadAheadKB is what the kernel gives a file system of its own accord.
const usualReadAheadKB = 128

// mount makes it apart, and brings the descriptor over to the process's table.
func (m *detached) mount() (fd int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	defer closeFDs(pair[:]...)
	needs := []int{pair[1]}
	if m.dir >= 0 {
		needs = append(needs, m.dir)
	}
	err = apart.Run(func() error {
		fd, err := m.make()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if m.readAheadKB != usualReadAheadKB {
			if err := setReadAhead(fd, m.readAheadKB); err != nil {
				return err
			}
		}
		return unix.Sendmsg(pair[1], []byte{0}, unix.UnixRights(fd), nil, 0)
	}, needs...)
	if err != nil {
		return -1, err
	}
	return receive(pair[0])
}

// setReadAhead is for a mount of a file system that has a backing device
// information of its own, in KiB.
func setReadAhead(mount, kb int) error {
	root, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the mount's root: %w", err)
	}
	defer unix.Close(root)
	const getSysfsPath = 0x80811501 // FS_IOC_GETFSSYSFSPATH, _IOR(0x15, 1, struct fs_sysfs_path), Linux 6.9
	var p struct {                  // struct fs_sysfs_path
		n    uint8
		name [128]byte // erofs/erofs-7: the last part is the name in /sys/class/bdi, too
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(root), getSysfsPath, uintptr(unsafe.Pointer(&p))); errno != 0 {
		return fmt.Errorf("FS_IOC_GETFSSYSFSPATH: %w", errno)
	}
	name := filepath.Base(string(p.name[:min(int(p.n), len(p.name))]))
	file := "/sys/class/bdi/" + name + "/read_ahead_kb"
	attr, err := unix.Open(file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", file, err)
	}
	defer unix.Close(attr)
	if _, err := unix.Write(attr, []byte(strconv.Itoa(kb))); err != nil {
		return fmt.Errorf("write %d to %s: %w", kb, file, err)
	}
	return nil
}

func receive(socket int) (fd int, err error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return -1, fmt.Errorf("receive the mount: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, errors.Join(errors.New("receive the mount: no descriptor came"), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("receive the mount: no descriptor came"), err)
	}
	return fds[0], nil
}

// make runs on a thread of its own, whose working directory it changes.
func (m *detached) make() (fd int, err error) {
	if m.dir >= 0 {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return -1, err
		}
		if err := unix.Fchdir(m.dir); err != nil {
			return -1, err
		}
	}
	fd, err = m.fsmount(m.data)
	if less, ok := withoutOption(m.data, directIO); ok && errors.Is(err, unix.EINVAL) {
		if fd, again := m.fsmount(less); again == nil {
			return fd, nil
		}
	}
	return fd, err
}

func (m *detached) fsmount(data string) (fd int, err error) {
	fs, err := unix.Fsopen(m.fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	if err := m.configure(fs, data); err != nil {
		return -1, errors.Join(err, kernelLog(fs))
	}
	attrs := 0
	if m.readOnly {
		attrs = unix.MOUNT_ATTR_RDONLY
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
}

func (m *detached) configure(fs int, data string) error {
	if err := unix.FsconfigSetString(fs, "source", m.source); err != nil {
		return err
	}
	if m.readOnly {
		if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
			return err
		}
	}
	for o := range strings.SplitSeq(data, ",") {
		if err := setOption(fs, o); err != nil {
			return fmt.Errorf("option %s: %w", o, err)
		}
	}
	return unix.FsconfigCreate(fs)
}

func setOption(fs int, o string) error {
	key, value, ok := strings.Cut(o, "=")
	switch {
	case o == "":
		return nil
	case ok:
		return unix.FsconfigSetString(fs, key, value)
	}
	return unix.FsconfigSetFlag(fs, o)
}

// kernelLog is what the kernel has to say about a mount that failed; nil if
// nothing.
func kernelLog(fs int) error {
	var errs []error
	for buf := make([]byte, 512); ; {
		n, err := unix.Read(fs, buf)
		if err != nil || n == 0 {
			return errors.Join(errs...)
		}
		errs = append(errs, errors.New(strings.TrimSpace(string(buf[:n]))))
	}
}

// withoutOption takes an option out of a list that may have it.
func withoutOption(data, option string) (less string, had bool) {
	var rest []string
	for o := range strings.SplitSeq(data, ",") {
		if o == option {
			had = true
		} else {
			rest = append(rest, o)
		}
	}
	return strings.Join(rest, ","), had
}

// MoveMount gives a mount of [Device.MountDetached] its place, the directory dir
// in the mount namespace of this process. It closes fd, whatever it returns.
func MoveMount(fd int, dir string) error {
	err := apart.Take(func() error {
		return unix.MoveMount(fd, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}, fd)
	if err != nil {
		return fmt.Errorf("move mount to %s: %w", dir, explain(err, "mount", "move_mount(2)"))
	}
	return nil
}
