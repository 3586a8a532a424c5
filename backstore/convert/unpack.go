package convert

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// zstdWindow is the most memory that one zstd frame may ask for. The reference
// encoder stays below it up to level 22 (--ultra --long=27).
const zstdWindow = 128 << 20

// decompress returns the tar behind r, whatever it is compressed with: the
// bytes are believed more than the media type, as all engines do.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", noEOF(err))
		}
		return named{"gzip", zr, zr.Close}, nil
	case isZstd(head):
		zr, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		return named{"zstd", zr, func() error { zr.Close(); return nil }}, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return nil, fmt.Errorf("bzip2 layer: %w", errors.ErrUnsupported)
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, fmt.Errorf("xz layer: %w", errors.ErrUnsupported)
	}
	return io.NopCloser(br), nil
}

// isZstd knows a zstd frame and the skippable frames that may stand before it.
func isZstd(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18})
}

// named puts the codec's name before its errors.
type named struct {
	codec string
	io.Reader
	close func() error
}

func (n named) Read(p []byte) (int, error) {
	k, err := n.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s: %w", n.codec, err)
	}
	return k, err
}

func (n named) Close() error { return n.close() }

// An unpacker decompresses a layer and hashes its tar in a goroutine of its
// own, some buffers ahead of the reader. Close ends the goroutine; it may be
// called at any time and waits.
type unpacker struct {
	full, free chan []byte
	cur        []byte // what is left of held
	held       []byte
	err        error // why full was closed; read after that
	hash       hash.Hash
	stop, done chan struct{}
}

const (
	unpackBuffers = 8
	unpackBuffer  = 256 << 10
)

func newUnpacker(r io.Reader) *unpacker {
	u := &unpacker{
		full: make(chan []byte, unpackBuffers),
		free: make(chan []byte, unpackBuffers),
		hash: sha256.New(),
		stop: make(chan struct{}),
		done: make(chan struct{}),
	}
	for range unpackBuffers {
		u.free <- make([]byte, unpackBuffer)
	}
	go u.run(r)
	return u
}

func (u *unpacker) run(r io.Reader) {
	defer close(u.done)
	defer close(u.full)
	zr, err := decompress(r)
	if err != nil {
		u.err = err
		return
	}
	defer zr.Close()
	for {
		var buf []byte
		select {
		case buf = <-u.free:
		case <-u.stop:
			u.err = io.ErrClosedPipe
			return
		}
		n, err := fill(zr, buf[:unpackBuffer])
		u.hash.Write(buf[:n])
		if n > 0 {
			u.full <- buf[:n] // never blocks: there is room for every buffer
		}
		if err != nil {
			u.err = err
			return
		}
	}
}

// fill is io.ReadFull that leaves the reader's error as it is.
func fill(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = r.Read(p[n:])
		n += k
	}
	return n, err
}

func (u *unpacker) Read(p []byte) (int, error) {
	for len(u.cur) == 0 {
		if u.held != nil {
			u.free <- u.held
			u.held = nil
		}
		buf, ok := <-u.full
		if !ok {
			return 0, u.err
		}
		u.cur, u.held = buf, buf
	}
	n := copy(p, u.cur)
	u.cur = u.cur[n:]
	return n, nil
}

// finish reads what follows the tar's end mark, so that the digest covers it,
// and returns the diff ID.
func (u *unpacker) finish() (digest.Digest, error) {
	if _, err := io.Copy(io.Discard, u); err != nil {
		return "", err
	}
	<-u.done
	return digest.NewDigest(digest.SHA256, u.hash), nil
}

func (u *unpacker) Close() {
	close(u.stop)
	for range u.full { // unblocks the goroutine
	}
	<-u.done
}
