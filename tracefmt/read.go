package tracefmt

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// Open reads a trace file: native, plain or compressed, or that of the
// reference implementation.
func Open(path string) (*Trace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open trace: %w", err)
	}
	defer f.Close()
	br := bufio.NewReader(f)
	head, err := br.Peek(len(zstdMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("trace %s: %w", path, err)
	}
	read := Read
	if isReference(head) {
		read = ReadReference
	}
	t, err := read(br)
	if err != nil {
		return nil, fmt.Errorf("trace %s: %w", path, err)
	}
	return t, nil
}

// errCut ends the reading of a file without an end frame.
var errCut = errors.New("file is cut off")

// Read reads a native trace, plain or compressed. One that is cut off, or
// whose frame at some point has a wrong checksum, gives the frames before that
// point and a nil End; it is an error only if the header is not among them.
// What follows the end frame is not looked at.
//
// A frame that is whole but breaks a rule or a limit is an error. Read
// allocates in proportion to its input, decompressed, and some 200 MiB at most.
func Read(r io.Reader) (*Trace, error) {
	br := bufio.NewReader(r)
	if head, err := br.Peek(len(zstdMagic)); err == nil && string(head) == zstdMagic {
		return readCompressed(br)
	}
	return readPlain(br)
}

func readCompressed(r io.Reader) (*Trace, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxFile))
	if err != nil {
		return nil, fmt.Errorf("decompress trace: %w", err)
	}
	defer z.Close()
	return readPlain(bufio.NewReaderSize(z, 64<<10))
}

func readPlain(r io.Reader) (*Trace, error) {
	d := decoder{in: io.LimitedReader{R: r, N: maxFile + 1}}
	err := d.run()
	switch {
	case err == nil:
		return &d.trace, nil
	case d.in.N <= 0:
		return nil, fmt.Errorf("trace is longer than %d bytes", maxFile)
	case !errors.Is(err, errCut):
		return nil, err
	case !d.begun:
		return nil, fmt.Errorf("%w in its header: nothing was recorded", err)
	}
	return &d.trace, nil
}

// A decoder reads one plain native file.
type decoder struct {
	in      io.LimitedReader
	buf     bytes.Buffer // payload of the current frame
	trace   Trace
	begun   bool // the header was read
	strings []string
	table   int // bytes of strings
}

func (d *decoder) run() error {
	if err := d.readMagic(); err != nil {
		return err
	}
	for n := 0; d.trace.End == nil; n++ {
		if n == maxFrames {
			return fmt.Errorf("trace has more than %d frames", maxFrames)
		}
		typ, err := d.readFrame()
		if err == nil {
			err = d.decode(typ)
		}
		if err != nil {
			return fmt.Errorf("trace frame %d: %w", n, err)
		}
	}
	return nil
}

func (d *decoder) readMagic() error {
	var magic [len(fileMagic)]byte
	n, err := io.ReadFull(&d.in, magic[:])
	if string(magic[:n]) != fileMagic[:n] || n == 0 && errors.Is(err, io.EOF) {
		return errors.New("not a trace: the file does not begin with its magic bytes")
	}
	return cutOr(err)
}

// cutOr maps the end of the input to errCut.
func cutOr(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errCut
	}
	return err
}

// readFrame reads a frame's payload into d.buf and returns its type.
func (d *decoder) readFrame() (byte, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(&d.in, head[:]); err != nil {
		return 0, cutOr(err)
	}
	n := int64(binary.LittleEndian.Uint32(head[4:]))
	if n > maxFrame {
		return 0, fmt.Errorf("%d bytes: at most %d", n, maxFrame)
	}
	d.buf.Reset()
	if _, err := io.CopyN(&d.buf, &d.in, n); err != nil {
		return 0, cutOr(err)
	}
	if frameSum(head[:], d.buf.Bytes()) != binary.LittleEndian.Uint32(head[8:]) {
		return 0, fmt.Errorf("%w: wrong checksum", errCut)
	}
	return head[0], nil
}

func (d *decoder) decode(typ byte) error {
	var err error
	switch {
	case typ == frameHeader && d.begun:
		return errors.New("second header")
	case typ == frameHeader:
		err = d.header(newPayload(d.buf.Bytes()))
	case !d.begun:
		return errors.New("no header before it")
	case typ == frameEvents:
		err = d.events(newPayload(d.buf.Bytes()))
	case typ == frameEnd:
		err = d.end(newPayload(d.buf.Bytes()))
	default:
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%v: %w of the payload", err, io.ErrUnexpectedEOF) //nolint:errorlint // not the end of the file
	}
	return err
}

func (d *decoder) header(p *payload) error {
	h := &d.trace.Header
	h.Space = LayerSpace
	err := p.object(func(key string) (bool, error) {
		return h.field(key, p)
	})
	// A later version may have changed any field: its number comes first.
	if h.Version != 0 && h.Version != Version {
		return h.check()
	}
	if err == nil {
		err = h.check()
	}
	if err != nil {
		return fmt.Errorf("header: %w", err)
	}
	d.begun = true
	return nil
}

func (h *Header) field(key string, p *payload) (known bool, err error) {
	switch key {
	case keyVersion:
		err = intoInt(&h.Version, p)
	case keyImage:
		h.Image, err = p.text(maxString)
	case keyManifest:
		err = intoDigest(&h.Manifest, p)
	case keyPlatform:
		h.Platform, err = p.text(maxString)
	case keyLayers:
		h.Layers, err = readLayers(p)
	case keyWorkload:
		h.Workload, err = p.text(maxString)
	case keyArgs:
		h.Args, err = readStrings(p, maxArgs, maxArg)
	case keyTool:
		h.Tool, err = p.text(maxString)
	case keyStart:
		h.Start, err = readStart(p)
	case keyReadAhead:
		h.ReadAhead, err = p.number(maxSum)
	case keySpace:
		h.Space, err = p.text(maxString)
	case keyRuns:
		err = intoInt(&h.Runs, p)
	default:
		return false, nil
	}
	return true, err
}

func readLayers(p *payload) ([]Layer, error) {
	n, err := p.list(MaxLayers)
	if err != nil || n == 0 {
		return nil, err
	}
	layers := make([]Layer, n)
	for i := range layers {
		l := &layers[i]
		if err := p.object(func(key string) (bool, error) { return l.field(key, p) }); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	return layers, nil
}

func (l *Layer) field(key string, p *payload) (known bool, err error) {
	switch key {
	case keyDigest:
		err = intoDigest(&l.Digest, p)
	case keySize:
		l.Size, err = p.number(maxSum)
	case keyDecoded:
		l.Decoded, err = p.number(maxSum)
	default:
		return false, nil
	}
	return true, err
}

func intoInt(v *int, p *payload) error {
	n, err := p.number(1 << 30)
	*v = int(n)
	return err
}

func intoDigest(v *digest.Digest, p *payload) error {
	s, err := p.text(maxString)
	*v = digest.Digest(s)
	return err
}

func intoDuration(v *time.Duration, p *payload) error {
	n, err := p.number(maxMicros)
	*v = time.Duration(n) * time.Microsecond
	return err
}

func readStart(p *payload) (time.Time, error) {
	if c, err := p.d.PeekCode(); err == nil && c == msgpcode.Nil {
		return time.Time{}, p.d.DecodeNil()
	}
	us, err := p.number(maxMicros)
	if err != nil {
		return time.Time{}, err
	}
	return time.UnixMicro(us).UTC(), nil
}

func readStrings(p *payload, limit, each int) ([]string, error) {
	n, err := p.list(limit)
	if err != nil || n == 0 {
		return nil, err
	}
	list := make([]string, n)
	for i := range list {
		if list[i], err = p.text(each); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (d *decoder) end(p *payload) error {
	var e End
	err := p.object(func(key string) (known bool, err error) {
		switch key {
		case keyReason:
			e.Reason, err = p.text(maxString)
		case keyReady:
			err = intoDuration(&e.Ready, p)
		case keyEvents:
			err = intoInt(&e.Events, p)
		case keyBytes:
			e.Bytes, err = p.number(maxSum)
		case keyDuration:
			err = intoDuration(&e.Duration, p)
		default:
			return false, nil
		}
		return true, err
	})
	if err != nil {
		return fmt.Errorf("end: %w", err)
	}
	d.trace.End = &e
	return nil
}

// An eventFrame is the payload of one, before its columns are decoded.
type eventFrame struct {
	n    int
	unit int
	cols [len(columnNames)]column
}

func (d *decoder) events(p *payload) error {
	var f eventFrame
	for i, name := range columnNames {
		f.cols[i].name = name
	}
	err := p.object(func(key string) (bool, error) { return d.eventField(&f, key, p) })
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	if len(d.trace.Events)+f.n > MaxEvents {
		return fmt.Errorf("more than %d events", MaxEvents)
	}
	// An event has at least a length.
	if f.n > len(f.cols[colLen].b) {
		return fmt.Errorf("events: %s: %w", keyLen, errColumn)
	}
	return d.decodeColumns(&f)
}

func (d *decoder) eventField(f *eventFrame, key string, p *payload) (known bool, err error) {
	switch key {
	case keyCount:
		if err = intoInt(&f.n, p); err == nil && f.n > maxFrameEvents {
			err = fmt.Errorf("%d events in a frame: at most %d", f.n, maxFrameEvents)
		}
		return true, err
	case keyUnit:
		if err = intoInt(&f.unit, p); err == nil && f.unit > maxUnit {
			err = fmt.Errorf("unit %d: at most %d", f.unit, maxUnit)
		}
		return true, err
	case keyStrings:
		return true, d.addStrings(p)
	}
	for i, name := range columnNames {
		if name == key {
			return true, f.cols[i].read(p)
		}
	}
	return false, nil
}

func (d *decoder) addStrings(p *payload) error {
	fresh, err := readStrings(p, maxStrings-len(d.strings), maxString)
	if err != nil {
		return err
	}
	for _, s := range fresh {
		d.table += len(s)
	}
	if d.table > maxTable {
		return fmt.Errorf("more than %d bytes of names", maxTable)
	}
	d.strings = append(d.strings, fresh...)
	return nil
}

func (d *decoder) decodeColumns(f *eventFrame) error {
	c := columnReader{f: f, strings: d.strings}
	first := len(d.trace.Events)
	d.trace.Events = room(d.trace.Events, f.n)
	for i := range f.n {
		e, err := c.next()
		if err == nil {
			err = d.trace.checkEvent(&e)
		}
		if err != nil {
			return fmt.Errorf("event %d: %w", i, err)
		}
		d.trace.Events = append(d.trace.Events, e)
	}
	if err := c.blobs(&d.trace.Header, d.trace.Events[first:]); err != nil {
		return err
	}
	for i := range f.cols {
		if err := f.cols[i].end(); err != nil {
			return err
		}
	}
	return nil
}

// room returns events with room for n more. It grows in large steps, so that
// what is left behind is little beside what is in use.
func room(events []Event, n int) []Event {
	need := len(events) + n
	if need <= cap(events) {
		return events
	}
	return append(make([]Event, 0, max(need, min(4*cap(events), MaxEvents))), events...)
}

// A columnReader puts a frame's events together. The first error sticks.
type columnReader struct {
	f       *eventFrame
	strings []string
	at      int64            // of the event before, microseconds
	ends    [MaxLayers]int64 // of the event before in the layer, in units
	err     error
}

func (c *columnReader) next() (Event, error) {
	var e Event
	limit := int64(maxSum) >> c.f.unit
	c.at = c.delta(colAt, c.at, maxMicros)
	e.At = time.Duration(c.at) * time.Microsecond
	e.Wait = time.Duration(c.uint(colWait, maxMicros)) * time.Microsecond
	e.Layer = int(c.uint(colLayer, MaxLayers-1))
	off := c.delta(colOff, c.ends[e.Layer], limit)
	n := c.uint(colLen, limit-off)
	c.ends[e.Layer] = off + n
	e.Off, e.Len = off<<c.f.unit, n<<c.f.unit
	e.Origin = uint8(c.uint(colOrigin, 255))
	e.Path = c.name(colPath)
	e.FileOff = c.uint(colFileOff, maxSum)
	e.Process = c.name(colProcess)
	e.Pid = int(c.uint(colPid, maxPid))
	e.Container = c.name(colContainer)
	e.Hits = int(c.uint(colHits, maxRuns))
	return e, c.err
}

func (c *columnReader) uint(col int, limit int64) int64 {
	v, err := c.f.cols[col].uint(limit)
	if c.err == nil {
		c.err = err
	}
	return v
}

func (c *columnReader) delta(col int, from, limit int64) int64 {
	v, err := c.f.cols[col].delta(from, limit)
	if c.err == nil {
		c.err = err
	}
	return v
}

func (c *columnReader) name(col int) string {
	i := c.uint(col, int64(len(c.strings)))
	if i == 0 {
		return ""
	}
	return c.strings[i-1]
}
