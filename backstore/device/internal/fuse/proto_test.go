package fuse

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

// unhex reads the little-endian bytes that the structs have on amd64 and arm64.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseRead(t *testing.T) {
	// A READ of 4096 bytes at 0x12345000.
	b := unhex(t, `
		50000000 0f000000 0a00000000000000 0200000000000000 00000000 00000000 00000000 0000 0000
		0100000000000000 0050341200000000 00100000 00000000 0000000000000000 00800400 00000000`)
	h := parseHeader(b)
	if want := (header{length: 80, op: opRead, unique: 10, node: fileNode}); h != want {
		t.Errorf("header %+v, want %+v", h, want)
	}
	if e := parseRW(b[inHeaderSize:]); e != (extent{0x12345000, 4096}) {
		t.Errorf("extent %+v", e)
	}
}

func TestParseFallocate(t *testing.T) {
	b := unhex(t, `0100000000000000 0000100000000000 0000000001000000 03000000 00000000`)
	e, mode := parseFallocate(b)
	if e != (extent{1 << 20, 1 << 32}) || mode != fallocKeepSize|fallocPunchHole {
		t.Errorf("extent %+v, mode %x", e, mode)
	}
}

func TestReplies(t *testing.T) {
	file := attr{ino: 2, size: 4097, mode: 0o100400, nlink: 1}
	attrBytes := `
		0200000000000000 0110000000000000 0900000000000000
		0000000000000000 0000000000000000 0000000000000000
		00000000 00000000 00000000 00810000 01000000 00000000 00000000 00000000 00100000 00000000`
	tests := []struct {
		name string
		size int
		put  func(b []byte)
		want string
	}{
		{"header", outHeaderSize, func(b []byte) { putHeader(b, 4, 0, 7) },
			`14000000 00000000 0700000000000000`},
		{"error", outHeaderSize, func(b []byte) { putHeader(b, 0, 5, 1<<63) },
			`10000000 fbffffff 0000000000000080`},
		{"attr", attrOutSize, func(b []byte) { putAttrOut(b, &file) },
			`0000008000000000 00000000 00000000` + attrBytes},
		{"entry", entryOutSize, func(b []byte) { putEntryOut(b, &file) },
			`0200000000000000 0000000000000000 0000008000000000 0000008000000000 00000000 00000000` + attrBytes},
		{"open", openOutSize, func(b []byte) { putOpenOut(b, 1, fopenDirectIO|fopenParallelDirectWrites, 0) },
			`0100000000000000 41000000 00000000`},
		{"open passed through", openOutSize, func(b []byte) { putOpenOut(b, 1, fopenPassthrough, 3) },
			`0100000000000000 80000000 03000000`},
		{"init", initOutSize, func(b []byte) {
			o := initOut{minor: 36, readAhead: 0x20000, flags: flagAsyncRead | flagMaxPages,
				maxBackground: 640, congestion: 480, maxPages: 256, maxWrite: 0x40000, timeGran: 1}
			o.put(b)
		}, `07000000 24000000 00000200 01004000 8002 e001 00000400 01000000 0001 0000
			00000000 00000000 0000000000000000 0000000000000000 0000000000000000`},
		{"init with passthrough", initOutSize, func(b []byte) {
			o := initOut{minor: 40, flags: flagInitExt, flags2: flag2Passthrough, stackDepth: 1}
			o.put(b)
		}, `07000000 28000000 00000000 00000040 0000 0000 00000000 00000000 0000 0000
			20000000 01000000 000000000000000000000000000000000000000000000000`},
		{"statfs", statfsOutSize, func(b []byte) { putStatfsOut(b, 1<<20, 4096) },
			`0001000000000000 0000000000000000 0000000000000000 0000000000000000 0000000000000000
			 00100000 ff000000 00100000 00000000 000000000000000000000000000000000000000000000000`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := bytes.Repeat([]byte{0xaa}, tt.size)
			tt.put(b)
			if want := unhex(t, tt.want); !bytes.Equal(b, want) {
				t.Errorf("got  %x\nwant %x", b, want)
			}
		})
	}
}
