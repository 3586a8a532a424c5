package convert

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/zfile"
)

func TestReferenceLayersMount(t *testing.T) {
	needRoot(t)
	dir := vectors(t, "ext4-64m")
	var paths []string
	for i, tree := range []string{"tree-layers0.tsv", "tree-layers01.tsv", "tree-layers012.tsv"} {
		paths = append(paths, filepath.Join(dir, []string{
			"layer0.overlaybd.commit", "layer1.overlaybd.commit", "layer2.overlaybd.commit"}[i]))
		t.Run(tree, func(t *testing.T) {
			equalTrees(t, listTree(t, mountFiles(t, paths...), false), readTree(t, filepath.Join(dir, tree)))
		})
	}
}

func TestConvertVectors(t *testing.T) {
	needRoot(t)
	src, dst := at(t, "oci:"+t.TempDir()+":src"), at(t, "oci:"+t.TempDir()+":dst")
	writeImage(t, src, vectorLayers(t)...)
	_, err := testConvert(t, src, dst, Options{Progress: func(e Event) { t.Logf("%+v", e) }})
	require.NoError(t, err)
	for i, tree := range []string{"tree-layers0.tsv", "tree-layers01.tsv", "tree-layers012.tsv"} {
		t.Run(tree, func(t *testing.T) {
			equalTrees(t, listTree(t, mountLayers(t, dst, i+1), false), readTree(t, vectors(t, "ext4-64m", tree)))
		})
	}
}

// The same input gives the same bytes, and what it gives is in good order.
func TestReproducible(t *testing.T) {
	needRoot(t)
	for name, layers := range map[string][]testLayer{"vectors": vectorLayers(t), "random": randomLayers(t)} {
		t.Run(name, func(t *testing.T) {
			src := at(t, "oci:"+t.TempDir())
			writeImage(t, src, layers...)
			var first []ocispec.Descriptor
			for range 3 {
				dst := at(t, "oci:"+t.TempDir())
				_, err := testConvert(t, src, dst, Options{DeviceSize: 256 << 20})
				require.NoError(t, err)
				got := manifestOf(t, dst).Layers
				if first == nil {
					first = got
					for n := range got {
						fsck(t, dst, n+1)
					}
				}
				require.Equal(t, first, got)
			}
		})
	}
}

// randomLayers have many small files and some big ones, the upper one changes
// half of the lower.
func randomLayers(t *testing.T) []testLayer {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	content := func(n int) string {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rnd.Uint32() & 0x3f)
		}
		return string(p)
	}
	var lower, upper []tarEntry
	for i := range 40 {
		lower = append(lower, dir(fmt.Sprintf("d%d", i)))
	}
	for i := range 2000 {
		name := fmt.Sprintf("d%d/file%d", i%40, i)
		lower = append(lower, file(name, content(rnd.IntN(9000))).with(mine).xattr("user.n", content(rnd.IntN(200))))
		switch i % 4 {
		case 0:
			upper = append(upper, file(filepath.Dir(name)+"/.wh."+filepath.Base(name), ""))
		case 1:
			upper = append(upper, file(name, content(rnd.IntN(20000))))
		case 2:
			upper = append(upper, link(name+"-link", name))
		}
	}
	lower = append(lower, file("big", content(12<<20)), file("big2", content(3<<20)))
	upper = append(upper, file("big", content(9<<20)), file(".wh.big2", ""))
	return []testLayer{plainLayer(makeTar(t, lower...)), zstdLayer(t, makeTar(t, upper...))}
}

// fsck checks the file system that the n lowest layers of an image make.
func fsck(t *testing.T, src Source, n int) {
	t.Helper()
	tool, err := findTool("e2fsck", "e2fsprogs")
	if err != nil {
		t.Skip(err)
	}
	im := openLayers(t, layerFiles(t, src, n)...)
	dev, err := device.Attach(t.Context(), im, im.Size(), &device.Options{ReadOnly: true})
	require.NoError(t, err)
	out, err := exec.Command(tool, "-fn", dev.Path()).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), "Fix", "%s", out)
	require.NoError(t, dev.Close())
}

// Blocks of 64 KiB that grow by being compressed are made half as long, and
// every layer says how much of its tail opening it reads.
func TestIncompressibleLayer(t *testing.T) {
	needRoot(t)
	noise := make([]byte, 1<<20)
	r := rand.NewChaCha8([32]byte{5})
	_, _ = r.Read(noise)
	src, dst := at(t, "oci:"+t.TempDir()), at(t, "oci:"+t.TempDir())
	writeImage(t, src, plainLayer(makeTar(t, file("noise", string(noise)))), plainLayer(makeTar(t, file("text", "words"))))
	_, err := testConvert(t, src, dst, Options{BlockSize: 64 << 10})
	require.NoError(t, err)
	for i, want := range []int{32 << 10, 64 << 10} {
		path := layerFiles(t, dst, 2)[i]
		f, err := os.Open(path)
		require.NoError(t, err)
		defer f.Close()
		d := manifestOf(t, dst).Layers[i]
		z, err := zfile.Open(f, d.Size)
		require.NoError(t, err)
		require.Equal(t, want, z.Info().BlockSize)
		tail, err := backstore.TailOf(f, d.Size)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(tail), d.Annotations[backstore.AnnotationTail])
	}
	require.NoError(t, openLayers(t, layerFiles(t, dst, 2)...).Verify(t.Context()))
}
