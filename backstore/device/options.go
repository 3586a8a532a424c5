package device

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// Options of [Attach]. A zero field means its default.
type Options struct {
	// Transport is one of those that [Probe] lists: "fuse", which is FUSE and
	// loop, "erofs", "ublk", "nbd", "tcmu"; or "auto" (the default), the best that
	// there is for FSType.
	Transport string
	// FSType is what the device holds, as mount(8) calls it: "ext4", "erofs". It
	// helps "auto" to choose. Default unknown.
	FSType string
	// ID names the device in State. Default: a random one.
	ID string
	// Keeper holds the descriptors that the device lives by, so that another
	// process can adopt it when this one has ended. Default: nobody, the device
	// ends with the process.
	Keeper Keeper
	// Prepared is told what Adopt will have to know before anybody can see the
	// device; it returns when that is on disk. Default nil.
	Prepared func(State) error
	// ReadOnly refuses writes in the kernel. It must be set if the backend is
	// no io.WriterAt.
	ReadOnly bool
	// SectorSize is the logical block size in bytes: 512, 1024, 2048 or 4096.
	// Default 4096, or the largest that divides the size. A file system whose
	// blocks are smaller than a sector cannot be mounted.
	SectorSize int
	// ReadAheadKB is the kernel's read-ahead on the device, in KiB. Default
	// 128; negative for none.
	ReadAheadKB int
	// Name is what `losetup` shows as the backing file. Default "reprise".
	Name string
	// MaxInFlight is how many backend calls may run at a time. Default 128.
	MaxInFlight int
	// CloseTimeout is how long Close waits for the backend. Default 10 s.
	CloseTimeout time.Duration
	// OnError is told of each request that the backend failed, as an *[IOError].
	// It is called inline and concurrently: it must be quick. Default nil.
	OnError func(error)
	// OnSlow is told of each request that has been in the backend for SlowAfter,
	// and again whenever that time has doubled. Default nil.
	OnSlow func(Slow)
	// SlowAfter is how long a request may take before OnSlow hears of it.
	// Default 10 s.
	SlowAfter time.Duration
}

// IOError is a request that the backend failed.
type IOError = request.Error

// Slow is a request that the backend has not answered for a while.
type Slow = request.Slow

const minSector, maxSector = 512, 4096

// fill returns a checked copy of o with the defaults set.
func (o *Options) fill(b Backend, size int64) (*Options, error) {
	var c Options
	if o != nil {
		c = *o
	}
	if b == nil {
		return nil, errors.New("no backend")
	}
	if c.Transport == "" || c.Transport == "auto" {
		c.Transport = c.choose()
	}
	if transports[c.Transport] == nil {
		names := slices.Sorted(maps.Keys(transports))
		return nil, fmt.Errorf("unknown transport %q: use auto, %s", c.Transport, strings.Join(names, ", "))
	}
	if _, ok := b.(io.WriterAt); !ok && !c.ReadOnly {
		return nil, errors.New("the backend cannot be written: set ReadOnly")
	}
	if err := c.fillSector(size); err != nil {
		return nil, err
	}
	c.Name = fileName(c.Name)
	orDefault(&c.ReadAheadKB, 128)
	orDefault(&c.MaxInFlight, 128)
	orDefault(&c.CloseTimeout, 10*time.Second)
	orDefault(&c.SlowAfter, 10*time.Second)
	orDefault(&c.ID, newID())
	if c.MaxInFlight < 1 || c.CloseTimeout < 0 {
		return nil, fmt.Errorf("MaxInFlight %d or CloseTimeout %v is negative", c.MaxInFlight, c.CloseTimeout)
	}
	return &c, nil
}

func (o *Options) fillSector(size int64) error {
	if size <= 0 || size%minSector != 0 {
		return fmt.Errorf("size %d is not a positive multiple of %d", size, minSector)
	}
	if o.SectorSize == 0 {
		o.SectorSize = maxSector
		for size%int64(o.SectorSize) != 0 {
			o.SectorSize /= 2
		}
	}
	s := o.SectorSize
	if s < minSector || s > maxSector || s&(s-1) != 0 {
		return fmt.Errorf("sector size %d is not 512, 1024, 2048 or 4096", s)
	}
	if size%int64(s) != 0 {
		return fmt.Errorf("size %d is not a multiple of the sector size %d", size, s)
	}
	return nil
}

// request is the configuration of the request server over b.
func (o *Options) request(b Backend, size int64) request.Config {
	c := request.Config{Size: size, ReadOnly: o.ReadOnly, OnSlow: o.OnSlow, SlowAfter: o.SlowAfter}
	_, c.CanDiscard = b.(Discarder)
	_, c.CanSync = b.(Syncer)
	if o.OnError != nil {
		c.OnError = func(e *request.Error) { o.OnError(e) }
	}
	return c
}

// state is what is known of a device before it is attached.
func (o *Options) state(size int64) *State {
	return &State{
		ID: o.ID, Transport: o.Transport, Name: o.Name, Size: size, SectorSize: o.SectorSize, ReadOnly: o.ReadOnly,
		ReadAheadKB: o.ReadAheadKB, MaxInFlight: o.MaxInFlight, Index: -1,
	}
}

// with returns a copy of o that has what s says.
func (o *Options) with(s State) *Options {
	var c Options
	if o != nil {
		c = *o
	}
	c.ID, c.Transport, c.Name, c.SectorSize, c.ReadOnly = s.ID, s.Transport, s.Name, s.SectorSize, s.ReadOnly
	c.ReadAheadKB, c.MaxInFlight = s.ReadAheadKB, s.MaxInFlight
	return &c
}

// fileName makes a name that a directory entry can have.
func fileName(s string) string {
	const longest = 255 // NAME_MAX
	s = strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' {
			return '_'
		}
		return r
	}, s)
	switch s = s[:min(len(s), longest)]; s {
	case "", ".", "..":
		return "reprise"
	}
	return s
}

func orDefault[T comparable](p *T, v T) {
	if *p == *new(T) {
		*p = v
	}
}
