package tracefmt

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestReadAccesses(t *testing.T) {
	paths := func(list ...string) (all []Access) {
		for _, p := range list {
			all = append(all, Access{Path: p})
		}
		return all
	}
	for name, c := range map[string]struct {
		file, format string
		want         []Access
	}{
		"paths":         {"/usr/bin/python3\n/usr/lib/x86_64-linux-gnu/libc.so.6\n", AccessPaths, paths("/usr/bin/python3", "/usr/lib/x86_64-linux-gnu/libc.so.6")},
		"paths, untidy": {"\ufeff# what a start needs\r\n\r\n//usr/./bin/../bin/[\r\n   \n/usr/lib/python3*/\n# end\n/etc/a file", AccessPaths, paths("/usr/bin/[", "/usr/lib/python3*", "/etc/a file")},
		"path, no line": {"/a", AccessPaths, paths("/a")},
		"beyond root":   {"/../../etc/passwd\n", AccessPaths, paths("/etc/passwd")},
		"estargz": {
			`{"path":"usr/bin/bash","manifestDigest":"sha256:7cc4b5aefd1d0cadf8d97d4350462ba51c694ebca145b08d7d41b41acc8db5aa","layerIndex":0}
{"path":"lib/x86_64-linux-gnu/libtinfo.so.6","manifestDigest":"sha256:7cc4b5aefd1d0cadf8d97d4350462ba51c694ebca145b08d7d41b41acc8db5aa","layerIndex":2}
{"path":"../dir/\u00fc\"n"}
`, AccessEStargz, paths("/usr/bin/bash", "/lib/x86_64-linux-gnu/libtinfo.so.6", "/dir/ü\"n"),
		},
		"nydus": {
			"path,size,elapsed\n/usr/bin/bash,1234376,102\n\"/etc/a \"\"b\"\",c\",0,2500000\n", AccessNydus,
			[]Access{{Path: "/usr/bin/bash", At: 102 * time.Microsecond}, {Path: `/etc/a "b",c`, At: 2500 * time.Millisecond}},
		},
		"nydus, readable": {
			"path,size,elapsed\n/bin/sh,1.2 MiB,7 us\n/a,12 B,1.250 ms\n/b,3.0 KiB,3.001 s\n", AccessNydus,
			[]Access{{Path: "/bin/sh", At: 7 * time.Microsecond}, {Path: "/a", At: 1250 * time.Microsecond}, {Path: "/b", At: 3001 * time.Millisecond}},
		},
		"nydus, no reads":        {"path,size,elapsed\n", AccessNydus, nil},
		"nydus, a later version": {"elapsed,pid,path\n7,1,/a\n", AccessNydus, []Access{{Path: "/a", At: 7 * time.Microsecond}}},
	} {
		got, format, err := ReadAccesses(iotest.OneByteReader(strings.NewReader(c.file)))
		require.NoError(t, err, name)
		require.Equal(t, c.format, format, name)
		require.Equal(t, c.want, got, name)
	}
}

// repeated reads one line, with its number in it, again and again.
func repeated(format string, n int) io.Reader {
	lines := make([]io.Reader, n)
	for i := range lines {
		lines[i] = strings.NewReader(fmt.Sprintf(format, i))
	}
	return io.MultiReader(lines...)
}

func TestReadAccessesHostile(t *testing.T) {
	long := strings.Repeat("x", maxAccessLine)
	deep := `{"path":` + strings.Repeat("[", maxAccessLine/2)
	for name, c := range map[string]struct {
		file io.Reader
		err  string
	}{
		"empty":                  {strings.NewReader(""), "it lists nothing"},
		"comments":               {strings.NewReader("# nothing\n\n"), "it lists nothing"},
		"relative":               {strings.NewReader("usr/bin\n"), "line 1: \"usr/bin\": neither"},
		"binary":                 {strings.NewReader("\x7fELF\x00\x01"), "neither an absolute path"},
		"relative later":         {strings.NewReader("/a\n\nb\n"), `line 3: "b" is not an absolute path`},
		"zero byte":              {strings.NewReader("/a\n/b\x00c\n"), "line 2: path \"/b\\x00c\" has a zero byte"},
		"long line":              {strings.NewReader("/a\n/" + long), "line 2 is longer than 65536 bytes"},
		"long path":              {strings.NewReader("/" + long[:maxString]), "line 1: path of 4097 bytes"},
		"many":                   {repeated("/%d\n", maxAccesses+1), "more than 262144 accesses"},
		"many bytes":             {repeated("/%d"+long[:4000]+"\n", maxTable/4000), "bytes of paths"},
		"comments without end":   {repeated("#%d"+long[:60_000]+"\n", maxAccessFile/60_000+1), "more than 67108864 bytes"},
		"estargz, no path":       {strings.NewReader("{\"path\":\"a\"}\n{}\n"), "line 2: no path"},
		"estargz, number":        {strings.NewReader("{\"path\":5}\n"), "line 1: json"},
		"estargz, two lines":     {strings.NewReader("{\n\"path\":\"a\"}\n"), "line 1: unexpected end of JSON"},
		"estargz, other":         {strings.NewReader("{\"path\":\"a\"}\n/b\n"), "line 2: invalid character"},
		"estargz, deep":          {strings.NewReader(deep), "exceeded max depth"},
		"estargz, zero byte":     {strings.NewReader(`{"path":"\u0000"}`), "zero byte"},
		"nydus, columns":         {strings.NewReader("path,size\n"), "line 1: \"path,size\": neither"},
		"nydus, short row":       {strings.NewReader("path,size,elapsed\n/a,5\n"), "line 2:"},
		"nydus, quote":           {strings.NewReader("path,size,elapsed\n\"/a,5,6\n"), "line 2:"},
		"nydus, unit":            {strings.NewReader("path,size,elapsed\n/a,5,6 h\n"), `line 2: elapsed "6 h": unknown unit`},
		"nydus, negative":        {strings.NewReader("path,size,elapsed\n/a,5,-1\n"), "out of range"},
		"nydus, not a number":    {strings.NewReader("path,size,elapsed\n/a,5,NaN\n"), "out of range"},
		"nydus, infinite":        {strings.NewReader("path,size,elapsed\n/a,5,1e30\n"), "out of range"},
		"nydus, no path":         {strings.NewReader("path,size,elapsed\n,5,6\n"), "no path"},
		"an error of the reader": {io.MultiReader(strings.NewReader("/a\n"), iotest.ErrReader(errFull)), errFull.Error()},
	} {
		list, format, err := ReadAccesses(c.file)
		require.ErrorContains(t, err, c.err, name)
		require.Empty(t, list, name)
		require.Empty(t, format, name)
	}
	_, _, err := ReadAccesses(iotest.ErrReader(errFull))
	require.True(t, errors.Is(err, errFull))
}
