package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Decoded sha256s, as the READMEs of the vectors give them.
const (
	shaInput  = "388d7765f45c1670fc8527a241f7713ae008a19ce8d9c6ddb291575a5d6f09ad"
	shaEmpty  = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	shaByte   = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
	shaOne    = "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7"
	shaA      = "d07bfbc2e2ae2300ca7ee80bdc7631e546f0aec88f50d9da66e668a66d46c5c6" // A.lsmt, which -z wraps
	shaLayers = "e12d5f6c29ce9bbcf3066925784bf7e5974ba30c81735edfb630c5ba656926c8" // the device of ext4-64m
)

var zfileVectors = []struct {
	file    string
	decoded string
	algo    string
	block   float64
	verify  bool
	lsmt    bool
}{
	{"zfile/byte-lz4-4k.zfile", shaByte, "lz4", 4096, true, false},
	{"zfile/empty-lz4-4k.zfile", shaEmpty, "lz4", 4096, true, false},
	{"zfile/hdrover-lz4-4k.zfile", shaInput, "lz4", 4096, true, false},
	{"zfile/noverify-lz4-4k.zfile", shaInput, "lz4", 4096, false, false},
	{"zfile/noverify-zstd-64k.zfile", shaInput, "zstd", 65536, false, false},
	{"zfile/one-lz4-4k.zfile", shaOne, "lz4", 4096, true, false},
	{"zfile/tool-lz4-32k.zfile", shaInput, "lz4", 32768, true, false},
	{"zfile/tool-lz4-4k.tar.zfile", shaInput, "lz4", 4096, true, false},
	{"zfile/tool-lz4-4k.zfile", shaInput, "lz4", 4096, true, false},
	{"zfile/tool-zstd-64k.zfile", shaInput, "zstd", 65536, true, false},
	{"lsmt-raw/A-lz4-4k.tar.commit", shaA, "lz4", 4096, true, true},
	{"ext4-64m/layer0.overlaybd.commit", "6d9354003780a4858e3477f5d65546327ba88f8cbacd0049856ba79738f99c7d", "lz4", 4096, true, true},
	{"ext4-64m/layer1.overlaybd.commit", "4180cd12cbd4fe86e26158ca4a51a50d2d82959cecd0b35407bc496749f70cfc", "lz4", 4096, true, true},
	{"ext4-64m/layer2.overlaybd.commit", "17e554627b9ede1e29ebe64410a916f371ead3f4267d4b261b93760f8f5d0afa", "lz4", 4096, true, true},
}

func TestZFileVectors(t *testing.T) {
	vectors(t)
	b := newBench(t)
	for _, v := range zfileVectors {
		t.Run(v.file, func(t *testing.T) {
			file := vectors(t, v.file)
			out := filepath.Join(t.TempDir(), "out")
			require.Empty(t, b.ok("blob", "unpack", file, out))
			require.Equal(t, v.decoded, sha(t, out))
			require.Equal(t, fmt.Sprintf("%s: good\n", file), b.ok("blob", "verify", file))

			info := decode(t, b.ok("blob", "info", "--json", file), "file", "size", "tar", "base", "decoded",
				"zfile.algo", "zfile.block_size", "zfile.verify", "zfile.blocks")
			z := info["zfile"].(map[string]any)
			require.Equal(t, v.algo, z["algo"])
			require.Equal(t, v.block, z["block_size"])
			require.Equal(t, v.verify, z["verify"])
			tar := strings.Contains(v.file, ".tar.") || strings.HasPrefix(v.file, "ext4-64m/")
			require.Equal(t, tar, info["tar"])
			require.Equal(t, map[bool]float64{true: 1536, false: 0}[tar], info["base"])
			require.Equal(t, v.lsmt, info["lsmt"] != nil)
			if v.lsmt {
				decode(t, b.ok("blob", "info", "--json", file), "lsmt.virtual_size", "lsmt.uuid", "lsmt.parent_uuid", "lsmt.segments")
			}
			require.Contains(t, b.ok("blob", "info", file), v.algo)
		})
	}
}

// To standard output too; there, '-'.
func TestUnpackToStdout(t *testing.T) {
	b := newBench(t)
	want, err := os.ReadFile(vectors(t, "zfile/input.bin"))
	require.NoError(t, err)
	require.Equal(t, string(want), b.ok("blob", "unpack", vectors(t, "zfile/tool-zstd-64k.zfile"), "-"))
}

// The stock base layer is a bare ZFile with garbage in its reserved bytes.
func TestBaseLayerVectors(t *testing.T) {
	packed := vectors(t, "baselayer/ext4_64.tar.gz")
	b := newBench(t)
	base := untar(t, packed, b.dir)["ext4_64"]
	require.Equal(t, "c3a417552a6cf9ffa959b541850bab7d7f08f4255425bf8b48c85f7b36b378d9", sha(t, base))
	info := decode(t, b.ok("blob", "info", "--json", base), "lsmt.uuid")
	require.Equal(t, 541937664.0, info["decoded"])
	layer := info["lsmt"].(map[string]any)
	require.Equal(t, 68719476736.0, layer["virtual_size"])
	require.Equal(t, "C02FB491-B4D4-4904-8684-A014D032AF78", strings.ToUpper(layer["uuid"].(string)))
	b.ok("blob", "verify", base)
	if !testing.Short() {
		out := b.path("decoded")
		b.ok("blob", "unpack", base, out)
		require.Equal(t, "799dbd74cbcfbd7f37611057130b20fda0e1e671280df97cc3a05d73620d5ac7", sha(t, out))
		require.NoError(t, os.Remove(out))
	}

	top := copyFile(t, vectors(t, "baselayer/layer0.overlaybd.commit"), b.path("layer0"))
	config := b.write("config.v1.json", `{"lowers": [{"file": "ext4_64"}, {"file": "layer0"}]}`)
	stack := decode(t, b.ok("image", "info", "--json", config), "layers.size")
	require.Equal(t, 68719476736.0, stack["device_size"])
	b.ok("blob", "verify", top)
	b.ok("image", "verify", config)
	// 64 GiB, nearly all of it a hole.
	dump := b.path("device")
	b.ok("image", "dump", config, dump)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(dump, &st))
	require.EqualValues(t, 68719476736, st.Size)
	require.Less(t, st.Blocks*512, int64(64<<20))
	if b.canMount() {
		dir := b.mkdir("mnt")
		b.ok("mount", config, dir)
		compareTree(t, vectors(t, "baselayer/tree.tsv"), dir)
		b.ok("umount", dir)
	}
}

func untar(t testing.TB, path, dir string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		require.NoError(t, err)
		name := filepath.Join(dir, filepath.Base(h.Name))
		out, err := os.Create(name)
		require.NoError(t, err)
		_, err = io.Copy(out, r)
		require.NoError(t, err)
		require.NoError(t, out.Close())
		files[filepath.Base(h.Name)] = name
	}
}

// canMount tells whether the rest of a test that mounts can run.
func (b *bench) canMount() bool {
	if os.Geteuid() != 0 {
		return false
	}
	_, fuse := os.Stat("/dev/fuse")
	_, loop := os.Stat("/dev/loop-control")
	return fuse == nil && loop == nil
}

func TestImageVectors(t *testing.T) {
	config := vectors(t, "ext4-64m/config.v1.json")
	b := newBench(t)
	info := decode(t, b.ok("image", "info", "--json", config),
		"image", "device_size", "fs_type", "segments", "layers.name", "layers.size", "layers.decoded", "layers.codec")
	require.Equal(t, 67108864.0, info["device_size"])
	require.Len(t, info["layers"], 3)
	require.Contains(t, b.ok("image", "info", config), "64 MiB")

	out := b.path("device")
	require.Empty(t, b.ok("image", "dump", config, out))
	require.Equal(t, shaLayers, sha(t, out))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(out, &st))
	require.Less(t, st.Blocks*512, st.Size, "it is sparse")
	require.Contains(t, b.ok("image", "verify", config), "good, 3 layers")

	// Standard output: a pipe gets it all, a file of the shell's is sparse.
	piped := b.write("piped", b.ok("image", "dump", config, "-"))
	require.Equal(t, shaLayers, sha(t, piped))
	for _, flag := range []int{0, os.O_APPEND} {
		f, err := os.OpenFile(b.path("redirected"), os.O_RDWR|os.O_CREATE|os.O_TRUNC|flag, 0o644)
		require.NoError(t, err)
		cmd := b.command("image", "dump", config, "-")
		cmd.Stdout = f
		require.NoError(t, cmd.Run())
		require.NoError(t, f.Close())
		require.Equal(t, shaLayers, sha(t, f.Name()), "flag %#x", flag)
	}
	for i, want := range []string{
		"05fb3c57ed3a62cf3e896746b103bc4b95afe12b4d09ad70bc36d31b4f420953",
		"77c3d38c30c49f1eb6ea89eb11c5a14a570e1cd491e2057b146fb58da725e4de",
	} {
		var c configJSON
		for j := range i + 1 {
			c.Lowers = append(c.Lowers, lowerJSON{File: vectors(t, fmt.Sprintf("ext4-64m/layer%d.overlaybd.commit", j))})
		}
		part := b.path(fmt.Sprintf("device%d", i))
		b.ok("image", "dump", b.config(fmt.Sprintf("c%d.json", i), c), part)
		require.Equal(t, want, sha(t, part))
	}
}

func TestMountVectors(t *testing.T) {
	skipUnprivileged(t)
	config := vectors(t, "ext4-64m/config.v1.json")
	b := newBench(t)
	dir := b.mkdir("mnt")
	require.Contains(t, b.ok("mount", config, dir), "mounted at "+dir)
	compareTree(t, vectors(t, "ext4-64m/tree-layers012.tsv"), dir)
	b.ok("umount", dir)
}

type configJSON struct {
	Lowers []lowerJSON       `json:"lowers"`
	Upper  map[string]string `json:"upper,omitempty"`
}

type lowerJSON struct {
	File   string `json:"file,omitempty"`
	Dir    string `json:"dir,omitempty"`
	Digest string `json:"digest,omitempty"`
}

func (b *bench) config(name string, c configJSON) string {
	p, err := json.Marshal(c)
	require.NoError(b.t, err)
	return b.write(name, string(p))
}

// Stacks of sealed layers, and of writable ones on top as the upper.
func TestRawStacks(t *testing.T) {
	sums, err := os.ReadFile(vectors(t, "lsmt-raw/DEVICE_SHA256"))
	require.NoError(t, err)
	want := map[string]string{}
	for line := range strings.Lines(string(sums)) {
		f := strings.Fields(line)
		want[strings.TrimSuffix(filepath.Base(f[1]), ".rodump.bin")] = f[0]
	}
	b := newBench(t)
	for _, name := range []string{"A.lsmt", "B.lsmt", "C.lsmt", "A.sealed", "Asparse.lsmt", "A-lz4-4k.tar.commit", "AB.merged.lsmt",
		"A.data", "A.index", "B.data", "B.index", "C.data", "C.index"} {
		copyFile(t, vectors(t, "lsmt-raw", name), b.path(name))
	}
	sparse := untar(t, vectors(t, "lsmt-raw/Asparse.tar.gz"), b.dir)
	b.write("Asparse.index", "")
	pair := func(name string) map[string]string {
		return map[string]string{"data": name + ".data", "index": name + ".index"}
	}
	tests := []struct {
		want   string
		lowers []string
		upper  map[string]string
	}{
		{"A", []string{"A.lsmt"}, nil},
		{"A", []string{"A.sealed"}, nil},
		{"A", []string{"Asparse.lsmt"}, nil},
		{"A", []string{"Asparse.sealed"}, nil},
		{"A", []string{"A-lz4-4k.tar.commit"}, nil},
		{"AB", []string{"A.lsmt", "B.lsmt"}, nil},
		{"AB", []string{"AB.merged.lsmt"}, nil},
		{"AB", []string{"A-lz4-4k.tar.commit", "B.lsmt"}, nil},
		{"ABC", []string{"A.lsmt", "B.lsmt", "C.lsmt"}, nil},
		{"ABC", []string{"AB.merged.lsmt", "C.lsmt"}, nil},
		{"A", []string{"A.lsmt"}, pair("A")},
		{"A", []string{"A.lsmt"}, map[string]string{"data": sparse["Asparse.data"], "index": "Asparse.index"}},
		{"A", []string{"A.lsmt"}, map[string]string{"data": sparse["Asparse.data"]}},
		{"AB", []string{"A.lsmt"}, pair("B")},
		{"ABC", []string{"A.lsmt", "B.lsmt"}, pair("C")},
	}
	for i, tt := range tests {
		c := configJSON{Upper: tt.upper}
		for _, l := range tt.lowers {
			c.Lowers = append(c.Lowers, lowerJSON{File: l})
		}
		config := b.config("config.v1.json", c)
		out := b.path(fmt.Sprintf("device%d", i))
		b.ok("image", "dump", config, out)
		require.Equal(t, want[tt.want], sha(t, out), "%+v", tt)
		require.Equal(t, want[tt.want], sha(t, b.write("piped", b.ok("image", "dump", config, "-"))), "%+v", tt)
		b.ok("image", "verify", config)
	}
	for _, name := range []string{"A.lsmt", "B.lsmt", "C.lsmt", "A.sealed", "AB.merged.lsmt", "Asparse.lsmt"} {
		info := decode(t, b.ok("blob", "info", "--json", b.path(name)), "lsmt.virtual_size", "lsmt.segments", "lsmt.mapped_bytes", "lsmt.zeroed_bytes")
		require.Nil(t, info["zfile"])
		require.Equal(t, 1048576.0, info["lsmt"].(map[string]any)["virtual_size"])
		b.ok("blob", "verify", b.path(name))
		b.ok("blob", "unpack", b.path(name), b.path(name)+".copy")
		require.Equal(t, sha(t, b.path(name)), sha(t, b.path(name)+".copy"))
	}
	require.Contains(t, b.ok("blob", "info", b.path("A.lsmt")), `"commit message A"`)
	b.fails(exitFailed, []string{"blob", "verify", b.path("A.data")}, b.path("A.data"))
}

func TestTraceVectors(t *testing.T) {
	text, err := os.ReadFile(vectors(t, "trace/recorded.txt"))
	require.NoError(t, err)
	b := newBench(t)
	out := b.ok("trace", "show", "--json", vectors(t, "trace/recorded.trace"))
	decode(t, out, "header.version", "header.space", "events.at_us", "events.layer", "events.offset", "events.length", "end")
	var trace struct {
		Events []struct{ Layer, Offset, Length int64 }
	}
	require.NoError(t, json.Unmarshal([]byte(out), &trace))
	got := fmt.Sprintf("# op layer_index count offset  (n=%d)\n", len(trace.Events))
	for _, e := range trace.Events {
		got += fmt.Sprintf("R %d %d %d\n", e.Layer, e.Length, e.Offset)
	}
	require.Equal(t, string(text), got)
	require.Contains(t, b.ok("trace", "show", vectors(t, "trace/recorded.trace")), "PIECES")
}
