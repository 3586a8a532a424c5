package tracefmt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// vector returns the path of a file of the shared test vectors.
func vector(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		require.NotEqual(t, "/", dir, "go.mod not found")
		dir = filepath.Dir(dir)
	}
	path := filepath.Join(dir, "..", "shared", "vectors", name)
	if _, err := os.Stat(path); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("test vector: %v", err)
		}
		t.Skipf("test vector: %v", err)
	}
	return path
}

// upstream parses the text that upstream's own decoder printed.
func upstream(t *testing.T) []Event {
	b, err := os.ReadFile(vector(t, "trace/recorded.txt"))
	require.NoError(t, err)
	var list []Event
	for line := range strings.Lines(string(b)) {
		var e Event
		if _, err := fmt.Sscanf(line, "R %d %d %d", &e.Layer, &e.Len, &e.Off); err == nil {
			list = append(list, e)
		}
	}
	require.Len(t, list, 16)
	return list
}

func TestReferenceVector(t *testing.T) {
	tr, err := Open(vector(t, "trace/recorded.trace"))
	require.NoError(t, err)
	require.Equal(t, upstream(t), tr.Events)

	var b bytes.Buffer
	require.NoError(t, WriteReference(&b, tr))
	again, err := ReadReference(&b)
	require.NoError(t, err)
	require.Equal(t, tr, again)
}

// TestReferenceExport writes the vector anew: but for what its padding has, it
// is the file that overlaybd wrote.
func TestReferenceExport(t *testing.T) {
	want, err := os.ReadFile(vector(t, "trace/recorded.trace"))
	require.NoError(t, err)
	clear(want[4:8])
	clear(want[20:24])
	for rec := want[refHeader:]; len(rec) > 0; rec = rec[refRecord:] {
		clear(rec[1:4])
	}
	binary.LittleEndian.PutUint32(want[16:], refSum(0, want[refHeader:]))

	tr, err := Open(vector(t, "trace/recorded.trace"))
	require.NoError(t, err)
	tr.Layers = []Layer{layerNamed("0", 2633728), layerNamed("1", 2109440), layerNamed("2", 1323008)}
	var native, b bytes.Buffer
	require.NoError(t, writeAll(&native, tr)) // and by way of a native file
	tr, err = Read(&native)
	require.NoError(t, err)
	require.NoError(t, WriteReference(&b, tr))
	require.Equal(t, want, b.Bytes())
}

// TestReferenceLong writes events that overlaybd's buffer does not hold.
func TestReferenceLong(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, WriteReference(&b, &Trace{Events: []Event{{Layer: 1, Off: 5, Len: 1 << 20}, {Layer: 2, Off: 7, Len: 5<<19 + 1}}}))
	tr, err := ReadReference(&b)
	require.NoError(t, err)
	require.Equal(t, []Event{
		{Layer: 1, Off: 5, Len: 1 << 20},
		{Layer: 2, Off: 7, Len: 1 << 20}, {Layer: 2, Off: 7 + 1<<20, Len: 1 << 20}, {Layer: 2, Off: 7 + 2<<20, Len: 1<<19 + 1},
	}, tr.Events)
	require.ErrorContains(t, WriteReference(&b, &Trace{Events: []Event{{Len: 1 << 62}}}), "more than 1048576 records")
}

func TestReferenceHostile(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, WriteReference(&b, sample()))
	good := b.Bytes()
	for cut := range good {
		_, err := ReadReference(bytes.NewReader(good[:cut]))
		require.Error(t, err)
	}
	for name, c := range map[string]struct {
		change func(b []byte)
		err    string
	}{
		"magic":     {func(b []byte) { b[0]++ }, "magic"},
		"size":      {func(b []byte) { b[8]++ }, "multiple"},
		"huge":      {func(b []byte) { b[15] = 0x18 }, "up to"},
		"checksum":  {func(b []byte) { b[16]++ }, "checksum"},
		"padding":   {func(b []byte) { b[refHeader+1]++ }, "checksum"},
		"operation": {func(b []byte) { b[refHeader] = 'X' }, "operation"},
		"layer":     {func(b []byte) { b[refHeader+4] = 255 }, "layer 255"},
		"count":     {func(b []byte) { b[refHeader+15] = 0x80 }, "length"},
		"offset":    {func(b []byte) { b[refHeader+23] = 0x80 }, "not a range"},
		"overflow":  {func(b []byte) { b[refHeader+23], b[refHeader+15] = 0x7f, 0x7f }, "overflow"},
	} {
		bad := bytes.Clone(good)
		c.change(bad)
		_, err := ReadReference(bytes.NewReader(bad))
		require.ErrorContains(t, err, c.err, name)
	}
	_, err := ReadReference(bytes.NewReader(append(bytes.Clone(good), 0)))
	require.ErrorContains(t, err, "bytes follow")
}

func TestReferenceGarbagePadding(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, WriteReference(&b, sample()))
	file := b.Bytes()
	for _, i := range []int{4, 5, 6, 7, 20, 21, 22, 23, refHeader + 1, refHeader + 2, refHeader + 3} {
		file[i] = 0xa5
	}
	binary.LittleEndian.PutUint32(file[16:], refSum(0, file[refHeader:]))
	tr, err := ReadReference(bytes.NewReader(file))
	require.NoError(t, err)
	require.Len(t, tr.Events, len(sample().Events))
}

func TestReferenceSum(t *testing.T) {
	require.EqualValues(t, 0x58E3FA20, refSum(0, []byte("123456789")))
	require.EqualValues(t, 0x58E3FA20, refSum(refSum(0, []byte("1234")), []byte("56789")))
}

func TestReferenceLayers(t *testing.T) {
	tr, err := Open(vector(t, "trace/recorded.trace"))
	require.NoError(t, err)
	tr.Layers = []Layer{{Decoded: 2633728}, {Decoded: 2109440}, {Decoded: 1323008}}
	require.NoError(t, tr.Check())
	tr.Layers = tr.Layers[:2]
	require.ErrorContains(t, tr.Check(), "layer 2")
}

func TestReferenceOfDevice(t *testing.T) {
	tr := &Trace{Header: Header{Space: DeviceSpace}, Events: []Event{{Len: 1}}}
	require.ErrorContains(t, WriteReference(&bytes.Buffer{}, tr), "of a device")
}
