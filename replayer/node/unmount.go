package node

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Unmount unmounts the image at dir that has its state below root, and returns
// when everything that it was served with has been released.
func Unmount(ctx context.Context, root, dir string) error {
	if err := unmount(ctx, root, resolveDir(dir)); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

func unmount(ctx context.Context, root, dir string) error {
	s, err := stateOf(root, dir)
	if err != nil {
		return err
	}
	if listening(s.Socket) {
		c := NewClient(s.Socket)
		err := c.Release(ctx, s.Request.ID, false)
		_ = c.Close()
		switch {
		case errors.Is(err, unix.EBUSY) && mountedAt(dir, s.Path):
			return fmt.Errorf("files on it are in use, 'fuser -vm %s' shows by whom: %w", dir, unix.EBUSY)
		case ctx.Err() != nil && s.Path == "":
			return fmt.Errorf("process %d is about to mount there, and does not come to an end: %w", s.Pid, ctx.Err())
		case ctx.Err() != nil:
			return fmt.Errorf("process %d still serves %s, which is in use elsewhere, by open files or in another mount namespace: %w", s.Pid, s.Path, ctx.Err())
		case !errors.Is(err, errLost):
			return err
		}
	}
	return reapAt(root, dir, s)
}

// reapAt takes away a dead mount.
func reapAt(root, dir string, s *state) error {
	all, err := lockDevices(root)
	if err != nil {
		return err
	}
	defer all.Close()
	now, err := stateOf(root, dir)
	if errors.Is(err, ErrNotMounted) {
		return nil
	}
	if err != nil || now.Request.ID != s.Request.ID {
		return err
	}
	err = now.reap(root)
	if now.Path == "" && err == nil {
		err = ErrNotMounted // it was killed before it had mounted
	}
	return err
}
