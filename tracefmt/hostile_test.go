package tracefmt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
)

// A hostileFile is one that somebody made to hurt, or by mistake.
type hostileFile struct {
	name string
	file func(t testing.TB) []byte
	err  string // of the reader; empty if the file is one that reads
	mib  int    // memory that the process may take; 0 is 64
}

// packed compresses a file that consists of parts, each repeated.
func packed(t testing.TB, parts ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxWindow))
	require.NoError(t, err)
	for i := 0; i < len(parts); i += 2 {
		for range parts[i].(int) {
			_, err := z.Write(parts[i+1].([]byte))
			require.NoError(t, err)
		}
	}
	require.NoError(t, z.Close())
	return b.Bytes()
}

func fileHead(t testing.TB) []byte { return plain(t, &Trace{}) }

// eventsFrame has so many equal events, of length 1 at 0 1 2 …
func eventsFrame(t testing.TB, n int) []byte {
	o := newObject(2)
	o.number(keyCount, int64(n))
	bin(o, keyLen, bytes.Repeat([]byte{1}, n))
	f, err := o.frame(frameEvents)
	require.NoError(t, err)
	return f
}

// namesFrame has n new names of a length.
func namesFrame(t testing.TB, n, length int) []byte {
	o := newObject(1)
	list := make([]string, n)
	for i := range list {
		list[i] = strings.Repeat("n", length)
	}
	o.texts(keyStrings, list)
	f, err := o.frame(frameEvents)
	require.NoError(t, err)
	return f
}

// endWith is a file whose end has one unknown key with such a value.
func endWith(t testing.TB, value []byte) []byte {
	return append(fileHead(t), frame(frameEnd, append([]byte{0x81, 0xa1, 'x'}, value...))...)
}

// headWith is a file whose header is a map of a version and one more pair.
func headWith(pair []byte) []byte {
	return append([]byte(fileMagic), frame(frameHeader, append([]byte("\x82\xa7version\x01"), pair...))...)
}

// column is a file of one event frame of n events, with their lengths and one
// more column.
func columns(t testing.TB, n int64, lens []byte, name string, values []byte) []byte {
	return file(t, Header{Layers: []Layer{{Decoded: 1 << 20}}}, frameEvents, func(o *object) {
		o.number(keyCount, n)
		bin(o, keyLen, lens)
		bin(o, name, values)
	}, 3)
}

var hugeVarint = []byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}

// referenceFile is a reference trace of one record.
func referenceFile(size uint64, op byte, layer uint32, n, off uint64) []byte {
	b := make([]byte, refHeader+refRecord)
	rec := b[refHeader:]
	rec[0] = op
	binary.LittleEndian.PutUint32(rec[4:], layer)
	binary.LittleEndian.PutUint64(rec[8:], n)
	binary.LittleEndian.PutUint64(rec[16:], off)
	binary.LittleEndian.PutUint32(b, refMagic)
	binary.LittleEndian.PutUint64(b[8:], size)
	binary.LittleEndian.PutUint32(b[16:], refSum(0, rec))
	return b
}

// tarHeader is a tar of one member without content, as GNU tar writes a sparse
// file, a link and a header of names.
func tarHeader(name string, typ byte, size, realSize, link string) []byte {
	h := make([]byte, 1536)
	copy(h, name)
	copy(h[100:], "0000444\x000000000\x000000000\x00"+size+"\x0000000000000\x00        ")
	h[156] = typ
	copy(h[157:], link)
	copy(h[257:], "ustar  \x00")
	if realSize != "" {
		copy(h[386:], realSize+"\x0000000000000\x00")
		copy(h[483:], realSize)
	}
	sum := 0
	for _, c := range h[:512] {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

var hostileTraces = []hostileFile{
	{name: "length of a frame", file: func(t testing.TB) []byte {
		return append(fileHead(t), "E\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00"...)
	}, err: "at most 8388608"},
	{name: "length of a string", file: func(testing.TB) []byte { return headWith([]byte("\xa5image\xdb\xff\xff\xff\xff")) }, err: "at most 4096"},
	{name: "length of a column", file: func(t testing.TB) []byte {
		return append(fileHead(t), frame(frameEvents, []byte("\x81\xa3len\xc6\x00\x7f\xff\xff"))...)
	}, err: "are left"},
	{name: "length of something unknown", file: func(t testing.TB) []byte { return endWith(t, []byte("\xc6\xff\xff\xff\xff")) }, err: "EOF"},
	{name: "length of an extension", file: func(t testing.TB) []byte { return endWith(t, []byte("\xc9\xff\xff\xff\xff\x05")) }, err: "EOF"},
	{name: "count of layers", file: func(testing.TB) []byte { return headWith([]byte("\xa6layers\xdd\xff\xff\xff\xff")) }, err: "at most 255"},
	{name: "count of arguments", file: func(testing.TB) []byte { return headWith([]byte("\xa4args\xdd\x7f\xff\xff\xff")) }, err: "at most 4096"},
	{name: "count of keys", file: func(testing.TB) []byte {
		return append([]byte(fileMagic), frame(frameHeader, []byte("\xdf\xff\xff\xff\xff"))...)
	}, err: "keys in"},
	{name: "count of unknown elements", file: func(t testing.TB) []byte { return endWith(t, []byte("\xdd\xff\xff\xff\xff")) }, err: "elements in"},
	{name: "count of events", file: func(t testing.TB) []byte { return columns(t, 1<<40, []byte{1}, keyAt, []byte{0}) }, err: "not within"},
	{name: "count without events", file: func(t testing.TB) []byte { return columns(t, maxFrameEvents, []byte{1}, keyAt, []byte{0}) }, err: "does not fit"},
	{name: "count of runs", file: func(testing.TB) []byte { return headWith([]byte("\xa4runs\xce\x40\x00\x00\x00")) }, err: "merge of 1073741824 recordings"},
	{name: "hits beyond the runs", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyHits, []byte{9}) }, err: "seen in 9 recordings of 1"},
	{name: "name that is not there", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyContainer, []byte{1}) }, err: "at most 0"},
	{name: "layer that is not there", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyLayer, []byte{1}) }, err: "layer 1: there are 1"},
	{name: "offset beyond the layer", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyOff, []byte{0x80, 0x80, 0x80, 1}) }, err: "has 1048576 bytes"},
	{name: "offset below zero", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyOff, []byte{1}) }, err: "step of -1"},
	{name: "offset that overflows", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyOff, hugeVarint) }, err: "len: 1: at most 0"},
	{name: "time that overflows", file: func(t testing.TB) []byte { return columns(t, 1, []byte{1}, keyAt, hugeVarint) }, err: "not within"},
	{name: "version of the future", file: func(testing.TB) []byte {
		return append([]byte(fileMagic), frame(frameHeader, []byte("\x81\xa7version\x02"))...)
	}, err: "trace format version 2: this program reads version 1"},
	{name: "no version", file: func(testing.TB) []byte { return append([]byte(fileMagic), frame(frameHeader, []byte{0x80})...) }, err: "version 0"},
	{name: "nested without end", file: func(t testing.TB) []byte { return endWith(t, bytes.Repeat([]byte{0x91}, maxFrame-16)) }, err: "elements in"},
	{name: "nested maps", file: func(t testing.TB) []byte { return endWith(t, bytes.Repeat([]byte{0x81, 0xa0}, maxFrame/2-16)) }, err: "elements in"},
	{name: "same bytes again and again", file: func(t testing.TB) []byte {
		return columns(t, 1<<15, bytes.Repeat([]byte{1}, 1<<15), keyOff, append([]byte{0}, bytes.Repeat([]byte{1}, 1<<15-1)...))
	}},

	{name: "bomb of unknown frames", file: func(t testing.TB) []byte {
		return packed(t, 1, fileHead(t), maxFile/maxFrame+1, frame('?', make([]byte, maxFrame)))
	}, err: "longer than 268435456 bytes", mib: 96},
	{name: "bomb of small frames", file: func(t testing.TB) []byte {
		return packed(t, 1, fileHead(t), maxFrames/1024, bytes.Repeat(frame('?', nil), 1024))
	}, err: "more than 2097152 frames"},
	{name: "bomb of names", file: func(t testing.TB) []byte { return packed(t, 1, fileHead(t), 9, namesFrame(t, 1900, 4000)) }, err: "bytes of names", mib: 128},
	{name: "bomb of short names", file: func(t testing.TB) []byte { return packed(t, 1, fileHead(t), 9, namesFrame(t, 1<<15, 1)) }, err: "at most 0", mib: 96},
	{name: "bomb of events", file: func(t testing.TB) []byte {
		return packed(t, 1, fileHead(t), MaxEvents/maxFrameEvents+1, eventsFrame(t, maxFrameEvents))
	}, err: "more than 1048576 events", mib: 640},
	{name: "as many events as may be", file: func(t testing.TB) []byte {
		return packed(t, 1, fileHead(t), MaxEvents/maxFrameEvents, eventsFrame(t, maxFrameEvents))
	}, mib: 640},
	{name: "bomb of arguments", file: func(t testing.TB) []byte {
		pair := bytes.NewBufferString("\xa4args\xdc\x0f\xff")
		for range 4095 {
			pair.WriteString("\xda\x07\xd0" + strings.Repeat("a", 2000))
		}
		return packed(t, 1, headWith(pair.Bytes()))
	}, err: "arguments of 8190000 bytes: at most 4194304", mib: 96},
	{name: "window of gigabytes", file: func(testing.TB) []byte { return []byte(zstdMagic + "\x00\xa8" + "\x03\x00\x02x") }, err: "window size exceeded"},
	{name: "zstd's own length", file: func(testing.TB) []byte {
		return []byte(zstdMagic + "\xe0\xff\xff\xff\xff\xff\xff\xff\x7f" + "\x03\x00\x02x")
	}, err: "decompressed size exceeds"},

	{name: "reference: length", file: func(testing.TB) []byte { return referenceFile(24<<40, 'R', 0, 1, 0) }, err: "up to"},
	{name: "reference: missing records", file: func(testing.TB) []byte { return referenceFile(24*MaxEvents, 'R', 0, 1, 0) }, err: "record 1 of 1048576"},
	{name: "reference: operation", file: func(testing.TB) []byte { return referenceFile(24, 'X', 0, 1, 0) }, err: "operation 0x58"},
	{name: "reference: layer", file: func(testing.TB) []byte { return referenceFile(24, 'R', 1<<31, 1, 0) }, err: "layer 2147483648"},
	{name: "reference: count", file: func(testing.TB) []byte { return referenceFile(24, 'R', 0, 1<<63, 0) }, err: "length 9223372036854775808"},
	{name: "reference: offset", file: func(testing.TB) []byte { return referenceFile(24, 'R', 0, 1, 1<<63) }, err: "not a range"},
	{name: "reference: overflow", file: func(testing.TB) []byte { return referenceFile(24, 'R', 0, 1<<62, 1<<62) }, err: "overflow"},
}

var hostileLayers = []hostileFile{
	{name: "gzip bomb", file: gzipBombOf, err: "more than 67108864 bytes"},
	{name: "link to itself", file: func(testing.TB) []byte { return tarHeader("trace", '2', "00000000000", "", "trace") }, err: "no member"},
	{name: "hard link to itself", file: func(testing.TB) []byte { return tarHeader("trace", '1', "00000000000", "", "trace") }, err: "no member"},
	{name: "sparse member of 8 GiB", file: func(testing.TB) []byte { return tarHeader("trace", 'S', "00000000000", "77777777777", "") }, err: "no member"},
	{name: "sparse member of 8 GiB, pax", file: paxSparse, err: "line 1 is longer"},
	{name: "name of 8 GiB", file: func(testing.TB) []byte {
		return append(tarHeader("trace", 'L', "77777777777", "", ""), make([]byte, 2<<20)...)
	}, err: "too long"},
	{name: "attributes of 8 GiB", file: func(testing.TB) []byte {
		return append(tarHeader("trace", 'x', "77777777777", "", ""), make([]byte, 2<<20)...)
	}, err: "too long"},
	{name: "member of 8 GiB", file: func(testing.TB) []byte {
		return append(tarHeader("trace", '0', "77777777777", "", "")[:512], "/a\n"...)
	}, err: "unexpected EOF"},
	{name: "bomb in a member", file: func(t testing.TB) []byte {
		return tarOf(t, "trace", string(packed(t, 1, fileHead(t), maxFile/maxFrame+1, frame('?', make([]byte, maxFrame)))))
	}, err: "longer than 268435456 bytes", mib: 96},
	{name: "comments without end", file: func(t testing.TB) []byte {
		return gzipped(t, tarOf(t, "trace", strings.Repeat("#\n", maxAccessFile)))
	}, err: "more than 67108864 bytes"},
	{name: "many paths", file: func(t testing.TB) []byte { return tarOf(t, "trace", strings.Repeat("/a\n", maxAccesses+1)) }, err: "more than 262144 accesses", mib: 128},
}

// paxSparse is a member of 8 GiB of which the tar has nothing.
func paxSparse(testing.TB) []byte {
	attributes := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=trace", "GNU.sparse.realsize=8589934592"} {
		attributes += fmt.Sprintf("%d %s\n", len(kv)+4, kv)
	}
	x := tarHeader("pax", 'x', fmt.Sprintf("%011o", len(attributes)), "", "")[:1024]
	copy(x[512:], attributes)
	member := tarHeader("GNUSparseFile.0/trace", '0', "00000001000", "", "")[:1024]
	copy(member[512:], "1\n8589934592\n0\n")
	return append(append(x, member...), make([]byte, 1024)...)
}

func gzipBombOf(t testing.TB) []byte { return gzipBomb(t) }

// hostileEnv asks a copy of the test to read a file.
const hostileEnv = "REPRISE_HOSTILE"

// TestHostileMemory reads each file in a process of its own, and looks at how
// much memory that took at most.
func TestHostileMemory(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector multiplies memory")
	}
	for kind, files := range map[string][]hostileFile{"trace": hostileTraces, "layer": hostileLayers} {
		for _, f := range files {
			t.Run(kind+"/"+f.name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), kind)
				content := f.file(t)
				require.NoError(t, os.WriteFile(path, content, 0o666))
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), hostileEnv+"="+path)
				out, err := cmd.CombinedOutput()
				require.NoError(t, err, "%s", out)
				said, rest, _ := strings.Cut(string(out), "\n")
				if f.err == "" {
					require.Equal(t, "read", said)
				} else {
					require.Contains(t, said, f.err)
				}
				var kib, mib = 0, f.mib
				_, err = fmt.Sscan(rest, &kib)
				require.NoError(t, err, "%s", out)
				if mib == 0 {
					mib = 64
				}
				t.Logf("%d bytes, at most %d MiB: %s", len(content), kib>>10, said)
				require.Less(t, kib, mib<<10)
			})
		}
	}
}

// hostileChild reads a file, and says what came of it and how many KiB it took.
func hostileChild(path string) {
	said := "read"
	if err := readHostile(path); err != nil {
		said = strings.ReplaceAll(err.Error(), "\n", " ")
	}
	kib, err := peak()
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s\n%d\n", said, kib)
}

func readHostile(path string) error {
	if filepath.Base(path) == "trace" {
		_, err := Open(path)
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, _, err = ReadAcceleration(f)
	return err
}

// peak is the most memory that the process has had, in KiB.
func peak() (int, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, found := strings.Cut(string(b), "VmHWM:")
	if !found {
		return 0, fmt.Errorf("/proc/self/status has no VmHWM")
	}
	kib := 0
	_, err = fmt.Sscan(rest, &kib)
	return kib, err
}
