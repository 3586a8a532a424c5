package node

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/reprise-project/reprise/backstore/device"
)

// readAheadKB is the kernel's read-ahead on every device. It is part of what
// demand looks like, so it is fixed and written into traces.
const readAheadKB = 128

// attach shows the image as a read-only block device, or as a writable one
// where it has an upper layer.
func (im *Image) attach(ctx context.Context, readOnly bool) (*device.Device, error) {
	sector, err := im.sectorSize()
	if err != nil {
		return nil, err
	}
	d, err := device.Attach(ctx, im.Image, im.Size(), &device.Options{
		Transport: im.node.o.Transport, ReadOnly: readOnly,
		SectorSize: sector, ReadAheadKB: readAheadKB,
		Name:    "reprise:" + im.Ref,
		OnError: im.logFailures(),
	})
	if err != nil {
		return nil, fmt.Errorf("attach device for %s: %w", im.Ref, err)
	}
	im.phases.mark("device attached")
	return d, nil
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
	}
	return ""
}
