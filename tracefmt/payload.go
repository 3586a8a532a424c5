package tracefmt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// A payload decodes msgpack from memory. The library's own decoding of
// structs and slices trusts counts, and its Skip recurses; here every count
// is held against the bytes that are left.
type payload struct {
	b bytes.Reader
	d *msgpack.Decoder
}

func newPayload(p []byte) *payload {
	l := new(payload)
	l.b.Reset(p)
	l.d = msgpack.NewDecoder(&l.b)
	return l
}

// object reads a map and calls field for each key; field reads the value or
// returns false, whereupon the value is skipped.
func (p *payload) object(field func(key string) (bool, error)) error {
	n, err := p.d.DecodeMapLen()
	if err != nil {
		return err
	}
	if n > p.b.Len()/2 {
		return fmt.Errorf("map of %d keys in %d bytes", n, p.b.Len())
	}
	for range n {
		key, err := p.text(maxString)
		if err != nil {
			return fmt.Errorf("key: %w", err)
		}
		known, err := field(key)
		if err == nil && !known {
			err = p.skip()
		}
		if err != nil {
			return fmt.Errorf("%.32q: %w", key, err)
		}
	}
	return nil
}

// list reads the head of an array of at most limit elements.
func (p *payload) list(limit int) (int, error) {
	n, err := p.d.DecodeArrayLen()
	if err != nil {
		return 0, err
	}
	if n > limit {
		return 0, fmt.Errorf("%d elements: at most %d", n, limit)
	}
	if n > p.b.Len() {
		return 0, fmt.Errorf("%d elements in %d bytes", n, p.b.Len())
	}
	return max(n, 0), nil
}

// raw reads a string or bytes of at most limit bytes.
func (p *payload) raw(limit int) ([]byte, error) {
	n, err := p.d.DecodeBytesLen()
	if err != nil {
		return nil, err
	}
	n = max(n, 0)
	if n > limit {
		return nil, fmt.Errorf("%d bytes: at most %d", n, limit)
	}
	if n > p.b.Len() {
		return nil, fmt.Errorf("%d bytes, %d are left", n, p.b.Len())
	}
	v := make([]byte, n)
	_, err = p.b.Read(v)
	if n == 0 {
		err = nil
	}
	return v, err
}

func (p *payload) text(limit int) (string, error) {
	v, err := p.raw(limit)
	return string(v), err
}

// number reads an integer of 0 to limit.
func (p *payload) number(limit int64) (int64, error) {
	n, err := p.d.DecodeInt64()
	if err != nil {
		return 0, err
	}
	if n < 0 || n > limit {
		return 0, fmt.Errorf("%d: not within 0 and %d", n, limit)
	}
	return n, nil
}

// skip passes over one value of any kind, without recursion.
func (p *payload) skip() error {
	for left := 1; left > 0; left-- {
		c, err := p.d.PeekCode()
		if err != nil {
			return err
		}
		n := 0
		switch {
		case msgpcode.IsFixedArray(c) || c == msgpcode.Array16 || c == msgpcode.Array32:
			n, err = p.d.DecodeArrayLen()
		case msgpcode.IsFixedMap(c) || c == msgpcode.Map16 || c == msgpcode.Map32:
			n, err = p.d.DecodeMapLen()
			n *= 2
		default:
			err = p.d.Skip()
		}
		if err != nil {
			return err
		}
		if n > p.b.Len() {
			return fmt.Errorf("%d elements in %d bytes", n, p.b.Len())
		}
		left += n
	}
	return nil
}

// A column is one field of all events of a frame. One that is absent is all
// zeros.
type column struct {
	name    string
	b       []byte
	present bool
}

var errColumn = errors.New("column does not fit the number of events")

func (c *column) read(p *payload) (err error) {
	c.b, err = p.raw(maxFrame)
	c.present = true
	return err
}

// uint returns the next value, which is 0 to limit.
func (c *column) uint(limit int64) (int64, error) {
	if !c.present {
		return 0, nil
	}
	v, n := binary.Uvarint(c.b)
	if n <= 0 {
		return 0, fmt.Errorf("%s: %w", c.name, errColumn)
	}
	c.b = c.b[n:]
	if v > uint64(limit) {
		return 0, fmt.Errorf("%s: %d: at most %d", c.name, v, limit)
	}
	return int64(v), nil
}

// delta returns from plus the next value, and that is 0 to limit. Neither
// from nor limit is negative.
func (c *column) delta(from, limit int64) (int64, error) {
	if !c.present {
		return from, nil
	}
	v, n := binary.Varint(c.b)
	if n <= 0 {
		return 0, fmt.Errorf("%s: %w", c.name, errColumn)
	}
	c.b = c.b[n:]
	if sum := from + v; sum >= 0 && sum <= limit {
		return sum, nil
	}
	return 0, fmt.Errorf("%s: step of %d from %d: not within 0 and %d", c.name, v, from, limit)
}

func (c *column) end() error {
	if len(c.b) != 0 {
		return fmt.Errorf("%s: %w: %d bytes are left", c.name, errColumn, len(c.b))
	}
	return nil
}
