package recorder

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

// identity is a device that is one layer.
func identity(off, n int64) []Extent { return []Extent{{Off: off, LayerOff: off, Len: n}} }

// striped is a device of blocks of 4 KiB.
func striped(off, n int64) []Extent { return stripes(4096, off, n) }

// stripes is a device whose odd blocks are in layer 1, and those that 7 divides
// in no layer.
func stripes(block, off, n int64) (out []Extent) {
	for at := off; at < off+n; {
		end := min((at/block+1)*block, off+n)
		if b := at / block; b%7 != 0 {
			out = append(out, Extent{Layer: int(b % 2), LayerOff: 1 << 20 * (b % 2), Off: at, Len: end - at})
			out[len(out)-1].LayerOff += at
		}
		at = end
	}
	return out
}

// owner is what a byte of a layer is in the model.
type owner struct {
	path string
	at   int64
}

// TestAnnotateModel compares Annotate with a map that has an entry for each
// byte.
func TestAnnotateModel(t *testing.T) {
	small := func(off, n int64) []Extent { return stripes(256, off, n) }
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		var inodes []*inode
		model := map[[2]int64]owner{}
		for i := range 40 {
			in := &inode{paths: []string{fmt.Sprintf("/file-%02d", i), fmt.Sprintf("/alias-%02d", i)}}
			at := int64(0)
			for range rnd.IntN(5) {
				n := 1 + rnd.Int64N(600)
				at += rnd.Int64N(3) * 256
				in.extents = append(in.extents, diskExtent{at: at, off: rnd.Int64N(12_000), n: n})
				at += n
			}
			for _, e := range in.extents {
				for _, x := range small(e.off, e.n) {
					for b := range x.Len {
						key := [2]int64{int64(x.Layer), x.LayerOff + b}
						if _, ok := model[key]; !ok {
							model[key] = owner{fmt.Sprintf("/alias-%02d", i), e.at + x.Off - e.off + b}
						}
					}
				}
			}
			inodes = append(inodes, in)
		}
		rnd.Shuffle(len(inodes), func(i, j int) { inodes[i], inodes[j] = inodes[j], inodes[i] })
		f := build(inodes, nil, small)
		require.Equal(t, 40, f.Len())

		tr := &tracefmt.Trace{Header: tracefmt.Header{Version: 1, Space: tracefmt.LayerSpace}, End: &tracefmt.End{}}
		for i := range 100 {
			tr.Events = append(tr.Events, tracefmt.Event{
				At: time.Duration(i), Layer: rnd.IntN(3), Off: rnd.Int64N(1 << 20), Len: 1 + rnd.Int64N(1500),
				BlobOff: 5, BlobLen: 6, Pid: i,
			})
			if i%2 == 0 {
				tr.Events[i].Off = rnd.Int64N(12_000) + int64(tr.Events[i].Layer)<<20
			}
		}
		before := slices.Clone(tr.Events)
		f.Annotate(tr)
		require.NoError(t, tr.Check())
		requireSameBytes(t, before, tr.Events)
		require.Equal(t, len(tr.Events), tr.End.Events)
		for _, e := range tr.Events {
			for b := range e.Len {
				want := model[[2]int64{int64(e.Layer), e.Off + b}]
				got := owner{e.Path, e.FileOff}
				if e.Path != "" {
					got.at += b
				}
				if want != got {
					t.Fatalf("seed %d: byte %d of %+v is %+v", seed, b, e, want)
				}
			}
		}
		again := slices.Clone(tr.Events)
		f.Annotate(tr)
		require.Equal(t, again, tr.Events, "annotating twice is annotating once")
	}
}

// requireSameBytes makes sure that after is before in parts.
func requireSameBytes(t *testing.T, before, after []tracefmt.Event) {
	t.Helper()
	i := 0
	for _, e := range before {
		for at := e.Off; at < e.Off+e.Len; i++ {
			p := after[i]
			require.Equal(t, at, p.Off)
			at += p.Len
			p.Off, p.Len, p.Path, p.FileOff = e.Off, e.Len, e.Path, e.FileOff
			require.Equal(t, e, p)
		}
	}
	require.Len(t, after, i)
}

// A trace that is as large as it may be is not split any more.
func TestAnnotateBounds(t *testing.T) {
	f := build([]*inode{{paths: []string{"/a"}, extents: []diskExtent{{off: 4096, n: 4096}}}}, nil, identity)
	tr := &tracefmt.Trace{Events: make([]tracefmt.Event, tracefmt.MaxEvents-1)}
	for i := range tr.Events {
		tr.Events[i] = tracefmt.Event{Off: 0, Len: 8192}
	}
	f.Annotate(tr)
	require.Len(t, tr.Events, tracefmt.MaxEvents)
	require.Equal(t, "/a", tr.Events[1].Path)
	require.Empty(t, tr.Events[2].Path)
	require.EqualValues(t, 8192, tr.Events[2].Len)

	var inodes []*inode
	tr = &tracefmt.Trace{}
	long := strings.Repeat("x", 4000)
	for i := range int64(3000) {
		inodes = append(inodes, &inode{paths: []string{fmt.Sprintf("/%04d%s", i, long)}, extents: []diskExtent{{off: i * 4096, n: 4096}}})
		tr.Events = append(tr.Events, tracefmt.Event{Off: i * 4096, Len: 4096})
	}
	build(inodes, nil, identity).Annotate(tr)
	names := 0
	for _, e := range tr.Events {
		names += len(e.Path)
	}
	require.Positive(t, names)
	require.LessOrEqual(t, names, maxNameBytes)

	device := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.DeviceSpace}, Events: []tracefmt.Event{{Off: 4096, Len: 1}}}
	f.Annotate(device)
	require.Empty(t, device.Events[0].Path)
}

func TestEvents(t *testing.T) {
	f := build([]*inode{
		{paths: []string{"/"}},
		{paths: []string{"/usr/lib/"}, extents: []diskExtent{{off: 0, n: 4096}}},
		{paths: []string{"/usr/lib/b.so", "/usr/lib/a.so"}, extents: []diskExtent{{off: 4096, n: 8192}, {at: 16384, off: 20480, n: 4096}}},
		{paths: []string{"/usr/lib/sub/c.so"}, extents: []diskExtent{{off: 32768, n: 4096}}},
		{paths: []string{"/usr/lib-x"}, extents: []diskExtent{{off: 40960, n: 4096}}},
		{paths: []string{"/usr/empty"}},
		{paths: []string{"/odd[name"}, extents: []diskExtent{{off: 49152, n: 100}}},
	}, map[string]string{"/lib": "usr/lib", "/usr/x": "../lib/sub", "/loop": "/loop/a", "/up": "../../../odd[name"}, identity)
	a1 := tracefmt.Event{Off: 4096, Len: 8192, Path: "/usr/lib/a.so"}
	a2 := tracefmt.Event{Off: 20480, Len: 4096, Path: "/usr/lib/a.so", FileOff: 16384}
	c := tracefmt.Event{Off: 32768, Len: 4096, Path: "/usr/lib/sub/c.so"}
	x := tracefmt.Event{Off: 40960, Len: 4096, Path: "/usr/lib-x"}
	odd := tracefmt.Event{Off: 49152, Len: 100, Path: "/odd[name"}
	for name, tt := range map[string]struct {
		a       tracefmt.Access
		want    []tracefmt.Event
		missing bool
	}{
		"file":              {a: tracefmt.Access{Path: "/usr/lib/a.so"}, want: []tracefmt.Event{a1, a2}},
		"hard link":         {a: tracefmt.Access{Path: "usr/lib/b.so"}, want: []tracefmt.Event{a1, a2}},
		"through a link":    {a: tracefmt.Access{Path: "/lib/./b.so"}, want: []tracefmt.Event{a1, a2}},
		"through two links": {a: tracefmt.Access{Path: "/usr/x/c.so"}, want: []tracefmt.Event{c}},
		"link to the top":   {a: tracefmt.Access{Path: "/up"}, want: []tracefmt.Event{odd}},
		"loop":              {a: tracefmt.Access{Path: "/loop/b"}, missing: true},
		"directory":         {a: tracefmt.Access{Path: "/usr/lib/"}, want: []tracefmt.Event{a1, a2, c}},
		"root":              {a: tracefmt.Access{Path: "/"}, want: []tracefmt.Event{odd, x, a1, a2, c}},
		"glob":              {a: tracefmt.Access{Path: "/usr/lib/*.so"}, want: []tracefmt.Event{a1, a2}},
		"glob of a dir":     {a: tracefmt.Access{Path: "/usr/l*b/s??"}, want: []tracefmt.Event{c}},
		"glob of any depth": {a: tracefmt.Access{Path: "/**/*.so"}, want: []tracefmt.Event{a1, a2, c}},
		"any depth is none": {a: tracefmt.Access{Path: "/usr/**/lib-x"}, want: []tracefmt.Event{x}},
		"no glob":           {a: tracefmt.Access{Path: "/odd[name"}, want: []tracefmt.Event{odd}},
		"bad glob":          {a: tracefmt.Access{Path: "/usr/[x"}, missing: true},
		"empty file":        {a: tracefmt.Access{Path: "/usr/empty"}},
		"missing":           {a: tracefmt.Access{Path: "/usr/lib/no.so"}, missing: true},
		"beyond":            {a: tracefmt.Access{Path: "/usr/lib-x", Off: 4096, Len: 4096}},
		"part": {a: tracefmt.Access{Path: "/usr/lib/a.so", Off: 8191, Len: 8194, At: 7}, want: []tracefmt.Event{
			{At: 7, Off: 12287, Len: 1, Path: "/usr/lib/a.so", FileOff: 8191}, {At: 7, Off: 20480, Len: 1, Path: "/usr/lib/a.so", FileOff: 16384},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			got, missing := f.Events([]tracefmt.Access{tt.a})
			require.Equal(t, tt.want, got)
			require.Equal(t, tt.missing, len(missing) == 1)
		})
	}
}

// What is compressed ends where something else begins.
func TestEncoded(t *testing.T) {
	f := build([]*inode{
		{paths: []string{"/a"}, extents: []diskExtent{{off: 4096, n: 65536, encoded: true}, {at: 65536, off: 12288, n: 65536, encoded: true}}},
		{paths: []string{"/b"}, extents: []diskExtent{{off: 20480, n: 4096}}},
	}, nil, identity)
	tr := &tracefmt.Trace{Events: []tracefmt.Event{{Off: 0, Len: 32768}}}
	f.Annotate(tr)
	require.Equal(t, []tracefmt.Event{
		{Off: 0, Len: 4096},
		{Off: 4096, Len: 8192, Path: "/a"},
		{Off: 12288, Len: 8192, Path: "/a", FileOff: 65536},
		{Off: 20480, Len: 4096, Path: "/b"},
		{Off: 24576, Len: 8192},
	}, tr.Events)
}

func TestAttribute(t *testing.T) {
	reads := []tracefmt.Event{
		{At: 30, Off: 0, Len: 65536, Process: "late", Pid: 9},
		{At: 10, Off: 4096, Len: 4096, Process: "sh", Pid: 1, Container: "c"}, // layer 1
		{At: 20, Off: 8192, Len: 2048, Process: "cat", Pid: 2, Container: "c"},
		{At: 20, Off: 10240, Len: 1024, Process: "cat", Pid: 3},
		{At: 5, Off: 0, Len: 4096, Process: "of a hole"},
	}
	tr := &tracefmt.Trace{Events: []tracefmt.Event{
		{Layer: 1, Off: 1<<20 + 4096, Len: 4096},
		{Layer: 0, Off: 8192, Len: 4096},
		{Layer: 0, Off: 11264, Len: 4096}, // 1024 bytes of late, and then what is in layer 1
		{Layer: 0, Off: 1 << 19, Len: 4096, Process: "kept"},
		{Layer: 5, Off: 0, Len: 1},
	}}
	s := Attribute(tr, reads, striped)
	who := func(i int) string {
		return fmt.Sprint(tr.Events[i].Process, tr.Events[i].Pid, tr.Events[i].Container)
	}
	require.Equal(t, []string{"sh1c", "cat2c", "late9", "kept0", "0"}, []string{who(0), who(1), who(2), who(3), who(4)})
	require.Equal(t, AttributeStats{Events: 5, Attributed: 3, Bytes: 4*4096 + 1, Known: 3 * 4096}, s)
	require.Equal(t, AttributeStats{}, Attribute(&tracefmt.Trace{}, nil, striped))
}

func TestFromDevice(t *testing.T) {
	layers := []tracefmt.Layer{{Digest: digest.FromString("a"), Decoded: 10_000}, {Digest: digest.FromString("b")}}
	tr := &tracefmt.Trace{
		Header: tracefmt.Header{Version: tracefmt.Version, Space: tracefmt.DeviceSpace, Workload: "w"},
		Events: []tracefmt.Event{{At: 1, Off: 4000, Len: 8192, Process: "p"}, {At: 2, Off: 0, Len: 4096}},
		End:    &tracefmt.End{Reason: "stop", Events: 2},
	}
	got, err := FromDevice(tr, striped, layers)
	require.NoError(t, err)
	require.Equal(t, []tracefmt.Event{
		{At: 1, Layer: 1, Off: 1<<20 + 4096, Len: 4096, Process: "p"},
		{At: 1, Layer: 0, Off: 8192, Len: 10_000 - 8192, Process: "p"},
	}, got.Events)
	require.Equal(t, tracefmt.LayerSpace, got.Space)
	require.Equal(t, layers, got.Layers)
	require.Equal(t, tracefmt.End{Reason: "stop", Events: 2, Bytes: 4096 + 10_000 - 8192}, *got.End)
	require.Equal(t, tracefmt.DeviceSpace, tr.Space)
	_, err = FromDevice(got, striped, layers)
	require.ErrorContains(t, err, "not a trace of a device")
}

// FuzzDirents parses what getdents64 never returns.
func FuzzDirents(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x18\x00\x08name\x00"))
	f.Add(make([]byte, 40))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, e := range appendEntries(nil, b) {
			require.NotEmpty(t, e.name)
			require.NotContains(t, e.name, "\x00")
		}
	})
}
