package tracefmt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(hostileEnv); path != "" {
		hostileChild(path)
		return
	}
	goleak.VerifyTestMain(m)
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

// sample is a trace that uses every field.
func sample() *Trace {
	t := &Trace{
		Header: Header{
			Version: 1, Image: "registry.example/app:1", Manifest: digest.FromString("manifest"), Platform: "linux/amd64",
			Layers: []Layer{
				{Digest: digest.FromString("bottom"), Size: 1000, Decoded: 1 << 30},
				{Digest: digest.FromString("top"), Size: 2000, Decoded: 1 << 20},
				{},
			},
			Workload: "python3-1a2b3c4d", Args: []string{"python3", "-m", "http.server"}, Tool: "reprise test",
			Start: time.UnixMicro(1_700_000_000_123_456).UTC(), ReadAhead: 128 << 10, Space: LayerSpace,
		},
		Events: []Event{
			{At: ms(1), Layer: 0, Off: 4096, Len: 8192, Origin: 4, Wait: ms(20)},
			{At: ms(2), Layer: 1, Off: 1 << 19, Len: 4096, Origin: 3, Path: "/usr/bin/python3", FileOff: 65536, Process: "python3"},
			{At: ms(2), Layer: 1, Off: 1<<19 + 4096, Len: 512, Path: "/usr/bin/python3", FileOff: 65536 + 4096, Process: "python3"},
			{At: ms(30), Layer: 0, Off: 1 << 29, Len: 4096, Process: "sh"},
			{At: ms(29), Layer: 2, Off: 1 << 40, Len: 1 << 20},
		},
	}
	t.End = &End{Reason: "ready: port 8080", Ready: ms(31), Events: 5, Bytes: sumLen(t.Events), Duration: ms(40)}
	return t
}

// withBlobs is sample with the blob ranges of all events but one.
func withBlobs() *Trace {
	t := sample()
	for i, r := range [][2]int64{{7, 93}, {700, 90}, {700, 90}, {0, 0}, {1 << 39, 1 << 20}} {
		t.Events[i].BlobOff, t.Events[i].BlobLen = r[0], r[1]
	}
	return t
}

// withRuns is sample as a merge of recordings that know who read.
func withRuns() *Trace {
	t := sample()
	t.Runs = 300
	for i, e := range []Event{
		{Pid: 1 << 22, Container: "0123456789ab", Hits: 300}, {Pid: 7, Hits: 1}, {Container: "python3"}, {Hits: 2}, {Pid: 1},
	} {
		t.Events[i].Pid, t.Events[i].Container, t.Events[i].Hits = e.Pid, e.Container, e.Hits
	}
	return t
}

func plain(t testing.TB, tr *Trace) []byte {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, writeAll(&b, tr))
	return b.Bytes()
}

func TestCutAtEveryByte(t *testing.T) {
	var b bytes.Buffer
	tr := sample()
	w, err := NewWriter(&b, tr.Header)
	require.NoError(t, err)
	head := b.Len()
	ends := []int{head} // ends[n] is where the file has n events
	for _, e := range tr.Events {
		require.NoError(t, w.Add(e))
		require.NoError(t, w.Flush())
		ends = append(ends, b.Len())
	}
	require.NoError(t, w.Finish(*tr.End))
	file := b.Bytes()
	for cut := range file {
		got, err := Read(bytes.NewReader(file[:cut]))
		if cut < head {
			require.Error(t, err, "cut at %d", cut)
			continue
		}
		require.NoError(t, err, "cut at %d", cut)
		require.Nil(t, got.End)
		n := 0
		for n+1 < len(ends) && ends[n+1] <= cut {
			n++
		}
		require.Len(t, got.Events, n, "cut at %d", cut)
		require.Equal(t, tr.Header, got.Header)
		if n > 0 {
			require.Equal(t, tr.Events[:n], got.Events)
		}
	}
	got, err := Read(bytes.NewReader(append(file, "what follows the end"...)))
	require.NoError(t, err)
	require.Equal(t, tr, got)
}

func TestCutCompressed(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, Encode(&b, sample()))
	for cut := range b.Len() {
		got, err := Read(bytes.NewReader(b.Bytes()[:cut]))
		if err == nil {
			require.Nil(t, got.End, "cut at %d", cut)
		}
	}
}

func TestFlippedBits(t *testing.T) {
	file := plain(t, sample())
	for i := range file {
		bad := bytes.Clone(file)
		bad[i] ^= 0x10
		got, err := Read(bytes.NewReader(bad))
		if err == nil {
			require.Nil(t, got.End, "byte %d", i)
		}
	}
}

func TestEncode(t *testing.T) {
	tr := sample()
	var b, again bytes.Buffer
	require.NoError(t, Encode(&b, tr))
	require.NoError(t, Encode(&again, tr))
	require.Equal(t, b.Bytes(), again.Bytes())
	require.Equal(t, sample(), tr, "Encode changed its argument")
	got, err := Read(&b)
	require.NoError(t, err)
	tr.Compact()
	require.Equal(t, tr, got)
	require.Len(t, got.Events, 4)
	require.Equal(t, Event{
		At: ms(2), Layer: 1, Off: 1 << 19, Len: 4608, Origin: 3, Path: "/usr/bin/python3", FileOff: 65536, Process: "python3",
	}, got.Events[1])
}

func TestFirstTouch(t *testing.T) {
	tr := &Trace{Events: []Event{
		{At: ms(5), Off: 0, Len: 100, Path: "/f", FileOff: 1000},
		{At: ms(1), Off: 20, Len: 10},
		{At: ms(1), Off: 40, Len: 10},
		{At: ms(6), Off: 90, Len: 20},
		{At: ms(7), Layer: 3, Off: 90, Len: 20},
		{At: ms(8), Off: 0, Len: 110},
	}}
	require.Equal(t, []Event{
		{At: ms(1), Off: 20, Len: 10},
		{At: ms(1), Off: 40, Len: 10},
		{At: ms(5), Off: 0, Len: 20, Path: "/f", FileOff: 1000},
		{At: ms(5), Off: 30, Len: 10, Path: "/f", FileOff: 1030},
		{At: ms(5), Off: 50, Len: 50, Path: "/f", FileOff: 1050},
		{At: ms(6), Off: 100, Len: 10},
		{At: ms(7), Layer: 3, Off: 90, Len: 20},
	}, tr.FirstTouch())
	require.EqualValues(t, 130, tr.Bytes())
	require.Equal(t, ms(5), tr.Events[0].At, "FirstTouch changed the trace")
}

// TestTouchedModel compares Touched with a slice of bools.
func TestTouchedModel(t *testing.T) {
	for seed := range uint64(20) {
		const size = 20_000
		rnd := rand.New(rand.NewPCG(seed, 1))
		var touched Touched
		model := make([]bool, size)
		longest := int64(1) << rnd.IntN(10)
		for range 1000 {
			off := rnd.Int64N(size)
			e := Event{Off: off, Len: 1 + rnd.Int64N(min(longest, size-off))}
			got := make([]bool, size)
			for _, p := range touched.Add(nil, e) {
				for i := p.Off; i < p.Off+p.Len; i++ {
					if model[i] || got[i] {
						t.Fatalf("seed %d: byte %d was touched before", seed, i)
					}
					got[i] = true
				}
			}
			for i := e.Off; i < e.Off+e.Len; i++ {
				if model[i] == got[i] {
					t.Fatalf("seed %d: byte %d is missing", seed, i)
				}
				model[i] = true
			}
		}
		checkSpans(t, &touched.layers[0])
	}
}

func checkSpans(t *testing.T, s *spans) {
	last := int64(-1)
	for _, blk := range s.blocks {
		require.NotEmpty(t, blk)
		require.LessOrEqual(t, len(blk), maxBlock)
		for _, v := range blk {
			require.Greater(t, v.off, last)
			require.Greater(t, v.end, v.off)
			last = v.end
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	layers := []Layer{{Decoded: 4096}}
	for name, e := range map[string]Event{
		"empty":           {},
		"negative":        {Off: -1, Len: 1},
		"overflow":        {Off: math.MaxInt64, Len: 1},
		"layer":           {Layer: 1, Len: 1},
		"negative layer":  {Layer: -1, Len: 1},
		"behind the end":  {Off: 4096, Len: 1},
		"negative time":   {At: -1, Len: 1},
		"file offset":     {Len: 2, FileOff: math.MaxInt64 - 1, Path: "/x"},
		"long path":       {Len: 1, Path: strings.Repeat("x", maxString+1)},
		"wait":            {Len: 1, Wait: -time.Second},
		"negative length": {Len: -1},
		"long container":  {Len: 1, Container: strings.Repeat("x", maxString+1)},
		"negative pid":    {Len: 1, Pid: -1},
		"large pid":       {Len: 1, Pid: maxPid + 1},
		"negative hits":   {Len: 1, Hits: -1},
		"hits":            {Len: 1, Hits: 2},
	} {
		w, err := NewWriter(io.Discard, Header{Layers: layers})
		require.NoError(t, err)
		require.Error(t, w.Add(e), name)
		require.NoError(t, w.Add(Event{Len: 1}), name)
	}
	for name, h := range map[string]Header{
		"version":  {Version: 2},
		"space":    {Space: "blob"},
		"layers":   {Layers: make([]Layer, MaxLayers+1)},
		"digest":   {Layers: []Layer{{Digest: "sha256:x"}}},
		"manifest": {Manifest: "nothing"},
		"image":    {Image: strings.Repeat("x", maxString+1)},
		"args":     {Args: make([]string, maxArgs+1)},
		"start":    {Start: time.UnixMicro(-1)},
		"runs":     {Runs: maxRuns + 1},
		"no runs":  {Runs: -1},
	} {
		_, err := NewWriter(io.Discard, h)
		require.Error(t, err, name)
	}
}

func TestFinished(t *testing.T) {
	w, err := NewWriter(io.Discard, Header{})
	require.NoError(t, err)
	require.NoError(t, w.Finish(End{}))
	require.ErrorIs(t, w.Add(Event{Len: 1}), errFinished)
	require.ErrorIs(t, w.Finish(End{}), errFinished)
}

type failing struct{ left int }

var errFull = errors.New("disk full")

func (f *failing) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestFullDisk(t *testing.T) {
	w, err := NewWriter(&failing{left: 400}, Header{})
	require.NoError(t, err)
	for range 100 {
		require.NoError(t, w.Add(Event{Off: 1, Len: 1}))
		if err = w.Flush(); err != nil {
			break
		}
	}
	require.ErrorIs(t, err, errFull)
	require.ErrorIs(t, w.Add(Event{Len: 1}), errFull)
	require.ErrorIs(t, w.Finish(End{}), errFull)
}

func TestManyFrames(t *testing.T) {
	const n = maxFrameEvents*2 + 10
	tr := &Trace{Header: Header{}.filled()}
	for i := range int64(n) {
		tr.Events = append(tr.Events, Event{Off: i * 1024, Len: 512, Path: fmt.Sprint("/lib/", i%5000), FileOff: i})
	}
	got, err := Read(bytes.NewReader(plain(t, tr)))
	require.NoError(t, err)
	require.Equal(t, tr.Events, got.Events)
}

func TestManyNames(t *testing.T) {
	long := strings.Repeat("x", maxString-20)
	w, err := NewWriter(io.Discard, Header{})
	require.NoError(t, err)
	for i := range maxTable / (maxString - 20) {
		require.NoError(t, w.Add(Event{Len: 1, Path: fmt.Sprintf("%s%06d", long, i)[6:]}))
	}
	for i := 0; err == nil && i < 100; i++ {
		err = w.Add(Event{Len: 1, Path: fmt.Sprintf("%s%06d", long, -1-i)})
	}
	require.ErrorContains(t, err, "too many different paths, processes and containers")
}

// frame makes a frame with a good checksum.
func frame(typ byte, payload []byte) []byte {
	f := append(make([]byte, frameHead), payload...)
	putFrameHead(f, typ)
	return f
}

// file makes a file of a header and one more frame.
func file(t testing.TB, h Header, typ byte, build func(o *object), pairs int) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := NewWriter(&b, h)
	require.NoError(t, err)
	o := newObject(pairs)
	build(o)
	f, err := o.frame(typ)
	require.NoError(t, err)
	b.Write(f)
	return b.Bytes()
}

func bin(o *object, key string, v []byte) {
	o.do(o.enc.EncodeString(key))
	o.do(o.enc.EncodeBytes(v))
}

func TestHostileEvents(t *testing.T) {
	h := Header{Layers: []Layer{{Decoded: 1 << 20, Size: 1 << 10}}}
	one := func(o *object, n int64, cols ...any) {
		o.number(keyCount, n)
		for i := 0; i < len(cols); i += 2 {
			bin(o, cols[i].(string), cols[i+1].([]byte))
		}
	}
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}
	maxVarint := []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}
	for name, c := range map[string]struct {
		pairs int
		build func(o *object)
		err   string
	}{
		"count without columns": {1, func(o *object) { one(o, 5) }, "does not fit"},
		"count too large":       {1, func(o *object) { one(o, 1<<20) }, "at most 65536"},
		"negative count":        {1, func(o *object) { one(o, -1) }, "not within"},
		"no length":             {2, func(o *object) { one(o, 1, keyLen, []byte{0}) }, "not a range"},
		"layer":                 {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyLayer, []byte{1}) }, "layer 1"},
		"layer beyond all":      {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyLayer, []byte{255, 1}) }, "at most 254"},
		"negative offset":       {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyOff, []byte{1}) }, "step of -1"},
		"huge offset":           {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyOff, huge) }, "not within"},
		"huge length":           {2, func(o *object) { one(o, 1, keyLen, huge) }, "at most"},
		"behind the layer":      {2, func(o *object) { one(o, 1, keyLen, []byte{0x81, 0x80, 0x40}) }, "has 1048576 bytes"},
		"overlong varint":       {2, func(o *object) { one(o, 1, keyLen, bytes.Repeat([]byte{0xff}, 20)) }, "does not fit"},
		"short column":          {3, func(o *object) { one(o, 2, keyLen, []byte{1, 1}, keyAt, []byte{0}) }, "does not fit"},
		"long column":           {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyAt, []byte{0, 0}) }, "bytes are left"},
		"unknown name":          {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyPath, []byte{1}) }, "path: 1: at most 0"},
		"unit": {3, func(o *object) {
			one(o, 1, keyLen, []byte{1})
			o.number(keyUnit, 13)
		}, "unit"},
		"unit that overflows": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyOff, []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
			o.number(keyUnit, 12)
		}, "not within"},
		"pid":               {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyPid, huge) }, "pid: 18446744073709551615: at most"},
		"container":         {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyContainer, []byte{1}) }, "container: 1: at most 0"},
		"hits":              {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyHits, []byte{2}) }, "seen in 2 recordings of 1"},
		"short pid column":  {3, func(o *object) { one(o, 2, keyLen, []byte{1, 1}, keyPid, []byte{1}) }, "pid: column does not fit"},
		"origin":            {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyOrigin, []byte{0x80, 2}) }, "at most 255"},
		"blob offset alone": {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyBlobOff, []byte{0}) }, "bloboff without bloblen"},
		"blob length alone": {3, func(o *object) { one(o, 1, keyLen, []byte{1}, keyBlobLen, []byte{2}) }, "or the other way round"},
		"short blob column": {4, func(o *object) {
			one(o, 2, keyLen, []byte{1, 1}, keyBlobOff, []byte{0}, keyBlobLen, []byte{2, 2})
		}, "bloboff: column does not fit"},
		"long blob column": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, []byte{0}, keyBlobLen, []byte{2, 2})
		}, "bloblen: column does not fit"},
		"negative blob offset": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, []byte{1}, keyBlobLen, []byte{2})
		}, "bloboff: step of -1"},
		"negative blob length": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, []byte{0}, keyBlobLen, []byte{1})
		}, "bloblen: step of -1"},
		"huge blob offset": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, huge, keyBlobLen, []byte{2})
		}, "bloboff: step of"},
		"blob range that overflows": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, maxVarint, keyBlobLen, []byte{2})
		}, "overflow"},
		"behind the blob": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, []byte{0xfe, 0x0f}, keyBlobLen, []byte{4})
		}, "that of layer 0 has 1024 bytes"},
		"blob offset without a length": {4, func(o *object) {
			one(o, 1, keyLen, []byte{1}, keyBlobOff, []byte{2}, keyBlobLen, []byte{0})
		}, "not a range"},
	} {
		_, err := Read(bytes.NewReader(file(t, h, frameEvents, c.build, c.pairs)))
		require.ErrorContains(t, err, c.err, name)
	}
}

func TestHostileFrames(t *testing.T) {
	head := plain(t, &Trace{})
	nested := bytes.Repeat([]byte{0x91}, 1<<20)
	for name, c := range map[string]struct{ file, err string }{
		"empty":              {"", "not a trace"},
		"text":               {"hello, world", "not a trace"},
		"magic only":         {fileMagic, "nothing was recorded"},
		"half a magic":       {fileMagic[:3], "nothing was recorded"},
		"events first":       {fileMagic + string(frame(frameEvents, []byte{0x80})), "no header"},
		"empty header":       {fileMagic + string(frame(frameHeader, []byte{0x80})), "version 0"},
		"no payload":         {fileMagic + string(frame(frameHeader, nil)), "unexpected EOF"},
		"second header":      {string(head) + string(frame(frameHeader, []byte{0x80})), "second header"},
		"long frame":         {string(head) + "E\x00\x00\x00\x01\x00\x80\x00\x00\x00\x00\x00", "at most 8388608"},
		"map of 4 G":         {string(head) + string(frame(frameEvents, []byte{0xdf, 0xff, 0xff, 0xff, 0xff, 0, 0})), "keys in"},
		"array of 4 G":       {string(head) + string(frame(frameEvents, append([]byte{0x81, 0xa7}, "strings\xdd\xff\xff\xff\xff"...))), "elements"},
		"string of 4 G":      {string(head) + string(frame(frameEnd, append([]byte{0x81, 0xa6}, "reason\xdb\xff\xff\xff\xff"...))), "bytes"},
		"unknown, 4 G":       {string(head) + string(frame(frameEnd, append([]byte{0x81, 0xa1}, "x\xdd\xff\xff\xff\xff"...))), "elements in"},
		"unknown, ext 4 G":   {string(head) + string(frame(frameEnd, append([]byte{0x81, 0xa1}, "x\xc9\xff\xff\xff\xff\x05"...))), "EOF"},
		"nested":             {string(head) + string(frame(frameEnd, append([]byte{0x81, 0xa1, 'x'}, nested...))), "elements in"},
		"number as a string": {string(head) + string(frame(frameEnd, append([]byte{0x81, 0xa6}, "events\xa1x"...))), "events"},
	} {
		_, err := Read(strings.NewReader(c.file))
		require.ErrorContains(t, err, c.err, name)
	}
}

func TestUnknownVersion(t *testing.T) {
	o := newObject(2)
	o.number(keyVersion, 7)
	o.number(keyImage, 5) // no string any more
	f, err := o.frame(frameHeader)
	require.NoError(t, err)
	_, err = Read(strings.NewReader(fileMagic + string(f)))
	require.ErrorContains(t, err, "trace format version 7: this program reads version 1")
}

func TestUnknownKeysAndFrames(t *testing.T) {
	b := file(t, Header{}, frameEvents, func(o *object) {
		o.do(o.enc.EncodeString("extra"))
		o.do(o.enc.Encode(map[string]any{"a": []int{1, 2, 3}, "b": map[string]any{"c": nil, "d": 1.5, "e": []byte{1}}}))
		o.number(keyCount, 1)
		bin(o, keyLen, []byte{9})
		bin(o, "later", []byte{1, 2, 3})
	}, 4)
	b = append(b, frame('?', []byte("no msgpack at all"))...)
	end, err := encodeEnd(&End{Reason: "quiet"})
	require.NoError(t, err)
	got, err := Read(bytes.NewReader(append(b, end...)))
	require.NoError(t, err)
	require.Equal(t, []Event{{Len: 9}}, got.Events)
	require.Equal(t, "quiet", got.End.Reason)
}

// TestOlderReader reads a trace as a program does that knows neither recordings
// nor who read.
func TestOlderReader(t *testing.T) {
	b := plain(t, withRuns())
	for _, key := range []string{keyRuns, keyPid, keyContainer, keyHits} {
		old := append([]byte{0xa0 | byte(len(key))}, key...) // a short string in msgpack
		require.Equal(t, 1, bytes.Count(b, old), key)
		unknown := bytes.Clone(old)
		unknown[1] = '~'
		b = bytes.Replace(b, old, unknown, 1)
	}
	got, err := Read(bytes.NewReader(fixSums(b)))
	require.NoError(t, err)
	require.Equal(t, sample(), got)
}

func TestCompactWho(t *testing.T) {
	in := func(off int64, pid int, container string, hits int) Event {
		return Event{Off: off, Len: 10, Process: "p", Pid: pid, Container: container, Hits: hits}
	}
	tr := &Trace{Header: Header{Runs: 3}, Events: []Event{
		in(0, 1, "a", 0), in(10, 1, "a", 1), in(20, 2, "a", 1), in(30, 2, "b", 1), in(40, 2, "b", 2), in(50, 2, "b", 2), in(45, 2, "c", 3),
	}}
	tr.Compact()
	want := []Event{in(0, 1, "a", 0), in(20, 2, "a", 1), in(30, 2, "b", 1), in(40, 2, "b", 2)}
	want[0].Len, want[3].Len = 20, 20
	require.Equal(t, want, tr.Events)
	var touched Touched
	touched.Add(nil, in(0, 1, "a", 1))
	require.Equal(t, []Event{{Off: 10, Len: 5, Pid: 3, Container: "x", Hits: 2}}, touched.Add(nil, Event{Off: 5, Len: 10, Pid: 3, Container: "x", Hits: 2}))
}

func TestTooManyEvents(t *testing.T) {
	var b bytes.Buffer
	_, err := NewWriter(&b, Header{})
	require.NoError(t, err)
	o := newObject(2)
	o.number(keyCount, maxFrameEvents)
	bin(o, keyLen, bytes.Repeat([]byte{1}, maxFrameEvents))
	f, err := o.frame(frameEvents)
	require.NoError(t, err)
	for range MaxEvents/maxFrameEvents + 1 {
		b.Write(f)
	}
	_, err = Read(&b)
	require.ErrorContains(t, err, "more than 1048576 events")
}

// TestBomb reads a small compressed file that is a very long one.
func TestBomb(t *testing.T) {
	var packed bytes.Buffer
	z, err := zstd.NewWriter(&packed, zstd.WithEncoderConcurrency(1))
	require.NoError(t, err)
	_, err = NewWriter(z, Header{})
	require.NoError(t, err)
	filler := frame('?', make([]byte, maxFrame))
	for range maxFile/maxFrame + 2 {
		_, err = z.Write(filler)
		require.NoError(t, err)
	}
	require.NoError(t, z.Close())
	require.Less(t, packed.Len(), 1<<20)
	_, err = Read(&packed)
	require.ErrorContains(t, err, "longer than")
}

// TestBombWindow asks for a window of 64 MiB, in a few bytes.
func TestBombWindow(t *testing.T) {
	_, err := Read(strings.NewReader(zstdMagic + "\x00\x80" + "\x03\x00\x02x"))
	require.ErrorIs(t, err, zstd.ErrWindowSizeExceeded)
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	var packed, ref bytes.Buffer
	require.NoError(t, Encode(&packed, sample()))
	require.NoError(t, WriteReference(&ref, sample()))
	for name, b := range map[string][]byte{"plain": plain(t, sample()), "packed": packed.Bytes(), "reference": ref.Bytes()} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o666))
		tr, err := Open(path)
		require.NoError(t, err, name)
		require.NotEmpty(t, tr.Events, name)
	}
	_, err := Open(filepath.Join(dir, "absent"))
	require.ErrorIs(t, err, os.ErrNotExist)
	paths := filepath.Join(dir, "paths")
	require.NoError(t, os.WriteFile(paths, []byte("/usr/bin/python3\n"), 0o666))
	_, err = Open(paths)
	require.ErrorContains(t, err, paths)
}

// TestRunsSurvive writes and reads, in all forms, what a merge knows.
func TestRunsSurvive(t *testing.T) {
	tr := withRuns()
	got, err := Read(bytes.NewReader(plain(t, tr)))
	require.NoError(t, err)
	require.Equal(t, tr, got)
	var b bytes.Buffer
	require.NoError(t, Encode(&b, tr))
	got, err = Read(&b)
	require.NoError(t, err)
	tr.Compact()
	require.Len(t, tr.Events, 5)
	require.Equal(t, tr, got)
}

func TestJSON(t *testing.T) {
	b, err := json.Marshal(withBlobs())
	require.NoError(t, err)
	var got struct {
		Header struct {
			Space string
			Runs  int
		}
		Events []map[string]any
		End    map[string]any
	}
	require.NoError(t, json.Unmarshal(b, &got))
	require.Equal(t, "layer", got.Header.Space)
	require.Equal(t, map[string]any{
		"at_us": 1000.0, "wait_us": 20000.0, "layer": 0.0, "offset": 4096.0, "length": 8192.0, "origin": "fetch",
		"blob_offset": 7.0, "blob_length": 93.0,
	}, got.Events[0])
	require.NotContains(t, got.Events[3], "blob_offset")
	require.Equal(t, 65536.0, got.Events[1]["file_offset"])
	require.Equal(t, 31000.0, got.End["ready_us"])

	b, err = json.Marshal(withRuns())
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &got))
	require.Equal(t, 300, got.Header.Runs)
	require.Equal(t, []any{4194304.0, "0123456789ab", 300.0}, []any{got.Events[0]["pid"], got.Events[0]["container"], got.Events[0]["hits"]})
	require.NotContains(t, got.Events[3], "pid")
	require.NotContains(t, got.Events[3], "container")
	require.NotContains(t, got.Events[4], "hits")
}
