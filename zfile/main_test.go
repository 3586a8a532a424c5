package zfile

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vectorDir finds the reference implementation's files beside the repository.
func vectorDir(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the test")
		}
		dir = up
	}
	dir = filepath.Join(dir, "..", "shared", "vectors")
	if _, err := os.Stat(dir); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("reference vectors are missing: %v", err)
		}
		t.Skipf("reference vectors are missing: %v", err)
	}
	return dir
}

func vector(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(vectorDir(t), name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// baseLayer unpacks the stock base layer, a bare ZFile inside a tar.gz.
func baseLayer(t testing.TB) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(vector(t, "baselayer/ext4_64.tar.gz")))
	if err != nil {
		t.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Base(h.Name) != "ext4_64" {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

func open(t testing.TB, blob []byte) *Reader {
	t.Helper()
	r, err := Open(bytes.NewReader(blob), int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func readAll(r *Reader) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
}

func decodedSum(t testing.TB, r *Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, io.NewSectionReader(r, 0, r.Size()), make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// file is an io.WriteSeeker in memory.
type file struct {
	b   []byte
	pos int64
}

func (f *file) Write(p []byte) (int, error) {
	if grow := f.pos + int64(len(p)) - int64(len(f.b)); grow > 0 {
		f.b = append(f.b, make([]byte, grow)...)
	}
	copy(f.b[f.pos:], p)
	f.pos += int64(len(p))
	return len(p), nil
}

func (f *file) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += f.pos
	case io.SeekEnd:
		off += int64(len(f.b))
	}
	f.pos = off
	return off, nil
}

// compress writes content as a ZFile.
func compress(t testing.TB, content []byte, o *Options) []byte {
	t.Helper()
	f := &file{}
	w, err := NewWriter(f, o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return f.b
}

// span is a read of a blob.
type span struct{ off, n int64 }

// counter records the reads of a blob.
type counter struct {
	r io.ReaderAt

	mu    sync.Mutex // guards reads
	reads []span
}

func (c *counter) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	c.reads = append(c.reads, span{off, int64(len(p))})
	c.mu.Unlock()
	return c.r.ReadAt(p, off)
}
