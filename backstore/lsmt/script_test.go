package lsmt

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/stretchr/testify/require"
)

// TestScripts runs the text scripts under testdata. Numbers are sectors.
//
//	layer NAME             a layer of entries "OFF+LEN @MOFFSET|zero [pad]"
//	merge NAME...          the merged index of layers, bottom first
//	lookup OFF N           what the merged index, or the writable layer, says
//	new append|sparse N    a writable layer of N sectors
//	ops                    lines "write OFF N BYTE", "discard OFF N", "sync",
//	                       "resize N", "seal", "close"
//	read OFF N             runs of equal bytes
//	commit [NAME]          the index of the committed layer, named for merge
//	reopen [cut=N]         closes and reopens; N bytes less of index log
//	log                    the records of the index log
func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata/scripts", func(t *testing.T, path string) {
		s := &script{layers: map[string]*Layer{}}
		defer s.close()
		datadriven.RunTest(t, path, s.run)
	})
}

type script struct {
	layers map[string]*Layer
	index  *Index // of the last merge; nil once there is a writable layer
	w      *Writable
}

func (s *script) close() {
	if s.w != nil {
		s.w.Close()
	}
}

func (s *script) run(t *testing.T, d *datadriven.TestData) string {
	var out string
	var err error
	switch d.Cmd {
	case "layer":
		out, err = s.layer(d)
	case "merge":
		out, err = s.merge(t, d)
	case "lookup":
		out = s.lookup(t, d)
	case "new":
		out, err = s.create(t, d)
	case "ops":
		out, err = s.ops(t, d)
	case "read":
		out, err = s.read(t, d)
	case "commit":
		out, err = s.commit(t, d)
	case "reopen":
		out, err = s.reopen(t, d)
	case "log":
		out, err = s.log()
	default:
		t.Fatalf("%s: unknown command %q", d.Pos, d.Cmd)
	}
	if err != nil {
		for _, f := range []*os.File{s.file(0), s.file(1)} {
			if f != nil {
				out += strings.ReplaceAll(err.Error(), f.Name(), "FILE") + "\n"
				return out
			}
		}
		return out + err.Error() + "\n"
	}
	return out
}

func (s *script) file(i int) *os.File {
	if s.w == nil {
		return nil
	}
	return []*os.File{s.w.data, s.w.log}[i]
}

// num is argument i of a command.
func num(t *testing.T, d *datadriven.TestData, i int) int64 {
	require.Less(t, i, len(d.CmdArgs), d.Pos)
	return atoi(t, d.CmdArgs[i].Key)
}

func atoi(t *testing.T, s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	require.NoError(t, err)
	return n
}

func (s *script) layer(d *datadriven.TestData) (string, error) {
	b := (&header{flags: flagHeader | flagData | flagSealed}).append(nil)
	const dataSectors = 100
	b = append(b, make([]byte, dataSectors*SectorSize)...)
	h := header{flags: flagData | flagSealed, indexOffset: uint64(len(b)), virtualSize: 1000 * SectorSize}
	for line := range strings.Lines(d.Input) {
		var off, n, moff uint64
		var what string
		fmt.Sscanf(strings.Replace(line, "@", "@ ", 1), "%d+%d %s %d", &off, &n, &what, &moff)
		h.indexSize++
		if what == "pad" {
			b = appendPadding(b)
			continue
		}
		b = newEntry(off, n, moff, what == "zero").append(b)
		b[len(b)-1] = 7 // a tag, ignored
	}
	b = h.append(b)
	l, err := OpenLayer(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return "", err
	}
	s.layers[d.CmdArgs[0].Key] = l
	return list(l.Index()), nil
}

// list prints an index.
func list(x *Index) string {
	var b strings.Builder
	for seg := range x.All() {
		b.WriteString(show(seg))
	}
	return b.String()
}

// show prints a segment.
func show(s Segment) string {
	switch s.Kind {
	case Data:
		where := ""
		if s.Layer >= 0 {
			where = fmt.Sprintf(" layer %d", s.Layer)
		}
		return fmt.Sprintf("%d+%d data%s @%d\n", s.Off/SectorSize, s.Len/SectorSize, where, s.LayerOff/SectorSize)
	case Zero:
		if s.Layer >= 0 {
			return fmt.Sprintf("%d+%d zero layer %d\n", s.Off/SectorSize, s.Len/SectorSize, s.Layer)
		}
	}
	return fmt.Sprintf("%d+%d %v\n", s.Off/SectorSize, s.Len/SectorSize, s.Kind)
}

func (s *script) merge(t *testing.T, d *datadriven.TestData) (string, error) {
	var layers []*Layer
	for _, a := range d.CmdArgs {
		require.Contains(t, s.layers, a.Key, d.Pos)
		layers = append(layers, s.layers[a.Key])
	}
	x, err := Merge(layers)
	if err != nil {
		return "", err
	}
	s.index = x
	return list(x), nil
}

func (s *script) lookup(t *testing.T, d *datadriven.TestData) string {
	off, n := num(t, d, 0)*SectorSize, num(t, d, 1)*SectorSize
	var segs []Segment
	if s.index != nil {
		segs = s.index.Lookup(nil, off, n)
	} else {
		segs = s.w.Lookup(nil, off, n)
	}
	var b strings.Builder
	for _, seg := range segs {
		b.WriteString(show(seg))
	}
	return b.String()
}

func (s *script) create(t *testing.T, d *datadriven.TestData) (string, error) {
	s.close()
	s.index = nil
	o := &WritableOptions{VirtualSize: num(t, d, 1) * SectorSize}
	var err error
	if d.CmdArgs[0].Key == "sparse" {
		s.w, err = CreateSparse(newFile(t), o)
	} else {
		s.w, err = CreateAppend(newFile(t), newFile(t), o)
	}
	return "", err
}

func (s *script) ops(t *testing.T, d *datadriven.TestData) (string, error) {
	for line := range strings.Lines(d.Input) {
		f := strings.Fields(line)
		var a [2]int64
		for i := range min(2, len(f)-1) {
			a[i] = atoi(t, f[i+1]) * SectorSize
		}
		var err error
		switch f[0] {
		case "write":
			_, err = s.w.WriteAt(bytes.Repeat([]byte(f[3]), int(a[1])), a[0])
		case "discard":
			err = s.w.Discard(a[0], a[1])
		case "sync":
			err = s.w.Sync()
		case "resize":
			err = s.w.Resize(a[0])
		case "seal":
			err = s.w.Seal()
		case "close":
			err = s.w.Close()
		default:
			t.Fatalf("%s: unknown operation %q", d.Pos, f[0])
		}
		if err != nil {
			return "", err
		}
	}
	return "", nil
}

func (s *script) read(t *testing.T, d *datadriven.TestData) (string, error) {
	off := num(t, d, 0) * SectorSize
	p := make([]byte, num(t, d, 1)*SectorSize)
	n, err := s.w.ReadAt(p, off)
	var b strings.Builder
	for i := 0; i < n; {
		j := i
		for j < n && p[j] == p[i] {
			j++
		}
		c := "zeros"
		if p[i] != 0 {
			c = string(p[i])
		}
		fmt.Fprintf(&b, "%d+%d %s\n", (off+int64(i))/SectorSize, (j-i)/SectorSize, c)
		i = j
	}
	return b.String(), err
}

func (s *script) commit(t *testing.T, d *datadriven.TestData) (string, error) {
	var b bytes.Buffer
	if err := s.w.Commit(context.Background(), &b, CommitOptions{}); err != nil {
		return "", err
	}
	l := openLayer(t, b.Bytes())
	if len(d.CmdArgs) > 0 {
		s.layers[d.CmdArgs[0].Key] = l
	}
	sameBytes(t, content(t, s.w), device(t, l), "committed")
	return list(l.Index()), nil
}

func (s *script) reopen(t *testing.T, d *datadriven.TestData) (string, error) {
	require.NoError(t, s.w.Close())
	data := reopen(t, s.w.data)
	if s.w.log == nil {
		w, err := OpenSparse(data, nil)
		if err == nil {
			s.w = w
		}
		return "", err
	}
	log := reopen(t, s.w.log)
	if d.HasArg("cut") {
		var n int64
		d.ScanArgs(t, "cut", &n)
		fi, err := log.Stat()
		require.NoError(t, err)
		require.NoError(t, log.Truncate(fi.Size()-n))
	}
	w, err := OpenAppend(data, log)
	if err != nil {
		return "", err
	}
	s.w = w
	if w.Dropped() > 0 {
		return fmt.Sprintf("dropped %d\n", w.Dropped()), nil
	}
	return "", nil
}

func (s *script) log() (string, error) {
	fi, err := s.w.log.Stat()
	if err != nil {
		return "", err
	}
	p, err := io.ReadAll(io.NewSectionReader(s.w.log, headerSpace, fi.Size()-headerSpace))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for ; len(p) >= entrySize; p = p[entrySize:] {
		b.WriteString(show(parseEntry(p).segment()))
	}
	if len(p) > 0 {
		fmt.Fprintf(&b, "%d bytes\n", len(p))
	}
	return b.String(), nil
}
