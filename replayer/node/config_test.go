package node

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/lsmt"
)

// writeConfig writes a config.v1.json of one layer and, if upper is not empty,
// a writable one.
func writeConfig(t *testing.T, upper string) string {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "layer"), testLayer(t, 8192, below), 0o644))
	if upper != "" {
		f, err := os.Create(filepath.Join(dir, upper))
		require.NoError(t, err)
		w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: testSize})
		require.NoError(t, err)
		_, err = w.WriteAt(above, 12288)
		require.NoError(t, err)
		require.NoError(t, w.Close())
	}
	p, err := json.Marshal(backstore.Config{
		Lowers: []backstore.ConfigLayer{{File: "layer"}}, Upper: backstore.ConfigUpper{Data: upper},
	})
	require.NoError(t, err)
	path := filepath.Join(dir, "config.v1.json")
	require.NoError(t, os.WriteFile(path, p, 0o644))
	return path
}

func TestOpenConfig(t *testing.T) {
	n, _ := openNode(t)
	for upper, want := range map[string][]byte{"": below[4096:], "upper": above} {
		im, err := n.OpenImage(t.Context(), writeConfig(t, upper), &ImageOptions{Trace: "auto"})
		require.NoError(t, err)
		p := make([]byte, 4096)
		_, err = im.ReadAt(p, 12288)
		require.NoError(t, err)
		require.Equal(t, want, p)
		trace, why := im.Trace(t.Context())
		require.Nil(t, trace)
		require.Contains(t, why, "name a file with --trace")
		require.False(t, im.trace.hasFailed())
		require.NoError(t, im.Close())
	}
	_, err := n.OpenImage(t.Context(), "missing.json", nil)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// Many may read what one could write to, but only one may write, alone.
func TestUpperIsLocked(t *testing.T) {
	n, _ := openNode(t)
	config := writeConfig(t, "upper")
	open := func(write bool) (*Image, error) { return n.openImage(t.Context(), config, ImageOptions{}, write) }
	one, err := open(false)
	require.NoError(t, err)
	two, err := open(false)
	require.NoError(t, err)
	_, err = open(true)
	require.ErrorContains(t, err, "another process has it open")
	require.NoError(t, one.Close())
	require.NoError(t, two.Close())

	writer, err := open(true)
	require.NoError(t, err)
	for _, write := range []bool{true, false} {
		_, err = open(write)
		require.ErrorContains(t, err, "another process has it open")
	}
	require.NoError(t, writer.Close())
	one, err = open(false)
	require.NoError(t, err)
	require.NoError(t, one.Close())
}
