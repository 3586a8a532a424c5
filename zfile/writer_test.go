package zfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func TestRoundTrip(t *testing.T) {
	rnd := rand.New(rand.NewPCG(20, 20))
	for _, algo := range []Algo{LZ4, Zstd} {
		for _, bs := range []int{4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10} {
			for i := range 8 {
				o := Options{Algo: algo, BlockSize: bs, NoVerify: i&1 != 0, Tar: i&2 != 0, Stream: i&6 == 4, Concurrency: 1 + i%3}
				sizes := []int{0, 1, bs - 1, bs, bs + 1, rnd.IntN(20 * bs), jobSize, jobSize + rnd.IntN(4*jobSize)}
				content := mixed(uint64(i), sizes[i])
				if bs == 64<<10 {
					content = bytes.Repeat([]byte("compressible"), sizes[i]/12+1)[:sizes[i]]
				}
				blob := compress(t, content, &o)
				r := open(t, blob)
				got, err := readAll(r)
				if err != nil || !bytes.Equal(got, content) {
					t.Errorf("%+v, %d bytes: content differs, %v", o, len(content), err)
				}
				if err := r.Verify(t.Context()); err != nil {
					t.Errorf("%+v, %d bytes: %v", o, len(content), err)
				}
				f := r.Info()
				if f.Algo != algo || f.BlockSize != bs || f.Verify == o.NoVerify || f.Base != map[bool]int64{true: 1536}[o.Tar] {
					t.Errorf("%+v: reads as %+v", o, f)
				}
				if complete, err := r.HeaderComplete(); complete == o.Stream || err != nil {
					t.Errorf("%+v: header complete: %v, %v", o, complete, err)
				}
			}
		}
	}
}

// TestSameOutput: neither concurrency nor the way of writing changes a byte.
func TestSameOutput(t *testing.T) {
	content := mixed(21, 3*jobSize+777)
	for _, algo := range []Algo{LZ4, Zstd} {
		want := compress(t, content, &Options{Algo: algo, Concurrency: 1})
		for _, c := range []struct {
			name string
			src  io.Reader
		}{
			{"read from", bytes.NewReader(content)},
			{"byte by byte", struct{ io.Reader }{iotest.OneByteReader(bytes.NewReader(content[:]))}},
			{"data and EOF", iotest.DataErrReader(bytes.NewReader(content))},
		} {
			f := &file{}
			w, err := NewWriter(f, &Options{Algo: algo, Concurrency: 4})
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(w, c.src); n != int64(len(content)) || err != nil {
				t.Fatalf("%s: copied %d, %v", c.name, n, err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(f.b, want) {
				t.Errorf("%s, %s: output differs", algo, c.name)
			}
		}
		f := &file{}
		w, err := NewWriter(f, &Options{Algo: algo})
		if err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(22, 22))
		for rest := content; len(rest) > 0; {
			n := min(len(rest), rnd.IntN(40000))
			if m, err := w.Write(rest[:n]); m != n || err != nil {
				t.Fatalf("wrote %d of %d, %v", m, n, err)
			}
			rest = rest[n:]
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(f.b, want) {
			t.Errorf("%s: output of random writes differs", algo)
		}
	}
}

// TestWriteAtOffset starts behind other content of a real file.
func TestWriteAtOffset(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before, content := make([]byte, 1000), mixed(23, 100000)
	if _, err := f.Write(before); err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(f, &Options{Tar: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	end, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	want := append(before, compress(t, content, &Options{Tar: true})...)
	if int64(len(got)) != end || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, at %d, want %d", len(got), end, len(want))
	}
}

func TestWriteAppending(t *testing.T) {
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "blob"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := NewWriter(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err == nil || !strings.Contains(err.Error(), "O_APPEND") {
		t.Errorf("error is %v", err)
	}
}

func TestOptionsRejected(t *testing.T) {
	for want, o := range map[string]*Options{
		"unknown compression 3":   {Algo: 3},
		"blocks of 2048 bytes":    {BlockSize: 2048},
		"blocks of 5000 bytes":    {BlockSize: 5000},
		"blocks of 131072 bytes":  {BlockSize: 128 << 10},
		"blocks of -4096 bytes":   {BlockSize: -4096},
		"lz4 has no levels":       {Level: 1},
		"zstd level 23":           {Algo: Zstd, Level: 23},
		"zstd level -1":           {Algo: Zstd, Level: -1},
		"concurrency -1":          {Concurrency: -1},
		"cannot be streamed":      {Tar: true, Stream: true},
		"set Options.Stream":      {},
		"set Options.Stream now ": nil,
	} {
		_, err := NewWriter(io.Discard, o)
		if err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(want, " now ")) {
			t.Errorf("%+v: error is %v", o, err)
		}
	}
}

// TestIncompressible: overlaybd cannot read a block over 64 KiB, so that none is
// written.
func TestIncompressible(t *testing.T) {
	rnd := rand.New(rand.NewPCG(24, 24))
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	for _, algo := range []Algo{LZ4, Zstd} {
		f := &file{}
		w, err := NewWriter(f, &Options{Algo: algo, BlockSize: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(noise)
		err = errors.Join(err, w.Close())
		if !errors.Is(err, ErrIncompressible) {
			t.Errorf("%s: error is %v", algo, err)
		}
		if _, err := Open(bytes.NewReader(f.b), int64(len(f.b))); !errors.Is(err, ErrNotZFile) {
			t.Errorf("%s: what is left opens with %v", algo, err)
		}
		for _, bs := range []int{4 << 10, 32 << 10} {
			r := open(t, compress(t, noise, &Options{Algo: algo, BlockSize: bs}))
			if got, err := readAll(r); err != nil || !bytes.Equal(got, noise) {
				t.Errorf("%s, blocks of %d: %v", algo, bs, err)
			}
		}
	}
}

// limited is a target with room for left bytes, and then for left calls of Seek.
type limited struct {
	file
	room  int
	seeks int
}

var errFull = errors.New("no space left")

func (l *limited) Write(p []byte) (int, error) {
	if l.room -= len(p); l.room < 0 {
		return 0, errFull
	}
	return l.file.Write(p)
}

func (l *limited) Seek(off int64, whence int) (int64, error) {
	if l.seeks--; l.seeks < 0 {
		return 0, errFull
	}
	return l.file.Seek(off, whence)
}

// TestFullTarget runs out of room everywhere. The first error stays, and
// goroutines end (TestMain).
func TestFullTarget(t *testing.T) {
	content := mixed(25, 4*jobSize)
	whole := len(compress(t, content, &Options{Tar: true}))
	for room := 0; room <= whole+2048; room += 20000 {
		testFullTarget(t, content, &limited{room: room, seeks: 4}, room >= whole+2048)
	}
	for seeks := range 4 {
		testFullTarget(t, content, &limited{room: 1 << 30, seeks: seeks}, false)
	}
	testFullTarget(t, content, &limited{room: whole + 2047, seeks: 4}, false)
	testFullTarget(t, content, &limited{room: whole + 2048, seeks: 4}, true)
}

func testFullTarget(t *testing.T, content []byte, l *limited, ok bool) {
	t.Helper()
	what := fmt.Sprintf("room %d, seeks %d", l.room, l.seeks)
	w, err := NewWriter(l, &Options{Tar: true, Concurrency: 2})
	if err == nil {
		var n int
		n, err = w.Write(content)
		if (err == nil) != (n == len(content)) {
			t.Errorf("%s: wrote %d, %v", what, n, err)
		}
		closed := w.Close()
		if err != nil && !errors.Is(closed, err) {
			t.Errorf("%s: Close gives %v after %v", what, closed, err)
		}
		err = closed
		if again := w.Close(); again != closed {
			t.Errorf("%s: second Close gives %v after %v", what, again, closed)
		}
		if _, again := w.Write(content); again == nil {
			t.Errorf("%s: Write after Close succeeds", what)
		}
	}
	if ok != (err == nil) || err != nil && !errors.Is(err, errFull) {
		t.Errorf("%s: error is %v", what, err)
	}
}

func TestWriteClosed(t *testing.T) {
	w, err := NewWriter(io.Discard, &Options{Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
	if _, err := w.ReadFrom(strings.NewReader("x")); !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadFrom: %v", err)
	}
}

// stuck returns no bytes and no error.
type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

func TestReadFromError(t *testing.T) {
	want := errors.New("source is gone")
	for _, c := range []struct {
		src  io.Reader
		n    int64
		want error
	}{
		{io.MultiReader(bytes.NewReader(make([]byte, 5000)), iotest.ErrReader(want)), 5000, want},
		{stuck{}, 0, io.ErrNoProgress},
	} {
		w, err := NewWriter(io.Discard, &Options{Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		if n, err := w.ReadFrom(c.src); n != c.n || !errors.Is(err, c.want) {
			t.Errorf("read %d, %v, want %d, %v", n, err, c.n, c.want)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}
