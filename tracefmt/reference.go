package tracefmt

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
)

// The reference trace: a header of 24 bytes (magic u32, padding, data size
// u64, checksum u32, padding), then records of 24 bytes (operation, padding,
// layer u32, count u64, offset i64), little-endian. The checksum covers the
// records with their padding, which real files leave uninitialised.
const (
	refMagic  = 0xC2EF1820
	refHeader = 24
	refRecord = 24
	refRead   = 'R'
	refWrite  = 'W' // defined, never written

	// overlaybd replays each record into a buffer of this size, and does not
	// check that it fits.
	refLongest = 1 << 20
)

func isReference(head []byte) bool {
	return len(head) >= 4 && binary.LittleEndian.Uint32(head) == refMagic
}

// refSum goes on with a checksum that began with 0: CRC-32C without the final
// inversion.
func refSum(sum uint32, p []byte) uint32 {
	return ^crc32.Update(^sum, castagnoli, p)
}

// ReadReference reads a trace file of overlaybd. Its reads have a layer,
// offset and length, no times, and no header: the caller fills in
// Header.Layers and calls Check. Records of length zero, and writes, are left
// out.
func ReadReference(r io.Reader) (*Trace, error) {
	br := bufio.NewReader(r)
	var head [refHeader]byte
	if _, err := io.ReadFull(br, head[:]); err != nil {
		return nil, fmt.Errorf("reference trace header: %w", noEOF(err))
	}
	if !isReference(head[:]) {
		return nil, errors.New("not a reference trace: the file does not begin with its magic bytes")
	}
	size := binary.LittleEndian.Uint64(head[8:])
	if size%refRecord != 0 || size > MaxEvents*refRecord {
		return nil, fmt.Errorf("reference trace of %d bytes: not a multiple of %d up to %d", size, refRecord, MaxEvents*refRecord)
	}
	t := &Trace{Header: Header{}.filled()}
	sum, err := t.readRecords(br, int(size/refRecord))
	if err != nil {
		return nil, err
	}
	if _, err := br.ReadByte(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reference trace: bytes follow its %d records", size/refRecord)
	}
	if want := binary.LittleEndian.Uint32(head[16:]); sum != want {
		return nil, fmt.Errorf("reference trace: checksum %08x, its header says %08x", sum, want)
	}
	return t, nil
}

func (t *Trace) readRecords(r io.Reader, n int) (uint32, error) {
	var sum uint32
	var rec [refRecord]byte
	for i := range n {
		if _, err := io.ReadFull(r, rec[:]); err != nil {
			return 0, fmt.Errorf("reference trace: record %d of %d: %w", i, n, noEOF(err))
		}
		sum = refSum(sum, rec[:])
		e, ok, err := parseRecord(rec[:])
		if err == nil && ok {
			err = t.checkEvent(&e)
		}
		if err != nil {
			return 0, fmt.Errorf("reference trace: record %d: %w", i, err)
		}
		if ok {
			t.Events = append(t.Events, e)
		}
	}
	return sum, nil
}

// parseRecord returns false for a record that reads nothing.
func parseRecord(rec []byte) (e Event, ok bool, err error) {
	if rec[0] != refRead && rec[0] != refWrite {
		return e, false, fmt.Errorf("operation 0x%02x: neither %q nor %q", rec[0], refRead, refWrite)
	}
	layer := binary.LittleEndian.Uint32(rec[4:])
	count := binary.LittleEndian.Uint64(rec[8:])
	if layer >= MaxLayers {
		return e, false, fmt.Errorf("layer %d: at most %d", layer, MaxLayers-1)
	}
	if count > math.MaxInt64 {
		return e, false, fmt.Errorf("length %d", count)
	}
	e = Event{Layer: int(layer), Len: int64(count), Off: int64(binary.LittleEndian.Uint64(rec[16:]))}
	return e, rec[0] == refRead && count > 0, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// WriteReference writes the events of t, in their order, as overlaybd's trace
// file. Times, paths and the header have no place in it. The layers of the
// image that it will be used with must be those of t, bottom first. An event
// of more than 1 MiB becomes several records, since overlaybd reads no longer
// ones; there are at most MaxEvents records.
func WriteReference(w io.Writer, t *Trace) error {
	if t.Space == DeviceSpace {
		return errors.New("write reference trace: the trace is of a device: its offsets are not those of layers")
	}
	file := make([]byte, refHeader, refHeader+refRecord*min(len(t.Events), MaxEvents))
	for i := range t.Events {
		e := t.Events[i]
		if err := t.checkEvent(&e); err != nil {
			return fmt.Errorf("write reference trace: event %d: %w", i, err)
		}
		for end := e.Off + e.Len; e.Off < end; e.Off += e.Len {
			if len(file) >= refHeader+refRecord*MaxEvents {
				return fmt.Errorf("write reference trace: more than %d records", MaxEvents)
			}
			e.Len = min(end-e.Off, refLongest)
			file = append(file, record(&e)...)
		}
	}
	binary.LittleEndian.PutUint32(file, refMagic)
	binary.LittleEndian.PutUint64(file[8:], uint64(len(file)-refHeader))
	binary.LittleEndian.PutUint32(file[16:], refSum(0, file[refHeader:]))
	if _, err := w.Write(file); err != nil {
		return fmt.Errorf("write reference trace: %w", err)
	}
	return nil
}

func record(e *Event) []byte {
	rec := make([]byte, refRecord)
	rec[0] = refRead
	binary.LittleEndian.PutUint32(rec[4:], uint32(e.Layer))
	binary.LittleEndian.PutUint64(rec[8:], uint64(e.Len))
	binary.LittleEndian.PutUint64(rec[16:], uint64(e.Off))
	return rec
}
