package device_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/lsmt"
)

// A written image has a lower layer of random data and an upper one that is
// written to through a device. The first half of the device is fio's, the
// second belongs to a writer that keeps a model of what it has written.
const (
	writtenSize = 64 << 20
	writtenHalf = writtenSize / 2
)

// writtenBackend names openWritten to the kill suite.
const writtenBackend = "written image"

// writtenImage closes the upper layer with the image.
type writtenImage struct{ *backstore.Image }

func openWritten(dir string) (device.Backend, int64, error) {
	im, err := openLayers(filepath.Join(dir, "lower"))
	if err != nil {
		return nil, 0, err
	}
	upper, err := backstore.OpenUpper(filepath.Join(dir, "upper"))
	if err != nil {
		return nil, 0, errors.Join(err, im.Close())
	}
	im.Writable(upper)
	return writtenImage{im}, im.Size(), nil
}

func openLayers(paths ...string) (*backstore.Image, error) {
	var sources []backstore.LayerSource
	for _, p := range paths {
		sources = append(sources, backstore.LayerSource{Path: p})
	}
	return backstore.OpenImage(context.Background(), sources)
}

// newWritten makes the layers in a new directory, and tells the content of the
// lower one.
func newWritten(t *testing.T) (dir string, content []byte) {
	dir = t.TempDir()
	content = make([]byte, writtenSize)
	devicetest.Fill(rand.New(rand.NewPCG(11, 12)), content)
	data, err := os.Create(filepath.Join(dir, "building"))
	require.NoError(t, err)
	w, err := lsmt.CreateSparse(data, &lsmt.WritableOptions{VirtualSize: writtenSize})
	require.NoError(t, err)
	_, err = w.WriteAt(content, 0)
	require.NoError(t, err)
	commit(t, w, filepath.Join(dir, "lower"))
	require.NoError(t, os.Remove(data.Name()))
	upper, err := backstore.CreateUpper(filepath.Join(dir, "upper"), writtenSize)
	require.NoError(t, err)
	require.NoError(t, upper.Close())
	return dir, content
}

// commit writes a layer to a file and closes it.
func commit(t *testing.T, w *lsmt.Writable, path string) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), f, lsmt.CommitOptions{}))
	require.NoError(t, f.Close())
	require.NoError(t, w.Close())
}

// TestWrittenUnderKills has fio and a writer of our own write, discard, sync and
// verify while servers are killed, commits the upper layer, and compares that
// with what was written. REPRISE_FIO_SECONDS says how long fio runs.
func TestWrittenUnderKills(t *testing.T) {
	devicetest.RequireRoot(t)
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio")
	}
	seconds := envInt("REPRISE_FIO_SECONDS", 5)
	for _, s := range device.Probe() {
		if s.Transport == "erofs" {
			continue
		}
		t.Run(s.Transport, func(t *testing.T) {
			if !s.Available || !s.Survives {
				t.Skip(s.Missing)
			}
			dir, model := newWritten(t)
			devicetest.Kill(t, devicetest.KillOptions{
				Transport: s.Transport, Kills: 1 << 20, Backend: writtenBackend, Path: dir,
				Load: func(t *testing.T, dev string, _ <-chan struct{}) { writeModel(t, dev, model, seconds) },
			})
			upper, err := backstore.OpenUpper(filepath.Join(dir, "upper"))
			require.NoError(t, err)
			commit(t, upper, filepath.Join(dir, "committed"))
			im, err := openLayers(filepath.Join(dir, "lower"), filepath.Join(dir, "committed"))
			require.NoError(t, err)
			defer im.Close()
			got := make([]byte, writtenSize)
			_, err = im.ReadAt(got, 0)
			require.NoError(t, err)
			for off := 0; off < writtenSize; off += 4096 {
				if !bytes.Equal(got[off:off+4096], model[off:off+4096]) {
					t.Fatalf("the committed layer differs from what was written, first at block %d", off/4096)
				}
			}
		})
	}
}

// writeModel runs fio on the first half of the device and writes to the second
// until it ends; model becomes what the device holds.
func writeModel(t *testing.T, dev string, model []byte, seconds int) {
	discards := canDiscard(t, dev)
	args := []string{"--name=verify", "--filename=" + dev, "--direct=1", "--ioengine=libaio", "--iodepth=8",
		fmt.Sprint("--size=", writtenHalf), "--verify=crc32c", "--verify_fatal=1",
		"--verify_backlog=128", "--verify_state_save=0", "--fsync=64", "--time_based", fmt.Sprint("--runtime=", seconds), "--output-format=terse"}
	if discards { // each block is discarded, then written
		args = append(args, "--rw=randtrimwrite", "--bs=16k")
	} else {
		args = append(args, "--rw=randwrite", "--bsrange=4k-64k")
	}
	var said bytes.Buffer
	fio := exec.Command("fio", args...)
	fio.Stdout, fio.Stderr = &said, &said
	if err := fio.Start(); err != nil {
		t.Error(err)
		return
	}
	over := make(chan error, 1)
	go func() { over <- fio.Wait() }()
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	w := &modelWriter{f: f, model: model[writtenHalf:], buf: directPages(t, 16), discards: discards, r: rand.New(rand.NewPCG(5, 5))}
	for err = nil; err == nil; {
		select {
		case err := <-over:
			if err != nil {
				t.Errorf("fio: %v\n%s", err, said.String())
			}
			t.Logf("beside fio: %d writes, %d discards, %d syncs, %d reads", w.writes, w.discarded, w.syncs, w.reads)
			if err := readAll(f, model[:writtenHalf]); err != nil {
				t.Error(err)
			}
			return
		default:
			err = w.step()
		}
	}
	t.Error(err)
	_ = fio.Process.Kill()
	<-over
}

// canDiscard tells whether the kernel passes discards on to the device.
func canDiscard(t *testing.T, dev string) bool {
	p, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/queue/discard_max_bytes")
	if err != nil {
		t.Error(err)
		return false
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(p)), 10, 64)
	return n > 0
}

func readAll(f *os.File, p []byte) error {
	buf, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for off := 0; off < len(p); off += len(buf) {
		if _, err := f.ReadAt(buf, int64(off)); err != nil {
			return err
		}
		copy(p[off:], buf)
	}
	return nil
}

func directPages(t *testing.T, n int) []byte {
	p, err := unix.Mmap(-1, 0, n*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Error(err)
		return nil
	}
	t.Cleanup(func() { unix.Munmap(p) })
	return p
}

// modelWriter writes to the second half of a device and to a model of it.
type modelWriter struct {
	f        *os.File
	model    []byte
	buf      []byte
	discards bool
	r        *rand.Rand

	writes, discarded, syncs, reads int
}

// step does one thing at a random place.
func (w *modelWriter) step() error {
	n := 4096 * (1 + w.r.IntN(len(w.buf)/4096))
	off := 4096 * w.r.IntN((len(w.model)-n)/4096)
	at, p := int64(writtenHalf+off), w.buf[:n]
	switch k := w.r.IntN(10); {
	case k < 4:
		devicetest.Fill(w.r, p)
		copy(w.model[off:], p)
		w.writes++
		_, err := w.f.WriteAt(p, at)
		return err
	case k < 6 && w.discards:
		clear(w.model[off : off+n])
		w.discarded++
		return discard(w.f, at, int64(n))
	case k < 7:
		w.syncs++
		return w.f.Sync()
	}
	w.reads++
	if _, err := io.ReadFull(io.NewSectionReader(w.f, at, int64(n)), p); err != nil {
		return err
	}
	if !bytes.Equal(p, w.model[off:off+n]) {
		return fmt.Errorf("%d bytes at %d are not what was written", n, at)
	}
	return nil
}

// discard is BLKDISCARD.
func discard(f *os.File, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return fmt.Errorf("discard: %w", errno)
	}
	return nil
}
