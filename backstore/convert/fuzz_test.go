package convert

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// What a registry says of an image may be anything.
func FuzzImage(f *testing.F) {
	m := memory{}
	d := m.image(func(_, _ map[string]any) {})
	config := []byte(`{"os":"linux","rootfs":{"type":"layers","diff_ids":["` + digestOf([]byte("layer")) + `"]}}`)
	f.Add(m[d.Digest], config)
	f.Add([]byte(`{"layers":[{}]}`), []byte(`null`))
	f.Add([]byte(`null`), []byte(`{"rootfs":null}`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		im := &image{desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest}}
		if im.parseManifest(manifest) != nil || im.parseConfig(config) != nil {
			return
		}
		descs := make([]ocispec.Descriptor, len(im.layers))
		for i, l := range im.layers {
			descs[i] = im.layerDescriptor(l.diffID, 1, 1, "key")
			require.Len(t, uuid(l.chain), 36)
		}
		c, err := im.converted(descs)
		require.NoError(t, err)
		require.Len(t, matching(c.manifest, []string{"key"}), 1)
	})
}

// Whatever a file system holds, normalize ends and does not panic.
func FuzzNormalize(f *testing.F) {
	sb := make([]byte, superblockSize)
	le := binary.LittleEndian
	le.PutUint16(sb[sMagic:], ext4Magic)
	le.PutUint32(sb[sLogBlockSize:], 2)
	le.PutUint32(sb[sBlocksPerGroup:], 32768)
	le.PutUint32(sb[sInodesPerGroup:], 64)
	le.PutUint32(sb[sBlocksCount:], 256)
	le.PutUint16(sb[sInodeSize:], ext4InodeSize)
	desc := make([]byte, groupDescSize)
	le.PutUint32(desc[bgInodeTable:], 2)
	inode := make([]byte, ext4InodeSize)
	le.PutUint16(inode[iLinks:], 1)
	le.PutUint16(inode[iExtraSize:], 32)
	le.PutUint32(inode[iFlags:], flagExtents)
	node := inode[iBlock:]
	le.PutUint16(node, extentMagic)
	le.PutUint16(node[2:], 1)
	le.PutUint16(node[4:], 4)
	le.PutUint16(node[6:], 1)
	le.PutUint32(node[extentSlot+4:], 20)
	f.Add(sb, desc, inode)
	f.Fuzz(func(t *testing.T, sb, desc, inode []byte) {
		const size = 1 << 20
		file, err := os.Create(filepath.Join(t.TempDir(), "layer"))
		require.NoError(t, err)
		w, err := lsmt.CreateSparse(file, &lsmt.WritableOptions{VirtualSize: size})
		require.NoError(t, err)
		defer w.Close()
		s := &stack{layers: []*lsmt.Writable{w}}
		put := func(p []byte, off int64) {
			q := make([]byte, 4096)
			copy(q[off%4096:], p)
			_, err := w.WriteAt(q, off&^4095)
			require.NoError(t, err)
		}
		put(sb, superblockAt)
		put(desc, 4096)
		put(inode, 2*4096+11*ext4InodeSize)
		put(inode, 20*4096)
		_ = normalize(s)
	})
}
