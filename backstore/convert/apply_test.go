package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var day = time.Unix(1700000000, 123456789)

func file(name, content string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: day}, content}
}

func dir(name string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: day}, ""}
}

func link(name, target string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o600, ModTime: day}, ""}
}

func symlink(name, target string) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777, ModTime: day}, ""}
}

func (e tarEntry) with(f func(*tar.Header)) tarEntry { f(&e.Header); return e }

func (e tarEntry) xattr(key, value string) tarEntry {
	return e.with(func(h *tar.Header) {
		h.PAXRecords = map[string]string{paxXattr + key: value}
	})
}

// applyAll applies layers to an empty directory, as the owner of the process.
func applyAll(t *testing.T, layers ...[]tarEntry) (string, applied) {
	t.Helper()
	root := t.TempDir()
	var last applied
	for i, entries := range layers {
		for i := range entries {
			entries[i].Uid, entries[i].Gid = os.Getuid(), os.Getgid()
		}
		var err error
		last, err = applyTo(t, root, makeTar(t, entries...))
		require.NoError(t, err, "layer %d", i)
	}
	return root, last
}

func applyTo(t *testing.T, root string, tarball []byte) (applied, error) {
	t.Helper()
	fd, err := unix.Open(root, openDir, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	return applyTar(t.Context(), fd, bytes.NewReader(tarball))
}

// brief lists names: "a/" a directory, "a=content" a file, "a->b" a link.
func brief(t *testing.T, root string) string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		name := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		switch {
		case err != nil || name == "":
			return err
		case d.IsDir():
			list = append(list, name+"/")
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			list = append(list, name+"->"+target)
			return err
		case d.Type().IsRegular():
			p, err := os.ReadFile(path)
			list = append(list, name+"="+string(p))
			return err
		default:
			list = append(list, name+"?")
		}
		return nil
	})
	require.NoError(t, err)
	return strings.Join(list, " ")
}

func TestApplyNames(t *testing.T) {
	type layers = [][]tarEntry
	for _, c := range []struct {
		name   string
		layers layers
		want   string
	}{
		{"whiteouts", layers{
			{file("a", "1"), dir("d"), dir("d/e"), file("d/e/f", "2"), file("k", "3")},
			{file(".wh.a", ""), file(".wh.d", ""), file(".wh.never", ""), file("x/.wh.never", "")},
		}, "k=3 x/"},
		{"a whiteout hides only lower layers", layers{
			{file("a", "1"), dir("d"), file("d/low", "2")},
			{file("a", "new"), file(".wh.a", ""), dir("d"), file("d/mine", "3"), file(".wh.d", "")},
		}, "a=new d/ d/mine=3"},
		{"a whiteout before what replaces it", layers{
			{dir("d"), file("d/low", "2")},
			{file(".wh.d", ""), dir("d"), file("d/mine", "3")},
		}, "d/ d/mine=3"},
		{"opaque first", layers{
			{dir("d"), file("d/low", "1"), dir("d/s"), file("d/s/low", "2")},
			{dir("d"), file("d/.wh..wh..opq", ""), dir("d/s"), file("d/s/mine", "3")},
		}, "d/ d/s/ d/s/mine=3"},
		{"opaque last", layers{
			{dir("d"), file("d/low", "1"), dir("d/s"), file("d/s/low", "2"), dir("d/gone")},
			{dir("d"), dir("d/s"), file("d/s/mine", "3"), file("d/.wh..wh..opq", "")},
		}, "d/ d/s/ d/s/mine=3"},
		{"opaque with parents that have no entry", layers{
			{dir("d"), dir("d/s"), file("d/s/low", "2")},
			{file("d/s/mine", "3"), file("d/n/m/mine", "4"), file("d/.wh..wh..opq", "")},
		}, "d/ d/n/ d/n/m/ d/n/m/mine=4 d/s/ d/s/mine=3"},
		{"opaque root", layers{
			{file("a", "1"), dir("d"), file("d/low", "2")},
			{file("b", "3"), file(".wh..wh..opq", "")},
		}, "b=3"},
		{"other marks of aufs", layers{
			{file(".wh..wh.aufs", "x"), dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", "y"), file("a", "1")},
		}, "a=1"},
		{"a type replaces another", layers{
			{file("f", "1"), dir("d"), file("d/x", "2"), dir("e"), file("e/y", "3"), symlink("l", "d"), symlink("m", "nowhere")},
			{dir("f"), file("f/in", "4"), file("d", "5"), symlink("e", "f"), dir("l"), file("m", "6")},
		}, "d=5 e->f f/ f/in=4 l/ m=6"},
		{"a file replaced leaves its other names", layers{
			{file("a", "1"), link("b", "a")},
			{file("a", "2")},
		}, "a=2 b=1"},
		{"hard links", layers{
			{file("low", "1"), symlink("sym", "low"), dir("d"), file("old", "2")},
			{link("d/a", "low"), link("d/b", "/sym"), link("old", "low"), link("low", "d/a")},
		}, "d/ d/a=1 d/b->low low=1 old=1 sym->low"},
		{"through symbolic links", layers{
			{dir("real"), symlink("rel", "real"), symlink("abs", "/real"), symlink("dang", "made/here"), symlink("up", "../../../real")},
			{file("rel/a", "1"), file("abs/b", "2"), file("dang/c", "3"), file("up/d", "4"), file("rel/.wh.none", "")},
		}, "abs->/real dang->made/here made/ made/here/ made/here/c=3 real/ real/a=1 real/b=2 real/d=4 rel->real up->../../../real"},
		{"names", layers{
			{file("./a", "1"), file("/b", "2"), file("../../c", "3"), file("d/../e", "4"), dir("./f/"), file("\xff\xfe", "5"), file(" ", "6")},
		}, " =6 a=1 b=2 c=3 e=4 f/ \xff\xfe=5"},
		{"nothing", layers{{}}, ""},
		{"twice", layers{{file("a", "1"), file("a", "2"), dir("d"), file("d/x", "3"), dir("d")}}, "a=2 d/ d/x=3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, _ := applyAll(t, c.layers...)
			require.Equal(t, c.want, brief(t, root))
		})
	}
}

func TestApplyStaysInside(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	require.NoError(t, os.WriteFile(secret, []byte("keep"), 0o600))
	for name, entries := range map[string][]tarEntry{
		"symlink":       {symlink("out", outside), file("out/new", "x"), file("out/.wh.secret", ""), file("out/.wh..wh..opq", "")},
		"dots":          {file("../../../../../../"+outside+"/new", "x")},
		"absolute":      {file(outside+"/new", "x")},
		"file symlink":  {symlink("s", secret), file("s", "overwritten")},
		"dots in links": {symlink("s", "../../../../../../../.."+outside), file("s/secret", "overwritten")},
		"chained":       {dir("a"), symlink("a/b", "/"), symlink("a/b/c", outside), file("a/b/c/secret", "overwritten")},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for i := range entries {
				entries[i].Uid, entries[i].Gid = os.Getuid(), os.Getgid()
			}
			_, _ = applyTo(t, root, makeTar(t, entries...))
			require.Equal(t, "secret=keep", brief(t, outside))
		})
	}
	t.Run("hard link", func(t *testing.T) {
		_, err := applyTo(t, t.TempDir(), makeTar(t, link("l", "../../../../../.."+secret)))
		require.ErrorIs(t, err, os.ErrNotExist)
	})
	t.Run("mkdir through a link cycle", func(t *testing.T) {
		_, err := applyTo(t, t.TempDir(), makeTar(t,
			symlink("a", "b/x").with(mine), symlink("b", "a/x").with(mine), file("a/f", "").with(mine)))
		require.Error(t, err)
	})
}

func mine(h *tar.Header) { h.Uid, h.Gid = os.Getuid(), os.Getgid() }

func TestApplyTimes(t *testing.T) {
	early := time.Unix(-86400, 999999999)
	root, _ := applyAll(t,
		[]tarEntry{
			dir("d"), file("d/a", "1"), dir("quiet"), file("quiet/gone", ""), file("implied/x", ""),
			file("early", "").with(func(h *tar.Header) { h.ModTime = early }),
			symlink("s", "nowhere"), dir("opq"), dir("opq/sub"), file("opq/sub/x", ""),
			dir("./").with(func(h *tar.Header) { h.ModTime = day.Add(time.Hour); h.Mode = 0o711 }),
		},
		[]tarEntry{
			file("d/b", "").with(func(h *tar.Header) { h.ModTime = day.Add(time.Minute) }),
			file("quiet/.wh.gone", ""), file("opq/.wh..wh..opq", ""), file("opq/sub/y", ""),
			link("implied/l", "d/a").with(func(h *tar.Header) { h.ModTime = day.Add(time.Second) }),
		})
	for name, want := range map[string]time.Time{
		".": day.Add(time.Hour), "d": day, "d/a": day.Add(time.Second), "d/b": day.Add(time.Minute), "quiet": day,
		"implied": time.Unix(0, 0), "early": early, "s": day, "opq": day, "opq/sub": time.Unix(0, 0),
	} {
		fi, err := os.Lstat(filepath.Join(root, name))
		require.NoError(t, err)
		require.Equal(t, want.UTC(), fi.ModTime().UTC(), name)
	}
	fi, err := os.Stat(root)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o711), fi.Mode().Perm())
	require.Equal(t, "d/ d/a=1 d/b= early= implied/ implied/l=1 implied/x= opq/ opq/sub/ opq/sub/y= quiet/ s->nowhere", brief(t, root))
}

func TestApplyAttributes(t *testing.T) {
	root, got := applyAll(t,
		[]tarEntry{
			dir("d").xattr("user.old", "1"), dir("e").xattr("user.kept", "2"),
			file("f", "x").xattr("user.a", "b\x00c"), file("f2", "x").xattr("trusted.overlay.opaque", "y"),
			symlink("s", "f").xattr("user.no", "z"),
			file("suid", "x").with(func(h *tar.Header) { h.Mode = 0o6755 }),
			dir("sticky").with(func(h *tar.Header) { h.Mode = 0o1777 }),
		},
		[]tarEntry{
			dir("d").xattr("user.new", "3"), file("e/x", ""), file("f", "y"),
		})
	xattrs := func(name string) string {
		s, err := treeXattrs(filepath.Join(root, name))
		require.NoError(t, err)
		return s
	}
	require.Equal(t, "user.new=33", xattrs("d"))
	require.Equal(t, "user.kept=32", xattrs("e"))
	require.Equal(t, "-", xattrs("f"))
	require.Equal(t, "-", xattrs("f2"))
	require.Equal(t, "-", xattrs("s"))
	require.Empty(t, got.Warnings)
	mode := func(name string) uint32 {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(root, name), &st))
		return st.Mode & 0o7777
	}
	require.Equal(t, uint32(0o6755), mode("suid"))
	require.Equal(t, uint32(0o1777), mode("sticky"))

	_, got = applyAll(t, []tarEntry{file("f", "").xattr("trusted.x", "y"), symlink("s", "f").xattr("user.no", "z")})
	require.Len(t, got.Warnings, 2)
}

func TestApplyOwnersAndDevices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root for owners and device nodes")
	}
	root := t.TempDir()
	owned := func(h *tar.Header) { h.Uid, h.Gid, h.Mode = 4000000000, 100000, 0o4751 }
	node := func(name string, typ byte, major, minor int64) tarEntry {
		return tarEntry{tar.Header{Name: name, Typeflag: typ, Mode: 0o662, Devmajor: major, Devminor: minor, ModTime: day}, ""}
	}
	_, err := applyTo(t, root, makeTar(t,
		file("f", "x").with(owned).xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
		symlink("s", "f").with(owned), dir("d").with(owned),
		node("c", tar.TypeChar, 1, 3), node("b", tar.TypeBlock, 259, 70000), node("p", tar.TypeFifo, 0, 0)))
	require.NoError(t, err)
	want := []string{
		"/b\tb\t0662\t0\t0\t-\t1700000000.123456789\t1\t259:70000\t-",
		"/c\tc\t0662\t0\t0\t-\t1700000000.123456789\t1\t1:3\t-",
		"/d\td\t4751\t4000000000\t100000\t-\t1700000000.123456789\t2\t-\t-",
		"/f\tf\t4751\t4000000000\t100000\t1\t1700000000.123456789\t1\t2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881\tsecurity.capability=0100000200040000000000000000000000000000",
		"/p\tp\t0662\t0\t0\t-\t1700000000.123456789\t1\t-\t-",
		"/s\tl\t0777\t4000000000\t100000\t1\t1700000000.123456789\t1\tf\t-",
	}
	equalTrees(t, listTree(t, root, true)[1:], want)

	for _, e := range []tarEntry{node("x", tar.TypeChar, 1<<12, 0), node("x", tar.TypeBlock, 0, 1<<20)} {
		_, err := applyTo(t, root, makeTar(t, e))
		require.ErrorContains(t, err, "device number")
	}
}

func TestApplySparse(t *testing.T) {
	// A GNU sparse file as tar -S writes it: version 1.0, map in the data.
	const size = 1 << 20
	data := "1\n524288\n4096\n"
	data += strings.Repeat("\x00", 512-len(data)) + strings.Repeat("z", 4096)
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	require.NoError(t, tw.WriteHeader(&tar.Header{Name: "plain", Typeflag: tar.TypeReg, Uid: os.Getuid(), Gid: os.Getgid()}))
	require.NoError(t, tw.Flush())
	pax := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sp", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(kv) + 4
		if n >= 100 {
			n++
		}
		pax += fmt.Sprintf("%d %s\n", n, kv)
	}
	b.Write(rawEntry("PaxHeaders/sp", 'x', pax))
	b.Write(rawEntry("GNUSparseFile/sp", '0', data))
	b.Write(make([]byte, 1024))

	root := t.TempDir()
	_, err := applyTo(t, root, b.Bytes())
	require.NoError(t, err)
	p, err := os.ReadFile(filepath.Join(root, "sp"))
	require.NoError(t, err)
	want := make([]byte, size)
	copy(want[524288:], strings.Repeat("z", 4096))
	require.True(t, bytes.Equal(want, p))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Join(root, "sp"), &st))
	require.Less(t, st.Blocks*512, int64(size/4))
}

// rawEntry is a tar header, written by hand, and data.
func rawEntry(name string, typ byte, data string) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x00")
	copy(h[108:], fmt.Sprintf("%07o\x00%07o\x00", os.Getuid(), os.Getgid()))
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00", len(data), 0))
	h[156] = typ
	copy(h[257:], "ustar\x0000")
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(h, data+strings.Repeat("\x00", (512-len(data)%512)%512)...)
}

func TestApplyErrors(t *testing.T) {
	good := makeTar(t, file("a", strings.Repeat("x", 3000)).with(mine))
	for _, c := range []struct {
		name    string
		tarball []byte
		want    string
	}{
		{"cut in a file", good[:2000], `apply "a": read tar: unexpected EOF`},
		{"cut in a header", good[:100], "read tar: unexpected EOF"},
		{"garbage", bytes.Repeat([]byte("rubbish "), 200), "read tar: archive/tar: invalid tar header"},
		{"unknown type", append(rawEntry("odd", 'Q', ""), make([]byte, 1024)...), `apply "odd": tar entry of type 'Q': unsupported operation`},
		{"whiteout of the parent", makeTar(t, file("d/.wh...", "")), `apply "d/.wh...": invalid whiteout of ".."`},
		{"below a file", makeTar(t, file("a", "").with(mine), file("a/b", "").with(mine)), `apply "a/b": directory /a: not a directory`},
		{"a root that is a file", makeTar(t, symlink("/", "x")), "the root is not a directory"},
		{"hard link to nothing", makeTar(t, link("l", "gone")), `apply "l": hard link to "gone": no such file`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := applyTo(t, t.TempDir(), c.tarball)
			require.ErrorContains(t, err, c.want)
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := applyTar(ctx, -1, bytes.NewReader(good))
	require.ErrorIs(t, err, context.Canceled)
}

// Random layers give what containerd's own applier gives, where the two mean
// the same: parents have entries, whiteouts come first, directories have no
// attributes to lose.
func TestApplyLikeContainerd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root for owners")
	}
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		ours, theirs := t.TempDir(), t.TempDir()
		for range 3 {
			tarball := makeTar(t, randomLayer(rnd)...)
			_, err := applyTo(t, ours, tarball)
			_, err2 := archive.Apply(t.Context(), theirs, bytes.NewReader(tarball))
			require.Equal(t, err2 == nil, err == nil, "seed %d: containerd: %v; here: %v", seed, err2, err)
			if err != nil {
				break
			}
			got, want := listTree(t, ours, true), listTree(t, theirs, true)
			equalTrees(t, withoutDirTimes(got), withoutDirTimes(want))
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
	}
}

// withoutDirTimes leaves out the times of directories, which containerd's
// applier changes where a layer has no entry for them.
func withoutDirTimes(lines []string) []string {
	out := slices.Clone(lines)
	for i, l := range out {
		if f := strings.Split(l, "\t"); f[1] == "d" {
			f[6] = ""
			out[i] = strings.Join(f, "\t")
		}
	}
	slices.Sort(out)
	return out
}

func randomLayer(rnd *rand.Rand) []tarEntry {
	names := []string{"a", "b", "c", "d/", "d/e/", "d/e/f", "d/g", "h/", "h/i", "h/j/", "h/j/k"}
	var entries []tarEntry
	for _, n := range names {
		if rnd.IntN(5) == 0 {
			d, b := filepath.Split(strings.TrimSuffix(n, "/"))
			entries = append(entries, file(d+".wh."+b, ""))
		}
	}
	entries = append(entries, dir("d"), dir("d/e"), dir("h"), dir("h/j"))
	for _, n := range names {
		if strings.HasSuffix(n, "/") {
			continue
		}
		attrs := func(h *tar.Header) {
			h.Uid, h.Gid, h.Mode = rnd.IntN(70000), rnd.IntN(70000), int64(rnd.IntN(0o10000))
			h.ModTime = day.Add(time.Duration(rnd.Int64N(1e15)))
		}
		switch rnd.IntN(5) {
		case 0:
			entries = append(entries, file(n, strings.Repeat("x", rnd.IntN(10000))).with(attrs).xattr("user.x", "y"))
		case 1:
			entries = append(entries, symlink(n, "../a").with(attrs))
		case 2:
			entries = append(entries, file(n, "src").with(attrs), link(n+"-link", n).with(attrs))
		}
	}
	return entries
}

func FuzzApply(f *testing.F) {
	f.Add(makeTar(f, file("a", "1"), dir("d"), link("d/l", "a"), symlink("s", "/d"), file("s/x", "2"), file(".wh.a", "")))
	f.Add(makeTar(f, dir("d"), file("d/.wh..wh..opq", ""), file("d/x", "").xattr("user.a", "b")))
	f.Fuzz(func(t *testing.T, tarball []byte) {
		if len(tarball) > 1<<16 {
			return
		}
		parent := t.TempDir()
		root := filepath.Join(parent, "root")
		require.NoError(t, os.Mkdir(root, 0o755))
		_, _ = applyTo(t, root, tarball)
		list, err := os.ReadDir(parent)
		require.NoError(t, err)
		require.Len(t, list, 1, "something was written beside the root")
	})
}

func TestUnpacker(t *testing.T) {
	tarball := makeTar(t, file("a", strings.Repeat("text ", 300000)))
	for name, layer := range map[string]testLayer{
		"plain": plainLayer(tarball), "gzip": gzipLayer(t, tarball), "zstd": zstdLayer(t, tarball),
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnpacker(bytes.NewReader(layer.blob))
			defer u.Close()
			_, err := io.CopyN(io.Discard, u, 1000)
			require.NoError(t, err)
			d, err := u.finish()
			require.NoError(t, err)
			require.Equal(t, layer.diffID, d)
		})
		t.Run(name+" cut", func(t *testing.T) {
			u := newUnpacker(bytes.NewReader(layer.blob[:len(layer.blob)/2]))
			defer u.Close()
			_, err := applyTar(t.Context(), tempRoot(t), u)
			require.Error(t, err)
			require.True(t, errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(err.Error(), "unexpected EOF"), "%v", err)
		})
	}
	for name, c := range map[string]struct{ head, want string }{
		"xz":    {"\xfd7zXZ\x00", "xz layer: unsupported operation"},
		"bzip2": {"BZh91AY", "bzip2 layer: unsupported operation"},
		"gzip":  {"\x1f\x8b\x08\x00rubbish......", "gzip: "},
		"zstd":  {"\x28\xb5\x2f\xfdrubbish......", "zstd: "},
	} {
		t.Run("bad "+name, func(t *testing.T) {
			u := newUnpacker(strings.NewReader(c.head))
			defer u.Close()
			_, err := u.finish()
			require.ErrorContains(t, err, c.want)
		})
	}
}

func tempRoot(t *testing.T) int {
	t.Helper()
	fd, err := unix.Open(t.TempDir(), openDir, 0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
