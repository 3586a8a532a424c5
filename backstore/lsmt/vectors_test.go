package lsmt

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	uuidA = "11111111-2222-3333-4444-555555555555"
	uuidB = "66666666-7777-8888-9999-aaaaaaaaaaaa"
	uuidC = "bbbbbbbb-cccc-dddd-eeee-ffffffffffff"

	vectorSize = 1 << 20
)

// rawVector is a file of vectors/lsmt-raw, unzipped if it is a gzip file.
func rawVector(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(vectors(t, "lsmt-raw"), name))
	require.NoError(t, err)
	if !strings.HasSuffix(name, ".gz") {
		return b
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	require.NoError(t, err)
	b, err = io.ReadAll(z)
	require.NoError(t, err)
	return b
}

func rodump(t testing.TB, stack string) []byte {
	return rawVector(t, stack+".rodump.bin.gz")
}

// sparseVector writes a member of Asparse.tar.gz with its holes.
func sparseVector(t testing.TB, name string) *os.File {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(rawVector(t, "Asparse.tar.gz")))
	for {
		h, err := r.Next()
		require.NoError(t, err, name)
		if filepath.Base(h.Name) != name {
			continue
		}
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		return sparseFile(t, b)
	}
}

// sparseFile makes a file with a hole for each 4 KiB of zeros.
func sparseFile(t testing.TB, b []byte) *os.File {
	t.Helper()
	f := newFile(t)
	require.NoError(t, f.Truncate(int64(len(b))))
	for off := 0; off < len(b); off += 4096 {
		p := b[off:min(off+4096, len(b))]
		if bytes.Count(p, []byte{0}) == len(p) {
			continue
		}
		_, err := f.WriteAt(p, int64(off))
		require.NoError(t, err)
	}
	return f
}

func TestVectorDigests(t *testing.T) {
	want := map[string]string{}
	for line := range strings.Lines(string(rawVector(t, "DEVICE_SHA256"))) {
		f := strings.Fields(line)
		want[f[1]] = f[0]
	}
	for _, stack := range []string{"A", "AB", "ABC"} {
		sum := sha256.Sum256(rodump(t, stack))
		require.Equal(t, want[stack+".rodump.bin"], hex.EncodeToString(sum[:]))
	}
	for _, name := range []string{"Asparse.data", "Asparse.sealed"} {
		b, err := os.ReadFile(sparseVector(t, name).Name())
		require.NoError(t, err)
		sum := sha256.Sum256(b)
		require.Equal(t, want[name], hex.EncodeToString(sum[:]))
	}
}

func TestVectorStacks(t *testing.T) {
	for _, tc := range []struct {
		want  string
		files []string
	}{
		{"A", []string{"A.lsmt"}},
		{"A", []string{"A.sealed"}},
		{"A", []string{"Asparse.lsmt"}},
		{"AB", []string{"A.lsmt", "B.lsmt"}},
		{"AB", []string{"A.sealed", "B.lsmt"}},
		{"AB", []string{"AB.merged.lsmt"}},
		{"ABC", []string{"A.lsmt", "B.lsmt", "C.lsmt"}},
		{"ABC", []string{"AB.merged.lsmt", "C.lsmt"}},
	} {
		t.Run(strings.Join(tc.files, "+"), func(t *testing.T) {
			var layers []*Layer
			for _, name := range tc.files {
				layers = append(layers, openLayer(t, rawVector(t, name)))
			}
			require.EqualValues(t, vectorSize, VirtualSize(layers))
			sameBytes(t, rodump(t, tc.want), device(t, layers...), "device")
		})
	}
	t.Run("Asparse.sealed", func(t *testing.T) {
		b, err := os.ReadFile(sparseVector(t, "Asparse.sealed").Name())
		require.NoError(t, err)
		sameBytes(t, rodump(t, "A"), device(t, openLayer(t, b)), "device")
	})
}

func TestVectorFields(t *testing.T) {
	b := openLayer(t, rawVector(t, "B.lsmt"))
	require.Equal(t, strings.ToUpper(uuidB), b.UUID())
	require.Equal(t, uuidA, b.ParentUUID())
	require.Equal(t, "commit message B", b.Message())
	require.Equal(t, 5, b.Index().Len())
	off, n := b.IndexRange()
	require.EqualValues(t, []int64{20992, 4096}, []int64{off, n})
	require.EqualValues(t, 29184, b.Size())
	ab := openLayer(t, rawVector(t, "AB.merged.lsmt"))
	require.Equal(t, nullUUID, ab.UUID())
}

// listing prints an index as the reference's tool does, where tag 0 is the
// topmost layer.
func listing(x *Index, layers int) string {
	var b strings.Builder
	for _, e := range x.entries() {
		zeroed := 0
		if e.zeroed() {
			zeroed = 1
		}
		fmt.Fprintln(&b, e.off(), e.len(), e.moffset(), zeroed, layers-1-int(e.val>>layerShift))
	}
	return b.String()
}

// listed drops all lines but those of entries.
func listed(text []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		if len(strings.Fields(line)) == 5 && '0' <= line[0] && line[0] <= '9' {
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestVectorIndexes compares merged indexes with the reference's listings.
func TestVectorIndexes(t *testing.T) {
	for _, stack := range []string{"A", "AB", "ABC"} {
		var layers []*Layer
		for _, c := range stack {
			layers = append(layers, openLayer(t, rawVector(t, string(c)+".lsmt")))
		}
		x, err := Merge(layers)
		require.NoError(t, err)
		require.Equal(t, listed(rawVector(t, stack+".index.txt")), listing(x, len(layers)), stack)
	}
}

// pair opens copies of the files of an append-only vector.
func pair(t testing.TB, name string) *Writable {
	t.Helper()
	w, err := OpenAppend(fileOf(t, rawVector(t, name+".data")), fileOf(t, rawVector(t, name+".index")))
	require.NoError(t, err)
	return w
}

var vectorOptions = map[string]CommitOptions{
	"A": {UUID: uuidA, Message: "commit message A"},
	"B": {UUID: uuidB, ParentUUID: uuidA, Message: "commit message B"},
	"C": {UUID: uuidC, ParentUUID: uuidB, Message: "commit message C"},
}

func TestVectorPairsCommit(t *testing.T) {
	for name, o := range vectorOptions {
		w := pair(t, name)
		require.Zero(t, w.Dropped())
		want := rawVector(t, name+".lsmt")
		sameBytes(t, want, commit(t, w, o), name)
		o.ParentUUID = "" // the writable layer knows it
		sameBytes(t, want, commit(t, w, o), name)
		sameBytes(t, device(t, openLayer(t, want)), content(t, w), name)
		require.NoError(t, w.Close())
	}
}

func TestVectorPairSeal(t *testing.T) {
	w := pair(t, "A")
	require.NoError(t, w.Seal())
	got, err := os.ReadFile(w.data.Name())
	require.NoError(t, err)
	want := rawVector(t, "A.sealed")
	// Behind the 11 entries the reference pads with whatever was in memory.
	clear(want[99328+11*entrySize:][:SectorSize-11*entrySize])
	sameBytes(t, want, got, "A.sealed")
	sameBytes(t, rawVector(t, "A.lsmt"), commit(t, w, vectorOptions["A"]), "commit of the sealed layer")

	data, index := reopen(t, w.data), reopen(t, w.log)
	require.NoError(t, w.Close())
	_, err = OpenAppend(data, index)
	require.ErrorIs(t, err, os.ErrPermission)
	require.ErrorContains(t, err, "layer is sealed")
}

func TestVectorSparse(t *testing.T) {
	w, err := OpenSparse(sparseVector(t, "Asparse.data"), nil)
	require.NoError(t, err)
	o := CommitOptions{UUID: uuidA, Message: "commit message Asparse"}
	sameBytes(t, rodump(t, "A"), content(t, w), "content")
	sameBytes(t, rawVector(t, "Asparse.lsmt"), commit(t, w, o), "commit")

	require.NoError(t, w.Seal())
	got, err := os.ReadFile(w.data.Name())
	require.NoError(t, err)
	want, err := os.ReadFile(sparseVector(t, "Asparse.sealed").Name())
	require.NoError(t, err)
	clear(want[len(want)-headerSpace-SectorSize+4*entrySize:][:SectorSize-4*entrySize])
	sameBytes(t, want, got, "Asparse.sealed")

	sealed := reopen(t, w.data)
	require.NoError(t, w.Close())
	_, err = OpenSparse(sealed, nil)
	require.ErrorContains(t, err, "layer is sealed")
}

// applyOps does a line of ops.txt.
func applyOps(t testing.TB, w *Writable, ops string) {
	t.Helper()
	for _, op := range strings.Fields(ops) {
		f := strings.Split(op, ":")
		var num []int64
		for _, s := range f[1:] {
			n, err := strconv.ParseInt(s, 10, 64)
			require.NoError(t, err)
			num = append(num, n)
		}
		switch f[0] {
		case "w":
			_, err := w.WriteAt(pattern(num[0], num[1], num[2]), num[0])
			require.NoError(t, err)
		case "d":
			require.NoError(t, w.Discard(num[0], num[1]))
		default:
			t.Fatalf("unknown operation %q", op)
		}
	}
}

// pattern is what the vectors hold at off, as their README gives it.
func pattern(off, n, seed int64) []byte {
	var b bytes.Buffer
	for o := off; o < off+n; o += SectorSize {
		sector := bytes.Repeat([]byte{'.'}, SectorSize)
		copy(sector, fmt.Sprintf("seed=%d off=%d\n\n", seed, o))
		sector[SectorSize-1] = byte(seed*37 + o/SectorSize)
		b.Write(sector)
	}
	return b.Bytes()
}

// TestVectorOps makes the reference's files by doing what was done to them.
func TestVectorOps(t *testing.T) {
	r := bufio.NewScanner(bytes.NewReader(rawVector(t, "ops.txt")))
	for r.Scan() {
		name, ops, _ := strings.Cut(r.Text(), " ")
		o := vectorOptions[name]
		w, err := CreateAppend(newFile(t), newFile(t), &WritableOptions{
			VirtualSize: vectorSize, UUID: o.UUID, ParentUUID: o.ParentUUID,
		})
		require.NoError(t, err)
		applyOps(t, w, ops)
		sameBytes(t, rawVector(t, name+".lsmt"), commit(t, w, o), name+".lsmt")
		require.NoError(t, w.Sync())
		for ext, f := range map[string]*os.File{".data": w.data, ".index": w.log} {
			got, err := os.ReadFile(f.Name())
			require.NoError(t, err)
			if f == w.log { // what the reference does not write, see synced.go
				clear(got[syncedAt:][:syncedSize])
			}
			sameBytes(t, rawVector(t, name+ext), got, name+ext)
		}
		require.NoError(t, w.Close())
	}
	require.NoError(t, r.Err())
}

// TestVectorOpsSparse does the operations on sparse layers: within a session
// they know what append-only ones know.
func TestVectorOpsSparse(t *testing.T) {
	r := bufio.NewScanner(bytes.NewReader(rawVector(t, "ops.txt")))
	for r.Scan() {
		name, ops, _ := strings.Cut(r.Text(), " ")
		w, err := CreateSparse(newFile(t), &WritableOptions{VirtualSize: vectorSize})
		require.NoError(t, err)
		applyOps(t, w, ops)
		sameBytes(t, rawVector(t, name+".lsmt"), commit(t, w, vectorOptions[name]), name+".lsmt")
		require.NoError(t, w.Close())
	}
	require.NoError(t, r.Err())
	w, err := CreateSparse(newFile(t), &WritableOptions{VirtualSize: vectorSize, UUID: uuidA})
	require.NoError(t, err)
	got, err := os.ReadFile(w.data.Name())
	require.NoError(t, err)
	want, err := os.ReadFile(sparseVector(t, "Asparse.data").Name())
	require.NoError(t, err)
	sameBytes(t, want[:headerSpace], got[:headerSpace], "header")
	require.Len(t, got, len(want))
}
