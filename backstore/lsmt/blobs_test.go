package lsmt

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/reprise-project/reprise/zfile"
	"github.com/stretchr/testify/require"
)

// openBlob opens the layer in a blob: a ZFile, in a tar or not.
func openBlob(t testing.TB, b []byte) (*Layer, *zfile.Reader) {
	t.Helper()
	z, err := zfile.Open(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	l, err := OpenLayer(z, z.Size())
	require.NoError(t, err)
	return l, z
}

func gunzip(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(name)
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	b, err := io.ReadAll(z)
	require.NoError(t, err)
	return b
}

// TestVectorBlob reads the tar-wrapped layer and writes it again: commit into a
// compressor gives the reference's blob.
func TestVectorBlob(t *testing.T) {
	want := rawVector(t, "A-lz4-4k.tar.commit")
	l, _ := openBlob(t, want)
	sameBytes(t, rodump(t, "A"), device(t, l), "device")

	f := newFile(t)
	z, err := zfile.NewWriter(f, &zfile.Options{Algo: zfile.LZ4, BlockSize: 4096, Tar: true})
	require.NoError(t, err)
	w := pair(t, "A")
	require.NoError(t, w.Commit(context.Background(), z, vectorOptions["A"]))
	require.NoError(t, z.Close())
	require.NoError(t, w.Close())
	sameBytes(t, want, fileBytes(t, f), "blob")
}

// TestVectorImage reads the three-layer image: each layer, the stack after each
// layer, the indexes; and commits each layer's content to the same bytes again.
func TestVectorImage(t *testing.T) {
	dir := vectors(t, "ext4-64m")
	decoded := []string{
		"6d9354003780a4858e3477f5d65546327ba88f8cbacd0049856ba79738f99c7d",
		"4180cd12cbd4fe86e26158ca4a51a50d2d82959cecd0b35407bc496749f70cfc",
		"17e554627b9ede1e29ebe64410a916f371ead3f4267d4b261b93760f8f5d0afa",
	}
	flat := []string{
		"05fb3c57ed3a62cf3e896746b103bc4b95afe12b4d09ad70bc36d31b4f420953",
		"77c3d38c30c49f1eb6ea89eb11c5a14a570e1cd491e2057b146fb58da725e4de",
		"e12d5f6c29ce9bbcf3066925784bf7e5974ba30c81735edfb630c5ba656926c8",
	}
	var layers []*Layer
	var each string
	for i := range decoded {
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("layer%d.overlaybd.commit", i)))
		require.NoError(t, err)
		l, z := openBlob(t, b)
		layers = append(layers, l)
		each += listing(l.Index(), 1)

		raw, err := io.ReadAll(io.NewSectionReader(z, 0, z.Size()))
		require.NoError(t, err)
		require.Equal(t, decoded[i], sum(raw))
		sameBytes(t, raw, recommit(t, raw), "committed again")
		require.Equal(t, flat[i], sum(device(t, layers...)))
	}
	x, err := Merge(layers)
	require.NoError(t, err)
	text, err := os.ReadFile(filepath.Join(dir, "index-merged-lookup.txt"))
	require.NoError(t, err)
	require.Equal(t, listed(text), listing(x, len(layers)))
	text, err = os.ReadFile(filepath.Join(dir, "index-each-layer.txt"))
	require.NoError(t, err)
	require.Equal(t, listed(text), each)
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// TestVectorBase reads the stock base layer and the layer on top of it, and
// lays out the base layer's content again: long runs and thousands of discards
// must be cut as the reference cut them.
func TestVectorBase(t *testing.T) {
	dir := vectors(t, "baselayer")
	r := tar.NewReader(bytes.NewReader(gunzip(t, filepath.Join(dir, "ext4_64.tar.gz"))))
	_, err := r.Next()
	require.NoError(t, err)
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	base, _ := openBlob(t, b)
	require.Equal(t, 8323, base.Index().Len())
	require.EqualValues(t, 64<<30, base.VirtualSize())
	require.Equal(t, "C02FB491-B4D4-4904-8684-A014D032AF78", base.UUID())

	var m extentMap
	for i, e := range base.index.entries() {
		x := extent{int64(e.off()), int64(e.len()), int64(1_000_000 + i*100_000)}
		if e.zeroed() {
			x.moff = zeroAt(x.moff)
		}
		m.insert(x)
	}
	again := compact(m.all())
	require.Equal(t, base.index.entries(), again.ents)
	off, _ := base.IndexRange()
	require.Equal(t, off, again.end*SectorSize)

	b, err = os.ReadFile(filepath.Join(dir, "layer0.overlaybd.commit"))
	require.NoError(t, err)
	top, _ := openBlob(t, b)
	x, err := Merge([]*Layer{base, top})
	require.NoError(t, err)
	text := gunzip(t, filepath.Join(dir, "index-merged-lookup.txt.gz"))
	require.Equal(t, listed(text), listing(x, 2))
}
