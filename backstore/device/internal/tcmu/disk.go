package tcmu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// A disk is what the SCSI layer made of a target.
type disk struct {
	name string // sdX
	dir  string // of the SCSI device in sysfs
}

// appearPatience is how long the kernel may take from the link to the disk. It
// has read a partition table by then.
const appearPatience = 30 * time.Second

// disk waits until the target's disk can be opened. served is closed when
// nobody serves the target any more.
func (t target) disk(ctx context.Context, served <-chan struct{}) (*disk, error) {
	ctx, cancel := context.WithTimeout(ctx, appearPatience)
	defer cancel()
	address, err := os.ReadFile(t.tpg() + "/address") // host:channel:id
	if err != nil {
		return nil, err
	}
	d := &disk{dir: "/sys/bus/scsi/devices/" + strings.TrimSpace(string(address)) + ":0"}
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		err := d.ready()
		if err == nil {
			return d, nil
		}
		select {
		case <-served:
			return nil, fmt.Errorf("wait for the SCSI disk: %w", unix.ENODEV)
		default:
		}
		if pause(ctx, wait) != nil {
			return nil, fmt.Errorf("wait for the SCSI disk: %w: %w", ctx.Err(), err)
		}
	}
}

// patience is how long the SCSI layer waits for a command, in seconds. When it
// is over error recovery would stop all other commands, so it is as long as the
// kernel can count (in ticks, an int).
const patience = 1_000_000

// ready returns nil when the disk is there.
func (d *disk) ready() error {
	if _, err := os.Stat(d.dir); err != nil {
		return err
	}
	if err := apart.SetAttribute(d.dir+"/timeout", strconv.Itoa(patience)); err != nil {
		return err
	}
	blocks, err := os.ReadDir(d.dir + "/block")
	if err != nil {
		return err
	}
	if len(blocks) == 0 {
		return fmt.Errorf("%s: %w", d.dir, unix.ENODEV)
	}
	d.name = blocks[0].Name()
	return apart.Run(func() error { // the first to open it reads the partition table
		fd, err := unix.Open("/dev/"+d.name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/%s: %w", d.name,
				feature.Check(err, "/dev/"+d.name, "", "the kernel has it but /dev does not: in a container, bind the host's /dev"))
		}
		return unix.Close(fd)
	})
}

// tune sets what does not come from the device itself. A change to the queue
// waits for the commands that are under way, so this belongs on a thread apart.
func (d *disk) tune(cfg *Config) error {
	queue := "/sys/block/" + d.name + "/queue/"
	if err := change(queue+"read_ahead_kb", strconv.Itoa(cfg.ReadAheadKB)); err != nil {
		return err
	}
	// No more commands than there are workers: else a command could wait behind
	// slow ones. EINVAL is more than tcm_loop ever has.
	if err := change(d.dir+"/queue_depth", strconv.Itoa(cfg.Workers)); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	// Our backends have no heads to move. EINVAL is a kernel without "none".
	if err := change(queue+"scheduler", "none"); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// change sets an attribute that is not as it should be.
func change(path, value string) error {
	s, err := apart.Attribute(path)
	if err != nil {
		return err
	}
	if s == value || strings.Contains(s, "["+value+"]") { // one of a list
		return nil
	}
	return apart.SetAttribute(path, value)
}
