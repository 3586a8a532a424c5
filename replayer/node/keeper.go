package node

import (
	"errors"
	"log/slog"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// A Keeper outlives the process and holds its descriptors; [device.Store] is one.
type Keeper interface {
	device.Keeper
	// Take returns the descriptors of a device that were kept, by role.
	Take(id string) map[string]int
	// Names are the names of all that is kept.
	Names() []string
}

// A mortalKeeper may be killed. What it has held is gone then, and devices end
// with this process, which goes on.
type mortalKeeper struct {
	Keeper
	log  *slog.Logger
	once sync.Once
}

func (k *mortalKeeper) Store(name string, fd int) error {
	return k.alive(k.Keeper.Store(name, fd))
}

func (k *mortalKeeper) Remove(name string) error {
	return k.alive(k.Keeper.Remove(name))
}

// alive takes the error of a keeper that is gone for none.
func (k *mortalKeeper) alive(err error) error {
	if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	k.once.Do(func() {
		k.log.Warn("the keeper is gone: devices end with this process", "err", err)
	})
	return nil
}

func (s *Server) keeper() device.Keeper {
	if s.o.Keeper == nil {
		return nil
	}
	return s.o.Keeper
}

func (s *Server) keep(name string, fd int) error {
	if s.o.Keeper == nil {
		return nil
	}
	return s.o.Keeper.Store(name, fd)
}

func (s *Server) unkeep(name string) {
	if s.o.Keeper == nil || !slices.Contains(s.o.Keeper.Names(), name) {
		return
	}
	if err := s.o.Keeper.Remove(name); err != nil {
		s.o.Log.Warn("the keeper does not let go", "descriptor", name, "err", err)
	}
}
