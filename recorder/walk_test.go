package recorder

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/tracefmt"
)

// tree makes files of all kinds.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	rnd := rand.NewChaCha8([32]byte{1})
	write := func(name string, n int) {
		p := make([]byte, n)
		_, _ = rnd.Read(p)
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, p, 0o644))
	}
	for name, n := range map[string]int{
		"empty": 0, "tiny": 60, "small": 3000, "block": 4096, "over": 4097, "tail": 70_001, "big": 5_000_000,
		"a/deep/er/file": 10_000, "a/deep/other": 20_000,
	} {
		write(name, n)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "text"), bytes.Repeat([]byte("well compressed "), 50_000), 0o644))
	require.NoError(t, os.Link(filepath.Join(dir, "tail"), filepath.Join(dir, "a/first")))
	require.NoError(t, os.Symlink("../big", filepath.Join(dir, "a/link")))
	require.NoError(t, os.Symlink("/", filepath.Join(dir, "a/root")))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	sparse, err := os.Create(filepath.Join(dir, "sparse"))
	require.NoError(t, err)
	defer sparse.Close()
	for i := range int64(20) {
		_, err = sparse.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 9000), i<<20)
		require.NoError(t, err)
	}
	return dir
}

// mountImage makes a file system of a tree, mounts it, and gives both.
func mountImage(t *testing.T, dir, fstype string, mkfs ...string) (image, mounted string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	image, mounted = filepath.Join(t.TempDir(), "image"), t.TempDir()
	run := func(name string, args ...string) {
		t.Helper()
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skipf("needs %s", name)
		}
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil && name == "mount" && strings.Contains(string(out), "unknown filesystem") {
			t.Skipf("needs the file system %s", fstype)
		}
		require.NoError(t, err, "%s %q: %s", name, args, out)
	}
	if strings.HasPrefix(fstype, "ext") {
		require.NoError(t, os.WriteFile(image, nil, 0o644))
		require.NoError(t, os.Truncate(image, 64<<20))
	}
	for i := range mkfs {
		mkfs[i] = strings.NewReplacer("IMAGE", image, "TREE", dir).Replace(mkfs[i])
	}
	run(mkfs[0], mkfs[1:]...)
	run("mount", "-t", fstype, "-o", "ro,loop", image, mounted)
	t.Cleanup(func() { run("umount", mounted) })
	return image, mounted
}

func TestMapFiles(t *testing.T) {
	for name, fs := range map[string]struct {
		fstype string
		mkfs   []string
		packed bool // what is mapped is not the content
	}{
		"ext4":        {fstype: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-d", "TREE", "IMAGE"}},
		"ext4 inline": {fstype: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-O", "inline_data", "-d", "TREE", "IMAGE"}},
		"ext2 blocks": {fstype: "ext4", mkfs: []string{"mkfs.ext4", "-q", "-O", "^extents,^64bit", "-b", "1024", "-d", "TREE", "IMAGE"}},
		"erofs":       {fstype: "erofs", mkfs: []string{"mkfs.erofs", "--quiet", "IMAGE", "TREE"}},
		"erofs lz4":   {fstype: "erofs", mkfs: []string{"mkfs.erofs", "--quiet", "-zlz4", "IMAGE", "TREE"}, packed: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tree(t)
			image, mounted := mountImage(t, dir, fs.fstype, fs.mkfs...)
			root, err := os.Open(mounted)
			require.NoError(t, err)
			disk, err := os.ReadFile(image)
			require.NoError(t, err)
			m := sized(int64(len(disk)))
			f, err := MapFiles(t.Context(), root, m)
			require.NoError(t, err)
			n, cause := f.Skipped()
			require.Zero(t, n, cause)
			several := mapParallel(t, mounted, m)
			require.Equal(t, f, several, "more threads find the same")
			require.NoError(t, root.Close())
			checkFiles(t, f, dir, disk, fs.packed, fs.fstype == "ext4")
		})
	}
}

// sized is a device of n bytes that is one layer.
func sized(size int64) DeviceMap {
	return func(off, n int64) []Extent {
		if off >= size {
			return nil
		}
		return identity(off, min(n, size-off))
	}
}

func mapParallel(t *testing.T, dir string, m DeviceMap) *Files {
	w := NewMapper()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			root, err := os.Open(dir)
			if err == nil {
				err = errors.Join(w.Work(t.Context(), root), root.Close())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f, err := w.Files(m)
	require.NoError(t, err)
	return f
}

// checkFiles compares what the files are said to be on the device with what they
// are.
func checkFiles(t *testing.T, f *Files, dir string, disk []byte, packed, holes bool) {
	t.Helper()
	regular := 0
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		if !d.Type().IsRegular() {
			return nil
		}
		regular++
		rel := strings.TrimPrefix(path, dir)
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		events, missing := f.Events([]tracefmt.Access{{Path: rel}})
		require.Empty(t, missing)
		if rel == "/tail" {
			rel = "/a/first" // the first of its names
		}
		got, sum := make([]byte, len(want)), int64(0)
		for _, e := range events {
			require.Equal(t, rel, e.Path)
			require.Less(t, e.FileOff, int64(len(want)), rel)
			copy(got[e.FileOff:], disk[e.Off:e.Off+e.Len])
			sum += e.Len
		}
		switch {
		case len(want) == 0:
			require.Empty(t, events)
		case packed:
			require.Positive(t, sum, rel)
			require.LessOrEqual(t, sum, int64(len(want))+8192, rel)
			if rel == "/text" {
				require.Less(t, sum, int64(len(want))/4, "compressed")
			}
		default:
			require.True(t, bytes.Equal(want, got), rel)
		}
		if rel == "/sparse" && holes {
			require.Less(t, sum, int64(20*5*4096), "without its holes")
		}
		return nil
	}))
	require.Equal(t, regular-1, f.Len(), "a hard link is no file of its own")
	real, _ := f.Events([]tracefmt.Access{{Path: "/a/root/a/link"}})
	require.NotEmpty(t, real)
	require.Equal(t, "/big", real[0].Path)

	// All of the device, by name.
	tr := &tracefmt.Trace{Events: []tracefmt.Event{{Len: int64(len(disk))}}}
	f.Annotate(tr)
	seen := map[string]bool{}
	for _, e := range tr.Events {
		seen[e.Path] = true
	}
	for _, name := range []string{"", "/big", "/a/first", "/a/deep/er/file"} {
		require.True(t, seen[name], name)
	}
	require.False(t, seen["/tail"])
}

// A path may be longer than any trace, or system call, takes.
func TestMapFilesDeep(t *testing.T) {
	dir := t.TempDir()
	root, err := os.Open(dir)
	require.NoError(t, err)
	defer root.Close()
	at := int(root.Fd())
	name := strings.Repeat("d", 250)
	for range 20 {
		require.NoError(t, unix.Mkdirat(at, name, 0o755))
		next, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(next)
		at = next
		file, err := unix.Openat(at, "file", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		require.NoError(t, err)
		_, err = unix.Write(file, make([]byte, 4096))
		require.NoError(t, errors.Join(err, unix.Fsync(file), unix.Close(file)))
	}
	f, err := MapFiles(t.Context(), root, identity)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	require.Equal(t, 16, f.Len())
	skipped, cause := f.Skipped()
	require.Equal(t, 1, skipped)
	require.ErrorIs(t, cause, unix.ENAMETOOLONG)
	tr := &tracefmt.Trace{Header: tracefmt.Header{Version: tracefmt.Version, Space: tracefmt.LayerSpace}}
	tr.Events, _ = f.Events([]tracefmt.Access{{Path: "/"}})
	require.NotEmpty(t, tr.Events)
	require.NoError(t, tr.Check())
}

// Other mounts, and file systems that tell nothing.
func TestMapFilesElsewhere(t *testing.T) {
	_, mounted := mountImage(t, tree(t), "ext4", "mkfs.ext4", "-q", "-d", "TREE", "IMAGE")
	require.NoError(t, unix.Mount("tmpfs", mounted+"/a/deep", "tmpfs", 0, ""))
	defer func() { require.NoError(t, unix.Unmount(mounted+"/a/deep", 0)) }()
	require.NoError(t, os.WriteFile(mounted+"/a/deep/foreign", make([]byte, 10_000), 0o644))
	root, err := os.Open(mounted)
	require.NoError(t, err)
	defer root.Close()
	f, err := MapFiles(t.Context(), root, identity)
	require.NoError(t, err)
	_, missing := f.Events([]tracefmt.Access{{Path: "/a/deep/foreign"}, {Path: "/big"}})
	require.Equal(t, []string{"/a/deep/foreign"}, missing)

	ended, cancel := context.WithCancelCause(t.Context())
	cancel(os.ErrDeadlineExceeded)
	_, err = MapFiles(ended, root, identity)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	other, err := os.Open(mounted + "/a/deep")
	require.NoError(t, err)
	defer other.Close()
	_, err = MapFiles(t.Context(), other, identity)
	require.ErrorIs(t, err, errors.ErrUnsupported, "tmpfs has no FIEMAP")
}
