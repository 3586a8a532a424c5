package tracefmt

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"path"
)

// accelerationMember is the only member of an acceleration layer.
const accelerationMember = "trace"

// Limits of an acceleration layer that is read.
const (
	maxAcceleration = 64 << 20 // bytes of the tar, decompressed
	maxMembers      = 1 << 10
)

// WriteAcceleration writes an acceleration layer, in which overlaybd looks for
// the trace of an image: a tar with one member, trace, which has the events of
// t in overlaybd's format (see WriteReference). The same events give the same
// bytes.
func WriteAcceleration(w io.Writer, t *Trace) error {
	var b bytes.Buffer
	if err := WriteReference(&b, t); err != nil {
		return fmt.Errorf("write acceleration layer: %w", err)
	}
	tw := tar.NewWriter(w)
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: accelerationMember, Mode: 0o444, Size: int64(b.Len()), Format: tar.FormatUSTAR})
	if err == nil {
		_, err = tw.Write(b.Bytes())
	}
	if err == nil {
		err = tw.Close()
	}
	if err != nil {
		return fmt.Errorf("write acceleration layer: %w", err)
	}
	return nil
}

// ReadAcceleration reads an acceleration layer, a tar that may be compressed
// with gzip. What its member trace has is a trace of overlaybd, or a native one,
// or else a list of accesses (see ReadAccesses): one of the results is nil. A
// trace that is not native has no header (see ReadReference). The member is the
// first of that name; at most 1024 members and 64 MiB are looked at.
func ReadAcceleration(r io.Reader) (*Trace, []Access, error) {
	t, list, err := readAcceleration(bufio.NewReader(r))
	if err != nil {
		return nil, nil, fmt.Errorf("read acceleration layer: %w", err)
	}
	return t, list, nil
}

func readAcceleration(br *bufio.Reader) (*Trace, []Access, error) {
	in := io.LimitedReader{R: br, N: maxAcceleration + 1}
	if head, err := br.Peek(2); err == nil && string(head) == "\x1f\x8b" {
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, err
		}
		in.R = z
	}
	t, list, err := readMember(&in)
	if err != nil && in.N <= 0 {
		return nil, nil, fmt.Errorf("more than %d bytes", maxAcceleration)
	}
	return t, list, err
}

// readMember finds the member and reads it.
func readMember(r io.Reader) (*Trace, []Access, error) {
	tr := tar.NewReader(r)
	for range maxMembers {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil, nil, fmt.Errorf("it has no member %q", accelerationMember)
		}
		if err != nil {
			return nil, nil, err
		}
		if path.Clean("/"+h.Name) != "/"+accelerationMember || h.Typeflag != tar.TypeReg {
			continue
		}
		t, list, err := readAny(bufio.NewReader(tr))
		if err != nil {
			return nil, nil, fmt.Errorf("member %q: %w", accelerationMember, err)
		}
		return t, list, nil
	}
	return nil, nil, fmt.Errorf("more than %d members", maxMembers)
}

// readAny reads a trace of either format, or a list of accesses.
func readAny(br *bufio.Reader) (*Trace, []Access, error) {
	head, err := br.Peek(len(fileMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case isReference(head):
		t, err := ReadReference(br)
		return t, nil, err
	case bytes.HasPrefix(head, []byte(zstdMagic)) || string(head) == fileMagic:
		t, err := Read(br)
		return t, nil, err
	}
	list, _, err := ReadAccesses(br)
	return nil, list, err
}
