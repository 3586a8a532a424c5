package tcmu

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// configfs.
const (
	targetRoot = "/sys/kernel/config/target"
	core       = targetRoot + "/core"
	loopback   = targetRoot + "/loopback"
	hbaPrefix  = core + "/user_"
)

// Sizes of the ring and of its data area. Each block of the data area holds the
// data of one command in one piece, where the kernel (5.13) lets us say so.
const (
	ringMB        = 1
	maxTransfer   = 256 << 10 // bytes in a command
	minDataBlocks = 32
)

// A target is the directories of a device in configfs.
type target struct {
	name string
	hba  int
}

func (t target) hbaDir() string  { return hbaPrefix + strconv.Itoa(t.hba) }
func (t target) backend() string { return t.hbaDir() + "/" + t.name }
func (t target) fabric() string  { return loopback + "/naa." + hex.EncodeToString(t.naa()) }
func (t target) tpg() string     { return t.fabric() + "/tpgt_1" }
func (t target) lun() string     { return t.tpg() + "/lun/lun_0" }

// naa is the device's name in the SCSI world, one of the "locally assigned".
func (t target) naa() []byte {
	sum := sha256.Sum256([]byte("reprise tcmu " + t.name))
	sum[0] = 0x30 | sum[0]&0xf
	return sum[:8]
}

// newTarget finds a free number, from one on that depends on the name and that
// people, who begin with 0, do not use. It announces it, and makes its directory.
func newTarget(name string, announce func(hba int) error) (target, error) {
	const attempts = 1000
	t := target{name: name}
	first := int(binary.BigEndian.Uint32(t.naa()[4:])>>2 | 1<<29)
	for t.hba = first; t.hba < first+attempts; t.hba++ {
		if t.used() {
			continue
		}
		if err := announce(t.hba); err != nil {
			return t, err
		}
		err := os.Mkdir(t.hbaDir(), 0o755)
		if errors.Is(err, fs.ErrExist) && t.used() {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return t, fmt.Errorf("make a SCSI target: %w", feature.Privilege(err, targetRoot))
		}
		return t, nil
	}
	return t, errors.New("make a SCSI target: no number is free")
}

// used reports whether the number is a device's. It is not if its directory is
// empty: then somebody has died early.
func (t target) used() bool {
	entries, err := os.ReadDir(t.hbaDir())
	return err == nil && slices.ContainsFunc(entries, fs.DirEntry.IsDir)
}

// makeBackend makes the ring, which nobody sees yet.
func (t target) makeBackend(cfg *Config, size int64) error {
	if err := os.Mkdir(t.backend(), 0o755); err != nil {
		return err
	}
	blocks := max(cfg.Workers, minDataBlocks)
	control := []string{
		"dev_config=reprise/" + t.name,
		fmt.Sprintf("dev_size=%d", size),
		fmt.Sprintf("hw_block_size=%d", cfg.SectorSize),
		"nl_reply_supported=-1", // wait for no daemon
		fmt.Sprintf("max_data_area_mb=%d", (blocks*maxTransfer+1<<20-1)>>20),
		fmt.Sprintf("data_pages_per_blk=%d", maxTransfer/unix.Getpagesize()),
		fmt.Sprintf("cmd_ring_size_mb=%d", ringMB),
	}
	for _, c := range control {
		if err := apart.SetAttribute(t.backend()+"/control", c); err != nil {
			return err
		}
	}
	// A command takes as long as it takes. One that finds no room waits in the
	// kernel and is tried again after the default time.
	if err := apart.SetAttribute(t.backend()+"/attrib/cmd_time_out", "0"); err != nil {
		return err
	}
	if err := apart.SetAttribute(t.backend()+"/enable", "1"); err != nil {
		return err
	}
	_, err := os.Stat(t.backend() + resetRing) // to adopt it, or to take it away
	return feature.Check(err, "tcmu's reset_ring", since, "")
}

// makeFabric makes the SCSI host and its logical unit, which is still empty.
func (t target) makeFabric() error {
	if err := os.Mkdir(loopback, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, dir := range []string{t.fabric(), t.tpg()} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := apart.SetAttribute(t.tpg()+"/nexus", "naa."+hex.EncodeToString(t.naa())); err != nil {
		return err
	}
	return os.Mkdir(t.lun(), 0o755)
}

// link shows the disk, if that was not done. It returns when the kernel has
// asked the device what it is.
func (t target) link() error {
	err := os.Symlink(t.backend(), t.lun()+"/"+t.name)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// remove takes everything away that there is. Commands must be served.
func (t target) remove() error {
	var errs []error
	gone := func(err error) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	gone(unix.Unlink(t.lun() + "/" + t.name))
	gone(unix.Rmdir(t.lun()))
	gone(unix.Rmdir(t.tpg()))
	gone(unix.Rmdir(t.fabric()))
	gone(unix.Rmdir(t.backend()))
	if err := unix.Rmdir(t.hbaDir()); !errors.Is(err, unix.ENOTEMPTY) { // another device's, too
		gone(err)
	}
	return errors.Join(errs...)
}

// Remove takes away what a dead process left of the device called name. Its
// commands fail. It is an error if a living process serves it.
func Remove(name string) error {
	found, err := filepath.Glob(hbaPrefix + "*/" + name)
	if err != nil {
		return err
	}
	for _, dir := range found {
		hba, err := strconv.Atoi(strings.TrimPrefix(filepath.Dir(dir), hbaPrefix))
		if err != nil {
			continue
		}
		if err := (target{name, hba}).removeDead(); err != nil {
			return err
		}
	}
	return nil
}

// removeDead is remove for a device that nobody serves: it fails the commands
// that the removal waits for.
func (t target) removeDead() error {
	if u, err := t.uio(); err == nil {
		fd, err := unix.Open(u.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", u.path, err)
		}
		defer unix.Close(fd)
	}
	return t.removeUnserved(nobody)
}

// nobody is closed.
var nobody = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// removeUnserved is remove that fails the commands which it waits for itself
// once the channel, which says that nobody else does, is closed.
func (t target) removeUnserved(done <-chan struct{}) error {
	removed := make(chan error, 1)
	go func() { removed <- apart.Run(t.remove) }()
	const again = 5 * time.Millisecond
	tick := time.NewTicker(again)
	defer tick.Stop()
	for {
		select {
		case err := <-removed:
			return err
		case <-tick.C:
		}
		select {
		case <-done:
			t.resetRing(ringFail)
		default:
		}
	}
}

// What becomes of commands that resetRing throws out of the ring.
const (
	ringRetry = "1" // BUSY: the SCSI layer sends them again
	ringFail  = "2"
)

func (t target) resetRing(how string) error {
	return apart.SetAttribute(t.backend()+resetRing, how)
}

const resetRing = "/action/reset_ring"
