package nbd

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// input is the receiving side of a connection. It reads ahead, a few requests
// at a time, so that a queue of reads costs less than a system call each. Of a
// write's data only what came along is copied.
type input struct {
	read func(p []byte) (int, error) // as recv(2): 0 is the end
	buf  [32 * requestSize]byte
	r, w int // buf[r:w] has been received, but not used
}

// next returns the next request's header. It returns io.EOF if the peer ended
// the connection between two requests.
func (in *input) next() (header, error) {
	for in.w-in.r < requestSize {
		if in.r > 0 {
			copy(in.buf[:], in.buf[in.r:in.w])
			in.r, in.w = 0, in.w-in.r
		}
		n, err := in.read(in.buf[in.w:])
		if err != nil {
			return header{}, err
		}
		if n == 0 && in.w == 0 {
			return header{}, io.EOF
		}
		if n == 0 {
			return header{}, io.ErrUnexpectedEOF
		}
		in.w += n
	}
	h, err := parse(in.buf[in.r:in.w])
	in.r += requestSize
	return h, err
}

// data fills p with the data that follows.
func (in *input) data(p []byte) error {
	n := copy(p, in.buf[in.r:in.w])
	in.r += n
	for p = p[n:]; len(p) > 0; p = p[n:] {
		var err error
		if n, err = in.read(p); err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

// receive is input.read on a socket.
func receive(fd int, p []byte) (int, error) {
	for {
		n, err := unix.Read(fd, p)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.ECONNRESET): // the peer went with replies unread
			return 0, nil
		case !errors.Is(err, unix.EINTR):
			return 0, fmt.Errorf("receive: %w", err)
		}
	}
}
