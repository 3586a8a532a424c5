package node

import (
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/reprise-project/reprise/backstore/device"
)

// The kernel's read-ahead on a device, in KiB. It is part of what demand looks
// like, and so it is written into traces. Where it is not known what will be read
// it saves round trips. Where it is, it costs more than it saves: a page of a
// library that is touched has the whole window around it read. A start of a Python
// stack asks for 41 MB of blocks with 128, 32 with 32, 29 with 16 and 25.5 with 8,
// whose many more reads begin to cost time of their own.
const (
	usualReadAheadKB  = 128 // Linux's own
	recordReadAheadKB = 16
	leastReadAheadKB  = 4
)

// deviceOptions are those of the image's device, which a device that is adopted
// has already. It is read-only unless write is set.
func (im *Image) deviceOptions(id string, write bool) (*device.Options, error) {
	sector, err := im.sectorSize()
	if err != nil {
		return nil, err
	}
	o := im.serving()
	o.Transport, o.ReadOnly, o.FSType = im.node.o.Transport, !write, im.FSType
	o.SectorSize, o.ReadAheadKB = sector, im.readAheadKB()
	o.ID, o.Name = id, "reprise:"+im.Ref
	return o, nil
}

// readAheadKB is what a trace that is followed was recorded with, if the image's
// device is made now; less than usual while the image is recorded.
func (im *Image) readAheadKB() int {
	if im.recorded {
		return recordReadAheadKB
	}
	r := im.replay
	if r == nil {
		return usualReadAheadKB
	}
	select {
	case <-r.planned:
	default:
		return usualReadAheadKB
	}
	if r.plan == nil || r.foreign || r.plan.Missing > 0 || r.trace.End == nil {
		return usualReadAheadKB // much will be read that the trace does not know
	}
	kb := int(r.trace.ReadAhead >> 10)
	if kb < leastReadAheadKB || kb > usualReadAheadKB {
		return usualReadAheadKB
	}
	return kb
}

// serving are the options that are this process's, not the device's.
func (im *Image) serving() *device.Options {
	return &device.Options{OnError: im.logFailures(), OnSlow: im.logSlow, SlowAfter: slowAfter}
}

// slowAfter is how long a request may wait before a line is logged of it, and
// whenever that time has doubled.
const slowAfter = 10 * time.Second

// logSlow says what a request waits for.
func (im *Image) logSlow(s device.Slow) {
	if im.failing.Load() {
		return
	}
	args := []any{"image", im.Ref, "device", im.device.Load(), "op", s.Op, "offset", s.Off, "bytes", s.N, "for", s.For.Round(time.Second)}
	if s.Op == "read" {
		args = append(args, "waits_for", im.Explain(s.Off, s.N))
	}
	im.node.o.Log.Warn("a request of the device takes long", args...)
}

// failureEvery is how often failed requests are logged: a file system that
// cannot read asks for thousands of blocks.
const failureEvery = 5 * time.Second

// logFailures logs the first failed request, and then one every failureEvery.
func (im *Image) logFailures() func(error) {
	var mu sync.Mutex // guards last and more
	var last time.Time
	more := 0
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if im.failing.Load() {
			return
		}
		if time.Since(last) < failureEvery {
			more++
			return
		}
		im.node.o.Log.Error("the device cannot be read", "image", im.Ref, "err", err, "others", more)
		last, more = time.Now(), 0
	}
}

// sectorSize is 4096, or 512 where the file system has smaller blocks.
func (im *Image) sectorSize() (int, error) {
	const full, small = 4096, 512
	if im.Size()%full != 0 {
		return small, nil
	}
	if !strings.HasPrefix(im.FSType, "ext") {
		return full, nil
	}
	var super [1024]byte // ext4 superblock at byte 1024: s_log_block_size, s_magic
	if _, err := im.ReadAt(super[:], 1024); err != nil {
		return 0, err
	}
	if binary.LittleEndian.Uint16(super[56:]) != 0xEF53 {
		return 0, fmt.Errorf("%s holds no %s file system (bad superblock)", im.Ref, im.FSType)
	}
	if binary.LittleEndian.Uint32(super[24:]) < 2 {
		return small, nil
	}
	return full, nil
}

// mountOptions are the file system's options for a read-only mount.
func (im *Image) mountOptions() string {
	switch im.FSType {
	case "ext4", "ext3":
		return "noload"
	case "xfs":
		return "norecovery"
	case "erofs":
		return "directio" // see device.Mount; of a block device it is nothing
	}
	return ""
}
