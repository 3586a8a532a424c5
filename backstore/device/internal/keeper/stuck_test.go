package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
)

// stick makes this process one that cannot be killed while its device is not
// served: it serves a FUSE file system of its own up to a request that it sends
// itself, on a thread with a descriptor table of its own, and never answers.
// It stores the session, as a device does.
func stick(s *Store, dir string) error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("stuck", dir, "fuse", 0, opts); err != nil {
		return err
	}
	if err := answerInit(fd); err != nil {
		return err
	}
	if err := s.Store("stuck.fuse", fd); err != nil {
		return err
	}
	go apart.Run(func() error {
		var st unix.Stat_t
		return unix.Stat(dir, &st)
	})
	_, err = unix.Read(fd, make([]byte, 1<<17)) // GETATTR: from now on its sender waits for ever
	return err
}

// answerInit takes the first request of a session and answers it
// (include/uapi/linux/fuse.h, 7.23).
func answerInit(fd int) error {
	req := make([]byte, 1<<17)
	n, err := unix.Read(fd, req)
	if err != nil {
		return err
	}
	const opInit = 26
	if n < 40 || binary.NativeEndian.Uint32(req[4:]) != opInit {
		return errors.New("no INIT")
	}
	reply := make([]byte, 16+64)
	binary.NativeEndian.PutUint32(reply, uint32(len(reply)))
	copy(reply[8:16], req[8:16]) // unique
	out := reply[16:]
	binary.NativeEndian.PutUint32(out, 7)
	binary.NativeEndian.PutUint32(out[4:], 23)
	binary.NativeEndian.PutUint32(out[20:], 4096) // max_write
	_, err = unix.Write(fd, reply)
	return err
}

// A child that is killed while a thread of it waits for its own device does not
// go away before the next one serves that device. It is not waited for.
func TestStuckChild(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	} else {
		f.Close()
	}
	dir := t.TempDir()
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	r := newRig(t, Options{})
	r.up()
	first := r.pid
	r.ok("stick %s", dir)
	r.kill()
	r.up()
	require.NotEqual(t, first, r.pid)
	require.Contains(t, r.log.String(), "dead but not gone")
	require.Equal(t, 2, children(t), "the first one hangs still")
	require.Equal(t, "control stuck.fuse", r.ask("names"))
	r.kill() // both processes, and the next, live by the same session
	r.up()
	r.tell("exit 0")
	require.NoError(t, r.end())
	require.Zero(t, children(t), "it has let go of the session, and that of the first child")
}
