package node

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/tracefmt"
)

// traceOf has n events of 4 KiB.
func traceOf(n int) *tracefmt.Trace {
	t := &tracefmt.Trace{Header: tracefmt.Header{Workload: "w", Start: time.UnixMicro(1)}, End: &tracefmt.End{Reason: "ready: exit 0"}}
	for i := range int64(n) {
		t.Events = append(t.Events, tracefmt.Event{At: time.Duration(i) * time.Second, Off: i * 8192, Len: 4096})
	}
	return t
}

// live writes a trace as a recording does.
func live(t *testing.T, tr *tracefmt.Trace) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "trace")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	require.NoError(t, err)
	require.NoError(t, writeTrace(f, tr))
	require.NoError(t, f.Close())
	return path
}

func TestReplaceTrace(t *testing.T) {
	path := live(t, traceOf(3))
	require.NoError(t, ReplaceTrace(path, traceOf(5)))
	got, err := tracefmt.Open(path)
	require.NoError(t, err)
	require.Len(t, got.Events, 5)
	require.Equal(t, "ready: exit 0", got.End.Reason)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())

	cut := traceOf(2)
	cut.End = nil
	require.NoError(t, ReplaceTrace(path, cut))
	got, err = tracefmt.Open(path)
	require.NoError(t, err)
	require.Len(t, got.Events, 2)
	require.Nil(t, got.End)

	// What cannot be written changes nothing.
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	bad := traceOf(1)
	bad.Events[0].Len = -1
	require.Error(t, ReplaceTrace(path, bad))
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after))
	left, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.NoError(t, ReplaceTrace(path+".new one", traceOf(1)))
	got, err = tracefmt.Open(path + ".new one")
	require.NoError(t, err)
	require.Len(t, got.Events, 1)
	require.ErrorIs(t, ReplaceTrace(filepath.Join(path, "below"), traceOf(1)), unix.ENOTDIR)
}

// A recording that knows nothing more leaves the file alone, and so does one
// whose trace has no end.
func TestAnnotateFile(t *testing.T) {
	identity := func(off, n int64) []recorder.Extent { return []recorder.Extent{{LayerOff: off, Off: off, Len: n}} }
	reads := []tracefmt.Event{{Off: 8192, Len: 4096, Process: "sh", Pid: 7}}
	path := live(t, traceOf(3))
	before, err := os.Stat(path)
	require.NoError(t, err)
	require.NoError(t, (&Recording{}).annotateFile(path))
	after, err := os.Stat(path)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))

	r := &Recording{reads: reads, m: identity}
	require.NoError(t, r.annotateFile(path))
	got, err := tracefmt.Open(path)
	require.NoError(t, err)
	require.Equal(t, "sh", got.Events[1].Process)
	require.Equal(t, recorder.AttributeStats{Events: 3, Attributed: 1, Bytes: 3 * 4096, Known: 4096}, r.Readers)

	cut := traceOf(3)
	cut.End = nil
	path = live(t, cut)
	require.NoError(t, r.annotateFile(path))
	got, err = tracefmt.Open(path)
	require.NoError(t, err)
	require.Empty(t, got.Events[1].Process)
}

// The file has its name from its header on, and none before.
func TestTraceFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trace")
	f, err := CreateTrace(path)
	require.NoError(t, err)
	require.NoFileExists(t, path)
	w, err := tracefmt.NewWriter(f, tracefmt.Header{Workload: "w"})
	require.NoError(t, err)
	got, err := tracefmt.Open(path)
	require.NoError(t, err)
	require.Equal(t, "w", got.Workload)
	require.NoError(t, w.Finish(tracefmt.End{Reason: "stop"}))
	require.NoError(t, f.Close())
	got, err = tracefmt.Open(path)
	require.NoError(t, err)
	require.Equal(t, "stop", got.End.Reason)

	_, err = CreateTrace(path)
	require.ErrorIs(t, err, fs.ErrExist)
	_, err = CreateTrace(filepath.Join(path, "below"))
	require.ErrorIs(t, err, unix.ENOTDIR)

	// Nothing written, nothing left; and what has come meanwhile stays.
	other := path + "2"
	f, err = CreateTrace(other)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoFileExists(t, other)
	f, err = CreateTrace(other)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(other, []byte("mine"), 0o600))
	_, err = tracefmt.NewWriter(f, tracefmt.Header{})
	require.ErrorIs(t, err, fs.ErrExist)
	require.NoError(t, f.Close())
	p, err := os.ReadFile(other)
	require.NoError(t, err)
	require.Equal(t, "mine", string(p))
}
