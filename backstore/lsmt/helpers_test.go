package lsmt

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vectors returns the folder of the reference implementation's files, or skips.
func vectors(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(dir)
		require.NotEqual(t, dir, up, "no go.mod above the test")
		dir = up
	}
	path := filepath.Join(dir, "..", "shared", "vectors", name)
	if _, err := os.Stat(path); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("no vectors: %v", err)
		}
		t.Skipf("no vectors: %v", err)
	}
	return path
}

// newFile makes an empty file that the test closes.
func newFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "lsmt")
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// fileOf makes a file with content.
func fileOf(t testing.TB, content []byte) *os.File {
	t.Helper()
	f := newFile(t)
	_, err := f.Write(content)
	require.NoError(t, err)
	return f
}

// reopen opens the file again, so that a test can go on after a Close.
func reopen(t testing.TB, f *os.File) *os.File {
	t.Helper()
	f, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// openLayer opens a layer in memory.
func openLayer(t testing.TB, b []byte) *Layer {
	t.Helper()
	l, err := OpenLayer(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	return l
}

// commit returns what w commits to.
func commit(t testing.TB, w *Writable, o CommitOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, w.Commit(context.Background(), &b, o))
	return b.Bytes()
}

// flatten reads the device of a stack; segments must cover it exactly.
func flatten(x *Index, layers []*Layer, size int64) ([]byte, error) {
	out := make([]byte, size)
	at := int64(0)
	for _, s := range x.Lookup(nil, 0, size) {
		if s.Off != at || s.Len <= 0 {
			return nil, fmt.Errorf("segment at %d+%d, want it at %d", s.Off, s.Len, at)
		}
		at = s.End()
		if s.Kind != Data {
			continue
		}
		p := out[s.Off:][:s.Len]
		if n, err := layers[s.Layer].ReadAt(p, s.LayerOff); n < len(p) {
			return nil, err
		}
	}
	if at != size {
		return nil, fmt.Errorf("segments end at %d of %d", at, size)
	}
	return out, nil
}

// device reads the device of a stack.
func device(t testing.TB, layers ...*Layer) []byte {
	t.Helper()
	x, err := Merge(layers)
	require.NoError(t, err)
	b, err := flatten(x, layers, VirtualSize(layers))
	require.NoError(t, err)
	return b
}

// content reads all of a writable layer.
func content(t testing.TB, w *Writable) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(alignedReader{w}, 0, w.VirtualSize()))
	require.NoError(t, err)
	return b
}

// alignedReader reads whole sectors of a writable layer.
type alignedReader struct{ w *Writable }

func (r alignedReader) ReadAt(p []byte, off int64) (int, error) {
	lead := off % SectorSize
	buf := make([]byte, (lead+int64(len(p))+SectorSize-1)/SectorSize*SectorSize)
	n, err := r.w.ReadAt(buf, off-lead)
	return copy(p, buf[lead:max(int64(n), lead)]), err
}

// sameBytes compares long slices without printing them.
func sameBytes(t testing.TB, want, got []byte, msg string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	i := 0
	for i < len(want) && i < len(got) && want[i] == got[i] {
		i++
	}
	t.Fatalf("%s: %d bytes, want %d; first difference at %d (sector %d)\nwant %s\ngot  %s", msg,
		len(got), len(want), i, i/SectorSize, excerpt(want, i), excerpt(got, i))
}

func excerpt(b []byte, i int) string {
	b = b[min(i, len(b)):]
	return hex.EncodeToString(b[:min(32, len(b))])
}
