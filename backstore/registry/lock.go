package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// keyedLock lets one goroutine in for each key.
type keyedLock struct {
	mu   sync.Mutex // guards held
	held map[string]*turn
}

type turn struct {
	ch   chan struct{} // holds one token
	want int
}

func (l *keyedLock) lock(ctx context.Context, key string) (unlock func(), err error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*turn{}
	}
	t := l.held[key]
	if t == nil {
		t = &turn{ch: make(chan struct{}, 1)}
		l.held[key] = t
	}
	t.want++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if t.want--; t.want == 0 {
			delete(l.held, key)
		}
	}
	select {
	case t.ch <- struct{}{}:
		return func() { <-t.ch; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}

// lock takes a key for this process and, by a file, for this machine. The file
// is there while the key is taken or waited for.
func (c *Client) lock(ctx context.Context, key string) (unlock func(), err error) {
	leave, err := c.updates.lock(ctx, key)
	if err != nil {
		return nil, err
	}
	f, err := c.lockFile(ctx, key)
	if err != nil {
		leave()
		return nil, fmt.Errorf("lock %s: %w", key, err)
	}
	return func() {
		// Whoever has opened it before will see that it is no longer there.
		_ = os.Remove(f.Name())
		_ = f.Close()
		leave()
	}, nil
}

// lockDir is where all processes of this user on this machine find the locks: a
// directory that is emptied when the machine starts.
func lockDir() string {
	uid := strconv.Itoa(os.Getuid())
	dir := "/run/user/" + uid
	if os.Getuid() == 0 {
		dir = "/run/lock"
	}
	if fi, err := os.Stat(dir); err == nil && ownerOf(fi) == os.Getuid() && unix.Access(dir, unix.W_OK) == nil {
		return filepath.Join(dir, "reprise")
	}
	return filepath.Join(os.TempDir(), "reprise-"+uid)
}

func ownerOf(fi os.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// lockFile opens and locks the file of a key, which is of this user.
func (c *Client) lockFile(ctx context.Context, key string) (*os.File, error) {
	sum := sha256.Sum256([]byte(key))
	path := filepath.Join(c.o.LockDir, "referrers-"+hex.EncodeToString(sum[:16])+".lock")
	for {
		f, err := c.openLock(path)
		if err != nil {
			return nil, err
		}
		if err := flock(ctx, f); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if isAt(f, path) {
			return f, nil
		}
		_ = f.Close() // somebody was through, and has removed the file meanwhile
	}
}

func (c *Client) openLock(path string) (*os.File, error) {
	dir := c.o.LockDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// It may be in a directory where anybody makes files.
	fi, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() || ownerOf(fi) != os.Getuid() {
		return nil, fmt.Errorf("%s is not a directory of this user: remove it, or set another", dir)
	}
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
}

// flock waits for the lock on f. It asks again and again, as waiting in the
// kernel would not end with ctx; less and less often, so that many who wait do
// not keep the one that has the lock from its work.
func flock(ctx context.Context, f *os.File) error {
	const first, last = 8 * time.Millisecond, 256 * time.Millisecond
	for pause := first; ; pause = min(2*pause, last) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EWOULDBLOCK):
			err = sleep(ctx, time.Millisecond+rand.N(pause))
		case errors.Is(err, unix.EINTR):
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

// isAt tells whether path is still the file f.
func isAt(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}
