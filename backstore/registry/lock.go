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

// lock takes a key for this process and, by a file, for this machine. The files
// are empty and stay: who removes one may remove another's.
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
		f.Close() // and so unlocks
		leave()
	}, nil
}

func (c *Client) lockFile(ctx context.Context, key string) (*os.File, error) {
	dir := c.o.LockDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// The default is in a directory where anybody may make files.
	if fi, err := os.Lstat(dir); err != nil {
		return nil, err
	} else if st, ok := fi.Sys().(*syscall.Stat_t); !ok || !fi.IsDir() || int(st.Uid) != os.Getuid() {
		return nil, fmt.Errorf("%s is not a directory of this user: remove it, or set another", dir)
	}
	sum := sha256.Sum256([]byte(key))
	path := filepath.Join(dir, "referrers-"+hex.EncodeToString(sum[:16])+".lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = sleep(ctx, time.Millisecond+rand.N(10*time.Millisecond))
		} else if errors.Is(err, unix.EINTR) {
			err = nil
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
}
