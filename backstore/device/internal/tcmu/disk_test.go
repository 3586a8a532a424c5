package tcmu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// needKernel skips the test unless the kernel has targets.
func needKernel(t *testing.T) {
	t.Helper()
	if err := Missing(); err != nil {
		if os.Getenv("REPRISE_VM") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// nothingLeft fails the test if there is a target of ours.
func nothingLeft(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{hbaPrefix + "*", loopback + "/naa.3*", "/sys/class/uio/uio*"} {
		left, err := filepath.Glob(pattern)
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

func testConfig(name string) Config {
	return Config{
		Name: name, SectorSize: 4096, ReadAheadKB: 64, Workers: 8,
		Keep:   func(int) error { return nil },
		Appear: func(int) error { return nil },
	}
}

// attachTest attaches a disk until the test ends.
func attachTest(t *testing.T, m *memory, c request.Config) *Device {
	t.Helper()
	needKernel(t)
	srv := request.New(m, c)
	d, err := Attach(t.Context(), srv, testConfig("reprise-test"))
	require.NoError(t, err)
	t.Cleanup(func() {
		claim, err := d.Claim()
		require.NoError(t, err)
		require.NoError(t, d.Close(claim, time.Minute))
		<-d.Ended()
		srv.Stop()
		require.NoError(t, d.Err())
		nothingLeft(t)
	})
	return d
}

func directIO(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// page is memory that direct I/O accepts.
func page() []byte {
	b := make([]byte, 2*4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+4096]
}

// TestQueue looks at how the disk is set up.
func TestQueue(t *testing.T) {
	disk := &memory{data: make([]byte, 1<<20)}
	d := attachTest(t, disk, disk.config())
	name := filepath.Base(d.Path())
	for file, want := range map[string]string{
		"device/timeout":            "1000000",
		"device/queue_depth":        "8",
		"device/vendor":             "REPRISE",
		"device/model":              "tcmu device",
		"queue/read_ahead_kb":       "64",
		"queue/max_sectors_kb":      "256",
		"queue/logical_block_size":  "4096",
		"queue/rotational":          "0",
		"queue/write_cache":         "write back",
		"queue/fua":                 "1",
		"queue/discard_granularity": "4096",
		"size":                      "2048",
		"ro":                        "0",
	} {
		got, err := os.ReadFile("/sys/block/" + name + "/" + file)
		require.NoError(t, err)
		require.Equal(t, want, strings.TrimSpace(string(got)), file)
	}
	scheduler, err := os.ReadFile("/sys/block/" + name + "/queue/scheduler")
	require.NoError(t, err)
	require.Contains(t, string(scheduler), "[none]")
}

func TestSectorSizes(t *testing.T) {
	needKernel(t)
	disk := crashDisk()
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	for _, sector := range []int{512, 1024, 2048, 4096} {
		c := testConfig("reprise-test")
		c.SectorSize = sector
		d, err := Attach(t.Context(), srv, c)
		require.NoError(t, err)
		f := directIO(t, d.Path(), os.O_RDONLY)
		got, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
		require.NoError(t, err)
		require.Equal(t, sector, got)
		p := page()
		_, err = f.ReadAt(p[:sector], 1<<20-int64(sector))
		require.NoError(t, err)
		require.Equal(t, bytes.Repeat([]byte{0xff}, sector), p[:sector])
		require.NoError(t, d.Close(-1, time.Minute))
	}
	nothingLeft(t)
}

// TestErrno wants every error once, as what it is.
func TestErrno(t *testing.T) {
	var fault atomic.Pointer[error]
	var calls atomic.Int32
	disk := &memory{data: make([]byte, 1<<20)}
	disk.hook = func(string, int64) error {
		p := fault.Load()
		if p == nil {
			return nil
		}
		calls.Add(1)
		return *p
	}
	d := attachTest(t, disk, disk.config())
	f := directIO(t, d.Path(), os.O_RDWR)
	for name, tt := range map[string]struct {
		do   func() error
		err  error
		want unix.Errno
	}{
		"read":       {func() error { _, err := f.ReadAt(page(), 4096); return err }, errBoom, unix.EIO},
		"write":      {func() error { _, err := f.WriteAt(page(), 4096); return err }, errBoom, unix.EIO},
		"disk full":  {func() error { _, err := f.WriteAt(page(), 4096); return err }, unix.ENOSPC, unix.ENOSPC},
		"sync":       {f.Sync, errBoom, unix.EIO},
		"punch hole": {func() error { return punch(f) }, errBoom, unix.EIO},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "sync" { // there must be something to flush
				_, err := f.WriteAt(page(), 0)
				require.NoError(t, err)
			}
			calls.Store(0)
			fault.Store(&tt.err)
			err := tt.do()
			fault.Store(nil)
			require.ErrorIs(t, err, tt.want)
			require.EqualValues(t, 1, calls.Load(), "calls of the backend")
		})
	}
}

func punch(f *os.File) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 4096)
}

// TestTakenAway has somebody else remove the target.
func TestTakenAway(t *testing.T) {
	needKernel(t)
	disk := &memory{data: make([]byte, 1<<20)}
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	d, err := Attach(t.Context(), srv, testConfig("reprise-test"))
	require.NoError(t, err)
	require.NoError(t, d.target.remove())
	<-d.Ended()
	require.Error(t, d.Err())
	_, err = d.Claim()
	require.Error(t, err)
	require.NoError(t, d.Close(-1, time.Second))
	nothingLeft(t)
}

// TestDeleted has somebody tell the SCSI layer to forget the disk.
func TestDeleted(t *testing.T) {
	needKernel(t)
	disk := &memory{data: make([]byte, 1<<20)}
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	d, err := Attach(t.Context(), srv, testConfig("reprise-test"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile("/sys/block/"+filepath.Base(d.Path())+"/device/delete", []byte("1"), 0))
	_, err = d.Claim()
	require.Error(t, err)
	require.NoError(t, d.Close(-1, 10*time.Second))
	<-d.Ended()
	nothingLeft(t)
}

// TestAttachFails has each step fail.
func TestAttachFails(t *testing.T) {
	needKernel(t)
	disk := &memory{data: make([]byte, 1<<20)}
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	for name, change := range map[string]func(*Config){
		"name":   func(c *Config) { c.Name = "a/b" },
		"appear": func(c *Config) { c.Appear = func(int) error { return errBoom } },
		"keep":   func(c *Config) { c.Keep = func(int) error { return errBoom } },
		"sector": func(c *Config) { c.SectorSize = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig("reprise-test")
			change(&c)
			_, err := Attach(t.Context(), srv, c)
			require.Error(t, err)
			nothingLeft(t)
		})
	}
	t.Run("ctx", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		c := testConfig("reprise-test")
		c.Keep = func(int) error { cancel(); return nil }
		_, err := Attach(ctx, srv, c)
		if err == nil {
			t.Error("attached though it was interrupted")
		}
		nothingLeft(t)
	})
	t.Run("served by another", func(t *testing.T) {
		c := testConfig("reprise-test")
		d, err := Attach(t.Context(), srv, c)
		require.NoError(t, err)
		_, err = Attach(t.Context(), srv, c)
		require.ErrorIs(t, err, unix.EBUSY)
		c.HBA = d.target.hba
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err = Adopt(ctx, srv, c, -1)
		require.ErrorIs(t, err, unix.EBUSY)
		require.False(t, errors.Is(err, ErrGone))
		_, err = directIO(t, d.Path(), os.O_RDONLY).ReadAt(page(), 0)
		require.NoError(t, err, "the one that is served")
		require.NoError(t, d.Close(-1, time.Second))
		nothingLeft(t)
	})
}

func TestAdoptNothing(t *testing.T) {
	needKernel(t)
	disk := &memory{data: make([]byte, 1<<20)}
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	c := testConfig("reprise-test")
	c.HBA = 1 << 29
	_, err := Adopt(t.Context(), srv, c, -1)
	require.ErrorIs(t, err, ErrGone)
	nothingLeft(t)
}
