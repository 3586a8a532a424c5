package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	systemdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// systemd is a host's service manager, asked at its own socket: a container has
// no use for the host's systemctl. org.freedesktop.systemd1(5). Close it.
type systemd struct {
	*systemdbus.Conn
	raw *dbus.Conn // one of Conn's, for what it has no method for
}

// dialSystemd connects to the socket /run/systemd/private of a host.
func dialSystemd(ctx context.Context, socket string) (*systemd, error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, fmt.Errorf("the host has no systemd that could run the daemon: %w", err)
	}
	s := new(systemd)
	var err error
	s.Conn, err = systemdbus.NewConnection(func() (*dbus.Conn, error) {
		conn, err := dbus.Dial("unix:path="+dbus.EscapeBusAddressValue(socket), dbus.WithContext(ctx))
		if err != nil {
			return nil, err
		}
		if err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		s.raw = conn
		return conn, nil // without Hello: there is no bus
	})
	if err != nil {
		return nil, fmt.Errorf("connect to systemd at %s: %w", socket, err)
	}
	return s, nil
}

// property is the daemon's, as a string.
func (s *systemd) property(ctx context.Context, name string) (string, error) {
	p, err := s.GetUnitPropertyContext(ctx, unitName, name)
	if err != nil {
		return "", fmt.Errorf("ask systemd for %s: %w", unitName, err)
	}
	text, _ := p.Value.Value().(string)
	return text, nil
}

// foreign fails if the host has the daemon from elsewhere: a package, say.
func (s *systemd) foreign(ctx context.Context, own string) error {
	path, err := s.property(ctx, "FragmentPath")
	if err != nil {
		return err
	}
	if path != "" && path != own {
		return fmt.Errorf("the host has the daemon already, as %s says: remove the package that brought it first", path)
	}
	return nil
}

// enable has the daemon started with the host.
func (s *systemd) enable(ctx context.Context, unit string) error {
	if _, _, err := s.EnableUnitFilesContext(ctx, []string{unit}, false, true); err != nil {
		return fmt.Errorf("enable %s: %w", unitName, err)
	}
	return s.reload(ctx)
}

func (s *systemd) reload(ctx context.Context) error {
	if err := s.ReloadContext(ctx); err != nil {
		return fmt.Errorf("reload systemd: %w", err)
	}
	return nil
}

// restart starts the daemon, again if it runs, and returns once it is ready.
func (s *systemd) restart(ctx context.Context) error {
	done := make(chan string, 1)
	if _, err := s.RestartUnitContext(ctx, unitName, "replace", done); err != nil {
		return fmt.Errorf("start %s: %w", unitName, err)
	}
	return s.finished(ctx, "start", done)
}

// stop ends the daemon, and lets go of what systemd holds for it. It is no error
// if systemd does not know it.
func (s *systemd) stop(ctx context.Context) error {
	state, err := s.property(ctx, "LoadState")
	if err != nil || state == "not-found" {
		return err
	}
	done := make(chan string, 1)
	if _, err := s.StopUnitContext(ctx, unitName, "replace", done); err != nil {
		return fmt.Errorf("stop %s: %w", unitName, err)
	}
	if err := s.finished(ctx, "stop", done); err != nil {
		return err
	}
	return s.clean(ctx)
}

// clean lets go of the descriptors that systemd holds for a daemon that was
// stopped, which older ones than 254 have done by then.
func (s *systemd) clean(ctx context.Context) error {
	p, err := s.GetServicePropertyContext(ctx, unitName, "NFileDescriptorStore")
	if err != nil {
		return fmt.Errorf("ask systemd for %s: %w", unitName, err)
	}
	if n, _ := p.Value.Value().(uint32); n == 0 {
		return nil
	}
	manager := s.raw.Object("org.freedesktop.systemd1", "/org/freedesktop/systemd1")
	call := manager.CallWithContext(ctx, "org.freedesktop.systemd1.Manager.CleanUnit", 0, unitName, []string{"fdstore"})
	if call.Err != nil {
		return fmt.Errorf("clean %s: %w", unitName, call.Err)
	}
	return nil
}

// finished waits for a job's end.
func (s *systemd) finished(ctx context.Context, what string, done <-chan string) error {
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("%s %s: %s: 'journalctl -u %s' says why", what, unitName, result, unitName)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// disable has systemd forget the daemon, whose unit is gone. It is no error if
// systemd does not know it.
func (s *systemd) disable(ctx context.Context) error {
	_, err := s.DisableUnitFilesContext(ctx, []string{unitName}, false)
	var reply dbus.Error
	if errors.As(err, &reply) && reply.Name == "org.freedesktop.systemd1.NoSuchUnit" {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("disable %s: %w", unitName, err)
	}
	return s.reload(ctx)
}
