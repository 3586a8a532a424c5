package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/reprise-project/reprise/backstore/device"
)

// A DaemonListener is the daemon's control socket.
type DaemonListener struct{ net.Listener }

// ListenDaemon makes the control socket of root's daemon, or takes the one that
// the service manager has kept, with those who wait at it. It fails while
// another daemon serves root.
func ListenDaemon(root string, store *device.Store) (*DaemonListener, error) {
	if err := makeDevicesDir(root); err != nil {
		return nil, err
	}
	path := SocketPath(root)
	kept, err := store.Listeners()
	if err != nil {
		return nil, err
	}
	for i, l := range kept {
		if i == 0 && listening(path) {
			continue
		}
		err = errors.Join(err, l.Close())
	}
	if len(kept) > 0 && listening(path) {
		return &DaemonListener{kept[0]}, err
	}
	if listening(path) {
		return nil, fmt.Errorf("another daemon serves %s, at %s", root, path)
	}
	if err := Reap(root); err != nil { // of a daemon that nobody had kept anything for
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := removeIfThere(path); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l, err := listen(path)
	if err != nil {
		return nil, err
	}
	return &DaemonListener{l}, keepListener(store, l)
}

// keepListener has the service manager hold the socket: clients find it while
// there is no process.
func keepListener(store *device.Store, l *net.UnixListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = store.Store(ListenerName, int(fd)) })
	return errors.Join(cerr, err)
}
