package zfile

import (
	"bytes"
	"testing"
)

const inputSum = "388d7765f45c1670fc8527a241f7713ae008a19ce8d9c6ddb291575a5d6f09ad"

// vectors are all ZFiles of the reference implementation but the stock base
// layer. Where write is set, the Writer gives the same file byte for byte.
var vectors = []struct {
	name     string
	sum      string // of the decoded bytes
	size     int64
	base     int64
	complete bool
	write    *Options
}{
	{"zfile/byte-lz4-4k.zfile", "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d", 1, 0, true, &Options{}},
	{"zfile/empty-lz4-4k.zfile", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 0, 0, true, &Options{}},
	{"zfile/one-lz4-4k.zfile", "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7", 4096, 0, true, &Options{}},
	{"zfile/hdrover-lz4-4k.zfile", inputSum, 1049353, 0, true, &Options{}},
	{"zfile/noverify-lz4-4k.zfile", inputSum, 1049353, 0, false, &Options{Stream: true, NoVerify: true}},
	{"zfile/noverify-zstd-64k.zfile", inputSum, 1049353, 0, false, nil},
	{"zfile/tool-lz4-32k.zfile", inputSum, 1049353, 0, false, &Options{Stream: true, BlockSize: 32 << 10}},
	{"zfile/tool-lz4-4k.tar.zfile", inputSum, 1049353, 1536, false, nil},
	{"zfile/tool-lz4-4k.zfile", inputSum, 1049353, 0, false, &Options{Stream: true}},
	{"zfile/tool-zstd-64k.zfile", inputSum, 1049353, 0, false, nil},
	{"ext4-64m/layer0.overlaybd.commit", "6d9354003780a4858e3477f5d65546327ba88f8cbacd0049856ba79738f99c7d", 2633728, 1536, true, &Options{Tar: true}},
	{"ext4-64m/layer1.overlaybd.commit", "4180cd12cbd4fe86e26158ca4a51a50d2d82959cecd0b35407bc496749f70cfc", 2109440, 1536, true, &Options{Tar: true}},
	{"ext4-64m/layer2.overlaybd.commit", "17e554627b9ede1e29ebe64410a916f371ead3f4267d4b261b93760f8f5d0afa", 1323008, 1536, true, &Options{Tar: true}},
	{"baselayer/layer0.overlaybd.commit", "", 6864896, 1536, true, &Options{Tar: true}},
	// The decoded file is lsmt-raw/A.lsmt.
	{"lsmt-raw/A-lz4-4k.tar.commit", "d07bfbc2e2ae2300ca7ee80bdc7631e546f0aec88f50d9da66e668a66d46c5c6", 98304, 1536, true, &Options{Tar: true}},
}

func TestReadVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			blob := vector(t, v.name)
			src := &counter{r: bytes.NewReader(blob)}
			r, err := Open(src, int64(len(blob)))
			if err != nil {
				t.Fatal(err)
			}
			if len(src.reads) > 2 || src.reads[0].n > tailSize || src.reads[len(src.reads)-1].off < r.Info().IndexOffset-tailSize {
				t.Errorf("open read %v, want the tail and the index only", src.reads)
			}
			if r.Size() != v.size || r.Info().Base != v.base {
				t.Errorf("size %d, base %d, want %d, %d", r.Size(), r.Info().Base, v.size, v.base)
			}
			if got := decodedSum(t, r); v.sum != "" && got != v.sum {
				t.Errorf("decodes to sha256 %s, want %s", got, v.sum)
			}
			if err := r.Verify(t.Context()); err != nil {
				t.Error(err)
			}
			if got, err := r.HeaderComplete(); got != v.complete || err != nil {
				t.Errorf("HeaderComplete is %v, %v, want %v", got, err, v.complete)
			}
			if ok, err := IsZFile(src, int64(len(blob))); !ok || err != nil {
				t.Errorf("IsZFile is %v, %v", ok, err)
			}
		})
	}
}

// TestBaseLayer reads the file whose headers are full of uninitialised memory.
func TestBaseLayer(t *testing.T) {
	if testing.Short() {
		t.Skip("decodes 542 MB")
	}
	blob := baseLayer(t)
	src := &counter{r: bytes.NewReader(blob)}
	r, err := Open(src, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	// Most blocks are zeros, so that the index is longer than the usual tail.
	if len(src.reads) != 2 || src.reads[1].off < r.Info().IndexOffset {
		t.Errorf("open read %v, want the tail and the rest of the index", src.reads)
	}
	if r.Size() != 541937664 {
		t.Errorf("size is %d", r.Size())
	}
	if got, want := decodedSum(t, r), "799dbd74cbcfbd7f37611057130b20fda0e1e671280df97cc3a05d73620d5ac7"; got != want {
		t.Errorf("decodes to sha256 %s, want %s", got, want)
	}
	if err := r.verifyMeta(); err != nil {
		t.Error(err)
	}
}

// TestWriteVectors checks that what we write is what overlaybd writes.
func TestWriteVectors(t *testing.T) {
	for _, v := range vectors {
		if v.write == nil {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			want := vector(t, v.name)
			content, err := readAll(open(t, want))
			if err != nil {
				t.Fatal(err)
			}
			if got := compress(t, content, v.write); !bytes.Equal(got, want) {
				t.Errorf("%d bytes written that differ from the reference's %d", len(got), len(want))
			}
		})
	}
}

// TestWriteZstdVectors: another encoder gives other blocks, but all around them
// is the same.
func TestWriteZstdVectors(t *testing.T) {
	for name, o := range map[string]*Options{
		"zfile/tool-zstd-64k.zfile":     {Algo: Zstd, BlockSize: 64 << 10, Stream: true},
		"zfile/noverify-zstd-64k.zfile": {Algo: Zstd, BlockSize: 64 << 10, Stream: true, NoVerify: true},
	} {
		want := vector(t, name)
		got := compress(t, vector(t, "zfile/input.bin"), o)
		if !bytes.Equal(got[:headerSize], want[:headerSize]) {
			t.Errorf("%s: header differs", name)
		}
		g, w := open(t, got).Info(), open(t, want).Info()
		if g.Size != w.Size || g.Blocks != w.Blocks || g.Verify != w.Verify || g.Algo != w.Algo || g.BlockSize != w.BlockSize {
			t.Errorf("%s: %+v, want like %+v", name, g, w)
		}
		if g.Length > w.Length*11/10 {
			t.Errorf("%s: %d bytes, the reference needs %d", name, g.Length, w.Length)
		}
	}
}

// TestStreamWrapped: a tool that does not complete the header may still wrap.
func TestStreamWrapped(t *testing.T) {
	want := vector(t, "zfile/tool-lz4-4k.tar.zfile")
	bare := vector(t, "zfile/tool-lz4-4k.zfile")
	got := append(wrapperHead(int64(len(bare))), bare...)
	got = append(got, wrapperTail(int64(len(bare)))...)
	if !bytes.Equal(got, want) {
		t.Error("wrapper differs")
	}
}
