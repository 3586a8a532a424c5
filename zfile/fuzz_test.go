package zfile

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"
)

// seeds are small blobs of every kind.
func seeds(t testing.TB) [][]byte {
	content := mixed(30, 9000)
	stream := compress(t, content, &Options{Stream: true})
	return [][]byte{
		nil,
		compress(t, nil, nil),
		compress(t, content, nil),
		stream,
		compress(t, content, &Options{Tar: true, NoVerify: true}),
		compress(t, content, &Options{Algo: Zstd, Tar: true}),
		compress(t, content, &Options{Algo: Zstd, NoVerify: true, Stream: true}),
		tarOf(t, tar.Header{Name: "x", Format: tar.FormatUSTAR}, stream),
		tarOf(t, tar.Header{Name: "x", PAXRecords: map[string]string{"a.b": "c"}}, stream),
		append(compress(t, content, &Options{Tar: true}), make([]byte, 100<<10)...),
	}
}

// FuzzOpen gives a whole hostile blob. Digests are made good half of the time,
// since the fuzzer cannot.
func FuzzOpen(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s, false)
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, blob []byte, seal bool) {
		if seal {
			blob = resealAll(blob)
		}
		size := int64(len(blob))
		r, err := Open(bytes.NewReader(blob), size)
		if err != nil {
			return
		}
		info := r.Info()
		if info.Base < 0 || info.Length < 2*headerSize || info.Base+info.Length > size || info.Size < 0 {
			t.Fatalf("opens as %+v of %d bytes", info, size)
		}
		if n := 4*cap(r.starts.offs) + 8*cap(r.starts.groups); n > len(blob)+64 {
			t.Fatalf("index of %d bytes in a blob of %d", n, len(blob))
		}
		if off, n := r.CompressedRange(0, info.Size); off < info.Base || off+n > info.IndexOffset {
			t.Fatalf("blocks at %d, %d bytes, in %+v", off, n, info)
		}
		_, wholeErr := io.Copy(io.Discard, io.NewSectionReader(r, 0, info.Size))
		if err := r.Verify(t.Context()); err == nil && wholeErr != nil {
			t.Fatalf("verifies, but does not read: %v", wholeErr)
		}
		p := make([]byte, 5000)
		for off := int64(0); off < min(info.Size, 1<<18); off += 4999 {
			if n, err := r.ReadAt(p, off); n < len(p) && err == nil {
				t.Fatalf("short read of %d at %d without an error", n, off)
			}
		}
	})
}

// resealAll gives a good digest to all that looks like a header, and a good
// checksum to its index.
func resealAll(blob []byte) []byte {
	blob = bytes.Clone(blob)
	for i := 0; ; {
		n := bytes.Index(blob[i:], magic)
		if n < 0 || len(blob)-i-n < headerSize {
			return blob
		}
		h := blob[i+n:][:headerSize]
		h[offFlags] &^= flagDigest
		if x, err := parseHeader(h); err == nil {
			index := int64(i+n) - 4*int64(min(x.indexSize, 1<<20))
			if x.isTrailer() && index >= 0 {
				x.indexCRC = checksum(seedMeta, blob[index:i+n])
			}
			copy(h, x.encode())
		}
		i += n + len(magic)
	}
}

// FuzzUnwrap gives hostile tar headers; their checksums are made good.
func FuzzUnwrap(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		for i := 0; i+tarBlock <= len(blob) && i < 8*tarBlock; i += tarBlock {
			if string(blob[i+tarMagic:][:len(ustar)]) == ustar {
				blob = bytes.Clone(blob)
				sealTarHeader(blob[i:][:tarBlock])
			}
		}
		size := int64(len(blob))
		src := &counter{r: bytes.NewReader(blob)}
		off, n, wrapped, err := Unwrap(src, size)
		if off < 0 || n < 0 || off+n > size || !wrapped && err == nil && n != size || wrapped && off%tarBlock != 0 {
			t.Fatalf("member of %d bytes at %d in a blob of %d, wrapped: %v", n, off, size, wrapped)
		}
		for _, s := range src.reads {
			if s.n > maxTarHeaders {
				t.Fatalf("reads %v", s)
			}
		}
		if _, err := IsZFile(src, size); (err == nil) != (wrapped || n == size) {
			t.Fatalf("IsZFile: %v", err)
		}
	})
}

// FuzzRoundTrip writes with any options and reads in any way.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("content"), uint8(0), uint16(3), uint16(2))
	f.Add(mixed(31, 9000), uint8(0xff), uint16(4096), uint16(4097))
	f.Add(make([]byte, 20000), uint8(0x15), uint16(1), uint16(65535))
	f.Fuzz(func(t *testing.T, content []byte, how uint8, off, n uint16) {
		o := &Options{
			Algo:        LZ4 + Algo(how&1),
			BlockSize:   minBlockSize << (how >> 1 & 3),
			NoVerify:    how&8 != 0,
			Tar:         how&16 != 0,
			Stream:      how&(16|32) == 32,
			Concurrency: 1 + int(how>>6),
		}
		r := open(t, compress(t, content, o))
		if got, err := readAll(r); err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%+v: content differs, %v", o, err)
		}
		checkRead(t, r, content, span{int64(off), int64(n)})
		if err := r.Verify(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}
