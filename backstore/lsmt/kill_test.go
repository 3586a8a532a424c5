package lsmt

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const killDir = "REPRISE_TEST_KILL_DIR"

// killOp is the i-th thing that the child does; fill 0 is a discard.
func killOp(i uint64) (off, n int64, fill byte, sync bool) {
	r := rand.New(rand.NewPCG(i, 11))
	off = r.Int64N(modelSectors)
	n = min(1+r.Int64N(1+r.Int64N(200)), modelSectors-off)
	if r.IntN(3) > 0 {
		fill = byte(1 + r.IntN(199))
	}
	return off, n, fill, r.IntN(10) == 0
}

func killLower() fillReader {
	lower := make(fillReader, modelSectors)
	for i := range lower {
		lower[i] = byte(200 + i%56)
	}
	return lower
}

func openKilled(t *testing.T, dir string) *Writable {
	t.Helper()
	data, err := os.OpenFile(filepath.Join(dir, "data"), os.O_RDWR, 0)
	require.NoError(t, err)
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_RDWR, 0)
	require.NoError(t, err)
	w, err := OpenSparse(data, log)
	require.NoError(t, err)
	w.SetBelow(killLower())
	return w
}

// TestKillChild is not a test of its own: it changes a layer until it is killed.
// The file "progress" says which change was begun last, and which was done.
func TestKillChild(t *testing.T) {
	dir := os.Getenv(killDir)
	if dir == "" {
		t.Skip("it is started by TestKills")
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1) // the parent has ended
	}()
	w := openKilled(t, dir)
	progress, err := os.OpenFile(filepath.Join(dir, "progress"), os.O_RDWR, 0)
	require.NoError(t, err)
	var p [16]byte
	_, err = progress.ReadAt(p[:], 0)
	require.NoError(t, err)
	note := func(at int64, i uint64) {
		_, err := progress.WriteAt(binary.LittleEndian.AppendUint64(nil, i), at)
		require.NoError(t, err)
	}
	for i := binary.LittleEndian.Uint64(p[:]) + 1; ; i++ {
		note(0, i)
		off, n, fill, sync := killOp(i)
		if fill == 0 {
			require.NoError(t, w.Discard(off*SectorSize, n*SectorSize))
		} else {
			_, err := w.WriteAt(bytes.Repeat([]byte{fill}, int(n*SectorSize)), off*SectorSize)
			require.NoError(t, err)
		}
		if sync {
			require.NoError(t, w.Sync())
		}
		note(8, i)
	}
}

// TestKills: a process that writes and discards is killed at any moment; what it
// had done is there, of what it was doing any part.
func TestKills(t *testing.T) {
	dir := t.TempDir()
	data, log := filepath.Join(dir, "data"), filepath.Join(dir, "log")
	f, err := os.Create(data)
	require.NoError(t, err)
	l, err := os.Create(log)
	require.NoError(t, err)
	w, err := CreateSparse(f, &WritableOptions{VirtualSize: modelSectors * SectorSize, Discards: l})
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.NoError(t, os.WriteFile(filepath.Join(dir, "progress"), make([]byte, 16), 0o600))

	m := &crashRun{t: t, r: rand.New(rand.NewPCG(1, 1)), lower: killLower(), now: bytes.Clone(killLower())}
	done := uint64(0)
	for range 15 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKillChild$")
		cmd.Env = append(os.Environ(), killDir+"="+dir)
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		least := done + 1 + m.r.Uint64N(200)
		var p []byte
		require.Eventually(t, func() bool {
			p, err = os.ReadFile(filepath.Join(dir, "progress"))
			return err == nil && binary.LittleEndian.Uint64(p[8:]) >= least
		}, time.Minute, time.Millisecond)
		require.NoError(t, cmd.Process.Kill())
		require.Error(t, cmd.Wait())
		_ = stdin.Close() // Wait has closed it

		p, err = os.ReadFile(filepath.Join(dir, "progress"))
		require.NoError(t, err)
		begun := binary.LittleEndian.Uint64(p)
		for end := binary.LittleEndian.Uint64(p[8:]); done < end; {
			done++
			off, n, fill, _ := killOp(done)
			copy(m.now[off:], bytes.Repeat([]byte{fill}, int(n)))
		}
		m.w = openKilled(t, dir)
		got := m.read()
		if begun > done {
			off, n, fill, _ := killOp(begun)
			for s := off; s < off+n; s++ {
				require.Contains(t, []byte{m.now[s], fill}, got[s], "change %d: sector %d", begun, s)
				m.now[s] = got[s]
			}
			done = begun
		}
		m.check("killed")
		require.NoError(t, m.w.Close())
		require.NoError(t, os.WriteFile(filepath.Join(dir, "progress"), binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, done), done), 0o600))
	}
	t.Logf("%d changes", done)
}
