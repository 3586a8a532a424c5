package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/tracefmt"
)

// TestFiles maps the reference's image and compares what its files are said to
// be, in the layers, with their digests.
func TestFiles(t *testing.T) {
	config := vectorImage(t)
	n, log := openNode(t)
	f, info, err := n.Files(t.Context(), config)
	require.NoError(t, err)
	skipped, cause := f.Skipped()
	require.Zero(t, skipped, cause)
	require.Len(t, info.Layers, 3)
	im, err := n.OpenImage(t.Context(), config, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, im.Close()) }()
	back := inverse(im.deviceMap(), im.Size())
	tree, err := os.ReadFile(filepath.Join(filepath.Dir(config), "tree-layers012.tsv"))
	require.NoError(t, err)
	files := 0
	for line := range strings.Lines(string(tree)) {
		v := strings.Split(strings.TrimSpace(line), "\t")
		if len(v) < 9 || v[1] != "f" {
			continue
		}
		files++
		size, err := strconv.ParseInt(v[5], 10, 64)
		require.NoError(t, err)
		require.Equal(t, v[8], digestOf(t, f, im, back, v[0], size), v[0])
	}
	require.Positive(t, files)
	require.LessOrEqual(t, f.Len(), files)
	require.Empty(t, log.String())

	// The map is good without the image.
	require.Equal(t, im.deviceMap()(0, im.Size()), info.Map(0, im.Size()))
	for _, x := range info.Map(1030, 100) {
		require.True(t, x.Off >= 1030 && x.Off+x.Len <= 1130)
	}
	require.Empty(t, info.Map(im.Size(), 1))
	require.Empty(t, info.Map(-1, 1))
}

// inverse finds the device offset of what is in a layer.
func inverse(m recorder.DeviceMap, size int64) func(layer int, off int64) (at, n int64) {
	all := m(0, size)
	return func(layer int, off int64) (at, n int64) {
		for _, x := range all {
			if x.Layer == layer && x.LayerOff <= off && off < x.LayerOff+x.Len {
				return x.Off + off - x.LayerOff, x.LayerOff + x.Len - off
			}
		}
		return 0, 0
	}
}

// digestOf reads a file by way of the layers.
func digestOf(t *testing.T, f *recorder.Files, im *Image, back func(int, int64) (int64, int64), path string, size int64) string {
	t.Helper()
	events, missing := f.Events([]tracefmt.Access{{Path: path}})
	require.Empty(t, missing)
	content := make([]byte, size+4096) // the last block is whole
	for _, e := range events {
		for done := int64(0); done < e.Len; {
			at, n := back(e.Layer, e.Off+done)
			require.Positive(t, n)
			n = min(n, e.Len-done)
			_, err := im.ReadAt(content[e.FileOff+done:e.FileOff+done+n], at)
			require.NoError(t, err)
			done += n
		}
	}
	require.Empty(t, bytes.Trim(content[size:], "\x00"))
	sum := sha256.Sum256(content[:size])
	return hex.EncodeToString(sum[:])
}

// Whoever does not want to wait any more need not.
func TestFilesErrors(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := n.Files(ended, config)
	require.ErrorIs(t, err, context.Canceled)
	_, _, err = n.Files(t.Context(), "missing.json")
	require.ErrorIs(t, err, os.ErrNotExist)

	// What is no file system.
	l := newLayout(t)
	l.index(l.image(ocispec.ImageConfig{}, l.converted(testLayer(t, 0, below))))
	_, _, err = n.Files(t.Context(), "oci:"+l.dir)
	require.ErrorContains(t, err, "map the files of oci:"+l.dir)
}
