package zfile

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math"
	"strconv"
	"strings"
	"testing"
)

// tarOf wraps content with archive/tar.
func tarOf(t testing.TB, h tar.Header, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h.Size, h.Mode = int64(len(content)), 0o644
	if err := w.WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWrapperHead(t *testing.T) {
	for _, name := range []string{"zfile/tool-lz4-4k.tar.zfile", "ext4-64m/layer0.overlaybd.commit", "lsmt-raw/A-lz4-4k.tar.commit"} {
		blob := vector(t, name)
		n := open(t, blob).Info().Length
		if got := wrapperHead(n); !bytes.Equal(got, blob[:tarWrapper]) {
			t.Errorf("%s: head differs", name)
		}
		if got := wrapperTail(n); !bytes.Equal(got, blob[tarWrapper+n:]) {
			t.Errorf("%s: %d bytes behind the file, want %d", name, len(got), int64(len(blob))-tarWrapper-n)
		}
	}
}

func TestPaxSizeRecord(t *testing.T) {
	for n, want := range map[int64]string{
		0:             "9 size=0\n",
		9:             "9 size=9\n",
		99:            "11 size=99\n",
		4061:          "13 size=4061\n",
		276612:        "15 size=276612\n",
		math.MaxInt64: "28 size=9223372036854775807\n",
	} {
		got := paxSizeRecord(n)
		if got != want {
			t.Errorf("record of %d is %q, want %q", n, got, want)
		}
		if key, value, rest, ok := paxRecord([]byte(got)); !ok || key != "size" || value != strconv.FormatInt(n, 10) || len(rest) != 0 {
			t.Errorf("%q reads as %q, %q", got, key, value)
		}
	}
}

func TestUnwrap(t *testing.T) {
	content := []byte(strings.Repeat("layer ", 1000))
	long := strings.Repeat("long", 30) + "layer"
	ours := append(wrapperHead(int64(len(content))), content...)
	ours = append(ours, wrapperTail(int64(len(content)))...)
	for _, c := range []struct {
		name    string
		blob    []byte
		off     int64
		wrapped bool
	}{
		{"as overlaybd", ours, 1536, true},
		{"ustar", tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, content), 512, true},
		{"pax long name", tarOf(t, tar.Header{Name: long, Format: tar.FormatPAX}, content), 1536, true},
		{"pax record", tarOf(t, tar.Header{Name: "x", PAXRecords: map[string]string{"a.b": strings.Repeat("c", 600)}}, content), 2048, true},
		{"bare", content, 0, false},
		{"short", content[:511], 0, false},
		{"empty", nil, 0, false},
		// GNU's magic is not the one that the format asks for.
		{"gnu", tarOf(t, tar.Header{Name: "x", Format: tar.FormatGNU}, content), 0, false},
	} {
		off, n, wrapped, err := Unwrap(bytes.NewReader(c.blob), int64(len(c.blob)))
		wantN := int64(len(content))
		if !c.wrapped {
			wantN = int64(len(c.blob))
		}
		if off != c.off || n != wantN || wrapped != c.wrapped || err != nil {
			t.Errorf("%s: off %d, n %d, wrapped %v, %v, want %d, %d, %v", c.name, off, n, wrapped, err, c.off, wantN, c.wrapped)
		}
	}
}

func TestUnwrapRejects(t *testing.T) {
	content := make([]byte, 10000)
	good := tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, content)
	pax := append(wrapperHead(10000), content...)
	edit := func(b []byte, f func(b []byte)) []byte {
		b = bytes.Clone(b)
		f(b)
		return b
	}
	for _, c := range []struct {
		name string
		blob []byte
		cut  bool // io.ErrUnexpectedEOF, else *CorruptError
	}{
		{"cut off", good[:5000], true},
		{"pax cut off", pax[:5000], true},
		{"bad checksum", edit(good, func(b []byte) { b[0] = 'y' }), false},
		{"checksum is no number", edit(good, func(b []byte) { copy(b[tarChecksum:], "zzzzzz") }), false},
		{"bad size", edit(good, func(b []byte) { copy(b[tarSize:], "99999999999"); sealTarHeader(b) }), false},
		{"huge size", edit(good, func(b []byte) { copy(b[tarSize:], bytes.Repeat([]byte{0xff}, 12)); sealTarHeader(b) }), false},
		{"directory", edit(good, func(b []byte) { b[tarType] = '5'; sealTarHeader(b) }), false},
		{"no header behind pax", edit(pax, func(b []byte) { clear(b[1024:1536]) }), false},
		{"pax header alone", pax[:1024], false},
		{"pax record too long", edit(pax, func(b []byte) { b[512] = '9' }), false},
		{"pax record is no record", edit(pax, func(b []byte) { b[513] = 'x' }), false},
		{"pax size is negative", edit(pax, func(b []byte) { copy(b[512:], "14 size=-1000\n\n") }), false},
		{"pax data too long", edit(pax, func(b []byte) { copy(b[tarSize:], "  7777777 "); sealTarHeader(b) }), false},
	} {
		_, _, _, err := Unwrap(bytes.NewReader(c.blob), int64(len(c.blob)))
		var bad *CorruptError
		if err == nil || errors.Is(err, io.ErrUnexpectedEOF) != c.cut || errors.As(err, &bad) == c.cut {
			t.Errorf("%s: error is %v", c.name, err)
		}
	}
}

// TestUnwrapEndless: a tar of nothing but extended headers is given up.
func TestUnwrapEndless(t *testing.T) {
	one := wrapperHead(1)[:1024]
	blob := bytes.Repeat(one, 1000)
	src := &counter{r: bytes.NewReader(blob)}
	if _, _, _, err := Unwrap(src, int64(len(blob))); err == nil || !strings.Contains(err.Error(), "no member") {
		t.Errorf("error is %v", err)
	}
}

func TestUnwrapBigMember(t *testing.T) {
	b := tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, nil)
	const size = 9 << 30
	field := b[tarSize:][:12]
	clear(field)
	field[0] = 0x80
	for i, n := 11, int64(size); n > 0; i, n = i-1, n>>8 {
		field[i] = byte(n)
	}
	sealTarHeader(b)
	b = append(b, make([]byte, headSize)...)
	off, n, wrapped, err := Unwrap(bytes.NewReader(b), size+2048)
	if off != 512 || n != size || !wrapped || err != nil {
		t.Errorf("off %d, n %d, wrapped %v, %v", off, n, wrapped, err)
	}
}

func TestIsZFile(t *testing.T) {
	z := compress(t, []byte("content"), nil)
	lsmt := append([]byte(lsmtMagic), make([]byte, 5000)...)
	copy(lsmt[tarMagic:], ustar) // a commit message may hold anything
	for _, c := range []struct {
		name string
		blob []byte
		want bool
	}{
		{"bare", z, true},
		{"wrapped", compress(t, []byte("content"), &Options{Tar: true}), true},
		{"ustar", tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, z), true},
		{"lsmt", lsmt, false},
		{"wrapped lsmt", tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, lsmt), false},
		{"magic cut off", z[:23], false},
		{"empty", nil, false},
	} {
		src := &counter{r: bytes.NewReader(c.blob)}
		got, err := IsZFile(src, int64(len(c.blob)))
		if got != c.want || err != nil {
			t.Errorf("%s: %v, %v, want %v", c.name, got, err, c.want)
		}
		if len(src.reads) > 1 {
			t.Errorf("%s: reads %v, want one", c.name, src.reads)
		}
	}
}
