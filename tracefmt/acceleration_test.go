package tracefmt

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// tarOf makes a tar of names and contents in turn.
func tarOf(t testing.TB, members ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(members); i += 2 {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: members[i], Mode: 0o444, Size: int64(len(members[i+1]))}))
		_, err := io.WriteString(w, members[i+1])
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err := w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return z.Bytes()
}

func TestWriteAcceleration(t *testing.T) {
	tr, err := Open(vector(t, "trace/recorded.trace"))
	require.NoError(t, err)
	var b, again bytes.Buffer
	require.NoError(t, WriteAcceleration(&b, tr))
	require.NoError(t, WriteAcceleration(&again, tr))
	require.Equal(t, b.Bytes(), again.Bytes())

	r := tar.NewReader(bytes.NewReader(b.Bytes()))
	h, err := r.Next()
	require.NoError(t, err)
	require.Equal(t, "trace", h.Name)
	require.EqualValues(t, 0o444, h.Mode)
	require.EqualValues(t, tar.TypeReg, h.Typeflag)
	require.Zero(t, h.ModTime.Unix())
	member, err := ReadReference(r)
	require.NoError(t, err)
	require.Equal(t, upstream(t), member.Events)
	_, err = r.Next()
	require.ErrorIs(t, err, io.EOF)

	for name, layer := range map[string][]byte{"plain": b.Bytes(), "gzip": gzipped(t, b.Bytes())} {
		got, list, err := ReadAcceleration(bytes.NewReader(layer))
		require.NoError(t, err, name)
		require.Nil(t, list, name)
		require.Equal(t, tr, got, name)
	}
	require.ErrorContains(t, WriteAcceleration(io.Discard, &Trace{Header: Header{Space: DeviceSpace}}), "of a device")
	require.ErrorIs(t, WriteAcceleration(&failing{left: 700}, tr), errFull)
}

func TestReadAcceleration(t *testing.T) {
	ref, err := os.ReadFile(vector(t, "trace/recorded.trace"))
	require.NoError(t, err)
	var packed bytes.Buffer
	require.NoError(t, Encode(&packed, sample()))
	for name, c := range map[string]struct {
		layer    []byte
		events   int
		accesses []Access
	}{
		"other members":     {tarOf(t, "etc/trace", "x", "./trace", string(ref), "trace", "y"), 16, nil},
		"native":            {tarOf(t, "trace", string(plain(t, sample()))), 5, nil},
		"native, packed":    {tarOf(t, "/trace", packed.String()), 4, nil},
		"paths":             {tarOf(t, "trace", "/bin/sh\n/lib/*\n"), 0, []Access{{Path: "/bin/sh"}, {Path: "/lib/*"}}},
		"paths, compressed": {gzipped(t, tarOf(t, "trace", "/bin/sh")), 0, []Access{{Path: "/bin/sh"}}},
		"short list":        {tarOf(t, "trace", "/a"), 0, []Access{{Path: "/a"}}},
	} {
		tr, list, err := ReadAcceleration(bytes.NewReader(c.layer))
		require.NoError(t, err, name)
		require.Equal(t, c.accesses, list, name)
		if c.events == 0 {
			require.Nil(t, tr, name)
			continue
		}
		require.Len(t, tr.Events, c.events, name)
	}
}

func TestReadAccelerationHostile(t *testing.T) {
	var many []string
	for range maxMembers {
		many = append(many, "no", "")
	}
	whole := gzipped(t, tarOf(t, "trace", "/a"))
	for name, c := range map[string]struct {
		layer io.Reader
		err   string
	}{
		"empty":       {bytes.NewReader(nil), `no member "trace"`},
		"no tar":      {bytes.NewReader(bytes.Repeat([]byte("junk"), 500)), "invalid tar header"},
		"no gzip":     {bytes.NewReader([]byte("\x1f\x8bjunk that is long enough")), "gzip"},
		"no member":   {bytes.NewReader(tarOf(t, "tracing", "/a")), `no member "trace"`},
		"members":     {bytes.NewReader(tarOf(t, append(many, "trace", "/a")...)), "more than 1024 members"},
		"directory":   {bytes.NewReader(tarOf(t, "trace/", "")), `no member "trace"`},
		"empty trace": {bytes.NewReader(tarOf(t, "trace", "")), "it lists nothing"},
		"junk":        {bytes.NewReader(tarOf(t, "trace", "junk")), `member "trace": read accesses: line 1`},
		"bad trace":   {bytes.NewReader(tarOf(t, "trace", "\x20\x18\xef\xc2junk")), "reference trace header"},
		"cut":         {bytes.NewReader(whole[:len(whole)/2]), "unexpected EOF"},
		"bomb":        {bytes.NewReader(gzipBomb(t)), "more than 67108864 bytes"},
	} {
		tr, list, err := ReadAcceleration(c.layer)
		require.ErrorContains(t, err, c.err, name)
		require.Nil(t, tr, name)
		require.Nil(t, list, name)
	}
}

// gzipBomb is a small layer whose first member is very long.
func gzipBomb(t testing.TB) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	tw := tar.NewWriter(w)
	const size = maxAcceleration + 1<<20
	require.NoError(t, tw.WriteHeader(&tar.Header{Name: "long", Mode: 0o444, Size: size}))
	zeros := make([]byte, 1<<20)
	for range size / len(zeros) {
		_, err := tw.Write(zeros)
		require.NoError(t, err)
	}
	require.NoError(t, tw.WriteHeader(&tar.Header{Name: "trace", Mode: 0o444, Size: 2}))
	_, err := tw.Write([]byte("/a"))
	require.NoError(t, err)
	require.NoError(t, tw.Close())
	require.NoError(t, w.Close())
	return z.Bytes()
}
