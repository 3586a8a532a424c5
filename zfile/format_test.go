package zfile

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"testing"
)

func TestChecksum(t *testing.T) {
	for _, c := range []struct{ register, want uint32 }{
		{seedMeta, 0x58E3FA20},
		{seedBlock, 0x3C9BD4E0},
	} {
		if got := checksum(c.register, []byte("123456789")); got != c.want {
			t.Errorf("checksum from %d is %#08x, want %#08x", c.register, got, c.want)
		}
	}
}

// trailerHex is the trailer of ext4-64m/layer0.overlaybd.commit, without zeros
// at its end.
const trailerHex = "5a46696c6500010074756a692e79796640416c6962616261" + "60000000" + "aa915e56" +
	"1600000000000000" + "782c040000000000" + "8302000000000000" + "0030280000000000" +
	"9d5f1914" + "00000000" + "00100000" + "01000000" + "0000000000000000" + "01000000"

func trailerBytes(t testing.TB) []byte {
	t.Helper()
	b, err := hex.DecodeString(trailerHex)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, make([]byte, headerSize-len(b))...)
}

func TestHeaderBytes(t *testing.T) {
	want := header{
		flags:       flagData | flagSealed | flagDigest,
		indexOffset: 0x42c78, indexSize: 643, originalSize: 2633728, indexCRC: 0x14195f9d,
		blockSize: 4096, algo: LZ4, verify: true,
	}
	b := trailerBytes(t)
	got, err := parseHeader(b)
	if err != nil || got != want {
		t.Errorf("parsed %+v, %v, want %+v", got, err, want)
	}
	if string(want.encode()) != string(b) {
		t.Errorf("encoded\n%x, want\n%x", want.encode(), b)
	}
}

// TestHeaderGarbage: what is not a field may hold anything, and does.
func TestHeaderGarbage(t *testing.T) {
	b := trailerBytes(t)
	want, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint64(b[offFlags:], 0x7ffea4640b46)
	for _, r := range [][2]int{{68, 72}, {79, 84}, {89, 512}, {offDigest, offDigest + 4}} {
		for i := r[0]; i < r[1]; i++ {
			b[i] = 0xa5
		}
	}
	want.flags &^= flagDigest
	if got, err := parseHeader(b); err != nil || got != want {
		t.Errorf("parsed %+v, %v, want %+v", got, err, want)
	}
}

func TestHeaderRejects(t *testing.T) {
	for _, c := range []struct {
		name        string
		off         int
		value       byte
		unsupported bool
	}{
		{"bad magic", 0, 'z', false},
		{"bad magic", 23, 0, false},
		{"struct of", offSize, 97, false},
		{"compression 3", offAlgo, 3, true},
		{"compression 0", offAlgo, 0, true},
		{"blocks of 4097", offBlockSize, 1, true},
		{"blocks of 135168", offBlockSize + 2, 2, true},
		{"blocks of 0", offBlockSize + 1, 0, true},
		{"dictionary", offUseDict, 1, true},
		{"compressed index", offFlags, 0x26, true},
	} {
		b := trailerBytes(t)
		b[offFlags] &^= flagDigest
		b[c.off] = c.value
		_, err := parseHeader(b)
		if err == nil || !strings.Contains(err.Error(), c.name) || errors.Is(err, errors.ErrUnsupported) != c.unsupported {
			t.Errorf("%s: error is %v", c.name, err)
		}
	}
	for _, n := range []int{0, 23, headerSize - 1} {
		if _, err := parseHeader(trailerBytes(t)[:n]); !errors.Is(err, errNoMagic) {
			t.Errorf("of %d bytes: error is %v", n, err)
		}
	}
	b := trailerBytes(t)
	b[300]++
	if _, err := parseHeader(b); err == nil || !strings.Contains(err.Error(), "digest") {
		t.Errorf("changed byte: error is %v", err)
	}
}

func TestLayout(t *testing.T) {
	good := header{indexOffset: 1000, indexSize: 3, originalSize: 8193, blockSize: 4096}
	const length = 1000 + 12 + headerSize
	for _, c := range []struct {
		name   string
		change func(*header)
		length int64
		ok     bool
	}{
		{"good", func(*header) {}, length, true},
		{"longer", func(*header) {}, length + 1, true},
		{"one byte short", func(*header) {}, length - 1, false},
		{"empty blob", func(*header) {}, 0, false},
		{"negative", func(*header) {}, -1, false},
		{"full last block", func(h *header) { h.originalSize = 3 * 4096 }, length, true},
		{"one byte more", func(h *header) { h.originalSize = 3*4096 + 1 }, length, false},
		{"one block less", func(h *header) { h.originalSize = 8192 }, length, false},
		{"huge size", func(h *header) { h.originalSize = math.MaxUint64 }, length, false},
		{"huge index", func(h *header) { h.indexSize = math.MaxUint64 / 4 }, length, false},
		{"index size that wraps", func(h *header) { h.indexSize = 1<<62 + 3 }, length, false},
		{"huge offset", func(h *header) { h.indexOffset = math.MaxUint64 - 100 }, length, false},
		{"index in the header", func(h *header) { h.indexOffset = 511 }, length, false},
		{"dictionary over the index", func(h *header) { h.dictSize = 489 }, length, false},
		{"dictionary before the index", func(h *header) { h.dictSize = 488 }, length, true},
	} {
		h := good
		c.change(&h)
		if err := h.layout(c.length); (err == nil) != c.ok {
			t.Errorf("%s: error is %v", c.name, err)
		}
	}
}

func TestParseIndex(t *testing.T) {
	index := func(lens ...uint32) []byte {
		var b []byte
		for _, l := range lens {
			b = binary.LittleEndian.AppendUint32(b, l)
		}
		return b
	}
	long := maxBlockLen(4096)
	for _, c := range []struct {
		name   string
		index  []byte
		end    uint64
		verify bool
		ok     bool
	}{
		{"empty", nil, 512, true, true},
		{"three", index(10, 20, 30), 572, true, true},
		{"gap before the index", index(10, 20, 30), 573, true, false},
		{"over the index", index(10, 20, 30), 571, true, false},
		{"longest", index(long), 512 + uint64(long), true, true},
		{"too long", index(long + 1), 513 + uint64(long), true, false},
		{"only a checksum", index(4), 516, true, false},
		{"one byte and a checksum", index(5), 517, true, true},
		{"one byte", index(1), 513, false, true},
		{"nothing", index(0), 512, false, false},
	} {
		_, err := parseIndex(c.index, &header{blockSize: 4096, indexOffset: c.end, verify: c.verify})
		if (err == nil) != c.ok {
			t.Errorf("%s: error is %v", c.name, err)
		}
	}
}

// TestBlockStarts crosses group boundaries.
func TestBlockStarts(t *testing.T) {
	const n = 3*groupLen + 7
	var b []byte
	pos := int64(headerSize)
	want := []int64{pos}
	for i := range uint32(n) {
		l := 1 + i%8191
		b = binary.LittleEndian.AppendUint32(b, l)
		pos += int64(l)
		want = append(want, pos)
	}
	s, err := parseIndex(b, &header{blockSize: 4096, indexOffset: uint64(pos)})
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range want {
		if got := s.at(i); got != w {
			t.Fatalf("block %d starts at %d, want %d", i, got, w)
		}
	}
}

func TestParseAlgo(t *testing.T) {
	for _, a := range []Algo{LZ4, Zstd} {
		if got, err := ParseAlgo(a.String()); got != a || err != nil {
			t.Errorf("ParseAlgo(%q) is %v, %v", a.String(), got, err)
		}
	}
	if _, err := ParseAlgo("gzip"); err == nil || !strings.Contains(err.Error(), `"gzip"`) {
		t.Errorf("ParseAlgo(gzip): error is %v", err)
	}
	if got := Algo(9).String(); got != "algo(9)" {
		t.Errorf("name of 9 is %q", got)
	}
}
