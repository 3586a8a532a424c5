package tracefmt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/vmihailenco/msgpack/v5"
)

// A Writer appends a trace to a file while it is being recorded. Each frame
// is one call of Write, so that a process that is killed loses no more than
// what was added since the last Flush.
type Writer struct {
	w       io.Writer
	header  Header
	pending []Event
	table   stringTable
	events  int
	bytes   int64
	err     error // of the target, for good
}

// NewWriter writes the head of a trace. An empty h.Space means LayerSpace and
// a zero h.Version means Version.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	h = h.filled()
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("trace header: %w", err)
	}
	t := &Writer{w: w, header: h}
	head, err := encodeHeader(&h)
	if err != nil {
		return nil, err
	}
	t.write(append([]byte(fileMagic), head...))
	return t, t.err
}

func (h Header) filled() Header {
	if h.Version == 0 {
		h.Version = Version
	}
	if h.Space == "" {
		h.Space = LayerSpace
	}
	return h
}

// Add appends an event. It is on its way to the file after the next Flush; a
// full frame is flushed by Add itself. An event that Read would refuse is an
// error and changes nothing.
func (t *Writer) Add(e Event) error {
	if t.err != nil {
		return t.err
	}
	if err := t.header.checkEvent(&e); err != nil {
		return fmt.Errorf("trace event: %w", err)
	}
	if t.events == MaxEvents {
		return fmt.Errorf("trace is full: it has %d events", MaxEvents)
	}
	if err := t.table.reserve(e.Path, e.Process, e.Container); err != nil {
		return fmt.Errorf("trace event: %w", err)
	}
	t.pending = append(t.pending, e)
	t.events++
	t.bytes += min(e.Len, maxSum-t.bytes)
	if len(t.pending) == maxFrameEvents || t.table.freshBytes >= maxFresh {
		return t.Flush()
	}
	return nil
}

// Flush writes what was added.
func (t *Writer) Flush() error {
	if t.err != nil || len(t.pending) == 0 {
		return t.err
	}
	frame, err := encodeEvents(&t.header, t.pending, &t.table)
	if err != nil {
		return err
	}
	t.pending = t.pending[:0]
	t.write(frame)
	return t.err
}

// Finish flushes and writes the end. The Writer takes nothing after it. The
// counts of e are filled in by the Writer.
func (t *Writer) Finish(e End) error {
	e.Events, e.Bytes = t.events, t.bytes
	if err := e.check(); err != nil {
		return err
	}
	if err := t.Flush(); err != nil {
		return err
	}
	frame, err := encodeEnd(&e)
	if err != nil {
		return err
	}
	t.write(frame)
	if t.err != nil {
		return t.err
	}
	t.err = errFinished
	return nil
}

var errFinished = errors.New("trace is finished")

func (t *Writer) write(p []byte) {
	n, err := t.w.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		t.err = fmt.Errorf("write trace: %w", err)
	}
}

// Encode writes the form in which a trace is attached to an image: compacted
// (see Trace.Compact) and compressed as a whole. The same trace gives the same
// bytes. t is not changed.
func Encode(w io.Writer, t *Trace) error {
	c := Trace{Header: t.Header.filled(), Events: t.Events, End: t.End}
	if err := c.Check(); err != nil {
		return fmt.Errorf("encode trace: %w", err)
	}
	c.Compact()
	var plain bytes.Buffer
	if err := writeAll(&plain, &c); err != nil {
		return fmt.Errorf("encode trace: %w", err)
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(maxWindow/8))
	if err != nil {
		return fmt.Errorf("encode trace: %w", err)
	}
	defer z.Close()
	if _, err := w.Write(z.EncodeAll(plain.Bytes(), nil)); err != nil {
		return fmt.Errorf("encode trace: %w", err)
	}
	return nil
}

// writeAll writes t as a native file that is not compressed.
func writeAll(w io.Writer, t *Trace) error {
	tw, err := NewWriter(w, t.Header)
	if err != nil {
		return err
	}
	for i := range t.Events {
		if err := tw.Add(t.Events[i]); err != nil {
			return err
		}
	}
	if t.End == nil {
		return tw.Flush()
	}
	return tw.Finish(*t.End)
}

// A stringTable gives names numbers, from 1; 0 is the empty string.
type stringTable struct {
	index      map[string]uint64
	bytes      int
	fresh      []string // not yet written
	freshBytes int
}

// maxFresh is how many bytes of new names make a frame full.
const maxFresh = 1 << 20

// reserve enters names.
func (s *stringTable) reserve(names ...string) error {
	for _, name := range names {
		if name == "" || s.index[name] != 0 {
			continue
		}
		if len(s.index) == maxStrings || s.bytes+len(name) > maxTable {
			return fmt.Errorf("too many different paths, processes and containers: %d with %d bytes", len(s.index), s.bytes)
		}
		if s.index == nil {
			s.index = make(map[string]uint64)
		}
		s.index[name] = uint64(len(s.index) + 1)
		s.bytes += len(name)
		s.fresh = append(s.fresh, name)
		s.freshBytes += len(name)
	}
	return nil
}

// number is that of a name that was entered.
func (s *stringTable) number(name string) uint64 {
	if name == "" {
		return 0
	}
	return s.index[name]
}

func (s *stringTable) takeFresh() []string {
	f := s.fresh
	s.fresh, s.freshBytes = nil, 0
	return f
}

// An object is a frame under construction: msgpack pairs behind room for the
// frame's head.
type object struct {
	b   bytes.Buffer
	enc *msgpack.Encoder
	err error
}

// newObject begins a frame whose payload is a map of n pairs.
func newObject(n int) *object {
	o := new(object)
	o.b.Write(make([]byte, frameHead))
	o.enc = msgpack.NewEncoder(&o.b)
	o.do(o.enc.EncodeMapLen(n))
	return o
}

func (o *object) do(err error) {
	if o.err == nil {
		o.err = err
	}
}

func (o *object) number(key string, v int64) {
	o.do(o.enc.EncodeString(key))
	o.do(o.enc.EncodeInt(v))
}

func (o *object) text(key, v string) {
	o.do(o.enc.EncodeString(key))
	o.do(o.enc.EncodeString(v))
}

func (o *object) texts(key string, v []string) {
	o.do(o.enc.EncodeString(key))
	o.do(o.enc.EncodeArrayLen(len(v)))
	for _, s := range v {
		o.do(o.enc.EncodeString(s))
	}
}

func (o *object) frame(typ byte) ([]byte, error) {
	f := o.b.Bytes()
	if o.err == nil && len(f)-frameHead > maxFrame {
		o.err = fmt.Errorf("%d bytes: at most %d", len(f)-frameHead, maxFrame)
	}
	if o.err != nil {
		return nil, fmt.Errorf("encode trace frame %q: %w", typ, o.err)
	}
	putFrameHead(f, typ)
	return f, nil
}

func encodeHeader(h *Header) ([]byte, error) {
	pairs := 11
	if h.Runs != 0 {
		pairs++
	}
	o := newObject(pairs)
	o.number(keyVersion, int64(h.Version))
	o.text(keyImage, h.Image)
	o.text(keyManifest, string(h.Manifest))
	o.text(keyPlatform, h.Platform)
	o.do(o.enc.EncodeString(keyLayers))
	o.do(o.enc.EncodeArrayLen(len(h.Layers)))
	for _, l := range h.Layers {
		o.do(o.enc.EncodeMapLen(3))
		o.text(keyDigest, string(l.Digest))
		o.number(keySize, l.Size)
		o.number(keyDecoded, l.Decoded)
	}
	o.text(keyWorkload, h.Workload)
	o.texts(keyArgs, h.Args)
	o.text(keyTool, h.Tool)
	o.do(o.enc.EncodeString(keyStart))
	if h.Start.IsZero() {
		o.do(o.enc.EncodeNil())
	} else {
		o.do(o.enc.EncodeInt(h.Start.UnixMicro()))
	}
	o.number(keyReadAhead, h.ReadAhead)
	o.text(keySpace, h.Space)
	if h.Runs != 0 {
		o.number(keyRuns, int64(h.Runs))
	}
	return o.frame(frameHeader)
}

func encodeEnd(e *End) ([]byte, error) {
	o := newObject(5)
	o.text(keyReason, e.Reason)
	o.number(keyReady, e.Ready.Microseconds())
	o.number(keyEvents, int64(e.Events))
	o.number(keyBytes, e.Bytes)
	o.number(keyDuration, e.Duration.Microseconds())
	return o.frame(frameEnd)
}

// encodeEvents makes a frame of events and of the names that are new.
func encodeEvents(h *Header, events []Event, table *stringTable) ([]byte, error) {
	unit := commonUnit(events)
	cols := buildColumns(events, unit, table)
	h.putBlobs(events, &cols[colBlobOff], &cols[colBlobLen])
	fresh := table.takeFresh()
	pairs := 3
	for i := range cols {
		if cols[i].used {
			pairs++
		}
	}
	o := newObject(pairs)
	o.number(keyCount, int64(len(events)))
	o.number(keyUnit, int64(unit))
	o.texts(keyStrings, fresh)
	for i := range cols {
		if cols[i].used {
			o.do(o.enc.EncodeString(cols[i].name))
			o.do(o.enc.EncodeBytes(cols[i].b))
		}
	}
	return o.frame(frameEvents)
}

// commonUnit returns how many low bits are zero in all offsets and lengths.
func commonUnit(events []Event) int {
	all := uint64(1) << maxUnit
	for i := range events {
		all |= uint64(events[i].Off) | uint64(events[i].Len)
	}
	return bits.TrailingZeros64(all)
}

// A writeColumn is left out of the file while all its values are zero.
type writeColumn struct {
	name string
	b    []byte
	used bool
}

func (c *writeColumn) uint(v uint64) {
	c.used = c.used || v != 0
	c.b = binary.AppendUvarint(c.b, v)
}

func (c *writeColumn) delta(v int64) {
	c.used = c.used || v != 0
	c.b = binary.AppendVarint(c.b, v)
}

func buildColumns(events []Event, unit int, table *stringTable) []writeColumn {
	cols := make([]writeColumn, len(columnNames))
	for i, name := range columnNames {
		cols[i].name = name
	}
	var last time.Duration
	var ends [MaxLayers]int64
	for i := range events {
		e := &events[i]
		at := e.At.Truncate(time.Microsecond)
		cols[colAt].delta((at - last).Microseconds())
		last = at
		cols[colWait].uint(uint64(e.Wait.Microseconds()))
		cols[colLayer].uint(uint64(e.Layer))
		off, n := e.Off>>unit, e.Len>>unit
		cols[colOff].delta(off - ends[e.Layer])
		ends[e.Layer] = off + n
		cols[colLen].uint(uint64(n))
		cols[colOrigin].uint(uint64(e.Origin))
		cols[colPath].uint(table.number(e.Path))
		cols[colFileOff].uint(uint64(e.FileOff))
		cols[colProcess].uint(table.number(e.Process))
		cols[colPid].uint(uint64(e.Pid))
		cols[colContainer].uint(table.number(e.Container))
		cols[colHits].uint(uint64(e.Hits))
	}
	return cols
}
