package compare

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What apt-get prints for a layer is what the layers below have, and more.
func TestNewDebs(t *testing.T) {
	have := map[string]bool{}
	base := "'http://host/pool/b/base_1_all.deb' base_1_all.deb 100 SHA256:aa\n"
	require.Equal(t, []string{"base_1_all.deb"}, newDebs(base, have))
	more := base + "'http://host/pool/l/lib_1%3a2_amd64.deb' lib_1%3a2_amd64.deb 5 \n" + "W: not a package\n\n"
	require.Equal(t, []string{"lib_1%3a2_amd64.deb"}, newDebs(more, have))
	require.Empty(t, newDebs(more, have))
}

func TestRecipes(t *testing.T) {
	layers := map[string]int{"python": 8, "java": 6, "node": 39}
	for _, r := range recipes {
		require.Len(t, r.layers, layers[r.name], r.name)
		require.Same(t, recipeNamed(r.name), recipeNamed(r.name))
		require.Equal(t, r.name, recipeNamed(r.name).name)
		for i, l := range r.layers {
			require.NotEmpty(t, l.comment(), "%s, layer %d", r.name, i)
		}
	}
	require.Nil(t, recipeNamed("nosuch"))
	require.Contains(t, nodeRecipe.tools(), "npm")
	require.NotContains(t, javaRecipe.tools(), "npm")
}

// The key changes with all that changes the image, and with nothing else.
func TestRecipeKey(t *testing.T) {
	base := recipe{name: "a", layers: []recipeLayer{{debs: []string{"x"}, run: "true"}, {files: map[string]string{"srv/app.py": "app.py"}}}}
	key := func(r recipe, debs ...[]string) string {
		k, err := r.key(debs)
		require.NoError(t, err)
		return k
	}
	want := key(base, []string{"x_1_all.deb"}, nil)
	require.Equal(t, want, key(base, []string{"x_1_all.deb"}, nil))
	seen := map[string]bool{want: true}
	other := func(what string, r recipe, debs ...[]string) {
		k := key(r, debs...)
		require.False(t, seen[k], what)
		seen[k] = true
	}
	other("version", base, []string{"x_2_all.deb"}, nil)
	r := base
	r.config = ocispec.ImageConfig{User: "nobody"}
	other("config", r, []string{"x_1_all.deb"}, nil)
	r = base
	r.layers = []recipeLayer{{debs: []string{"x"}, run: "false"}, base.layers[1]}
	other("script", r, []string{"x_1_all.deb"}, nil)
	r.layers = []recipeLayer{base.layers[0], {files: map[string]string{"srv/app.py": "app.js"}}}
	other("file", r, []string{"x_1_all.deb"}, nil)
	r.layers = []recipeLayer{base.layers[0], {files: map[string]string{"srv/app.py": "nosuch"}}}
	_, err := r.key([][]string{nil, nil})
	require.ErrorIs(t, err, os.ErrNotExist)
}

// A layer's folder becomes tar members: parents first, a file's other names as
// links to the first, and what the overlay has removed as the format has it.
func TestReadLayer(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "usr/a-b", "text")
	write(t, dir, "usr/a/b", "text")
	require.NoError(t, os.Link(filepath.Join(dir, "usr/a/b"), filepath.Join(dir, "usr/z")))
	require.NoError(t, os.Symlink("a/b", filepath.Join(dir, "usr/link")))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "usr/pipe"), 0o644))
	want := []string{"usr", "usr/a", "usr/a/b", "usr/a-b", "usr/link", "usr/z → usr/a/b"}
	if os.Geteuid() == 0 {
		require.NoError(t, unix.Mknod(filepath.Join(dir, "usr/gone"), unix.S_IFCHR, 0))
		require.NoError(t, os.Mkdir(filepath.Join(dir, "usr/opaque"), 0o755))
		want = []string{"usr", "usr/a", "usr/a/b", "usr/a-b", "usr/.wh.gone", "usr/link", "usr/opaque", "usr/z → usr/a/b"}
		if unix.Setxattr(filepath.Join(dir, "usr/opaque"), "trusted.overlay.opaque", []byte("y"), 0) == nil {
			want = append(want[:7:7], "usr/opaque/.wh..wh..opq", "usr/z → usr/a/b")
		}
	}
	entries, err := readLayer(dir)
	require.NoError(t, err)
	var got []string
	for _, e := range entries {
		name := e.path
		if e.hard != "" {
			name += " → " + e.hard
			require.Zero(t, e.size)
		}
		if strings.Contains(name, ".wh.") {
			require.True(t, e.mode.IsRegular())
			require.Zero(t, e.size)
		}
		got = append(got, name)
	}
	require.Equal(t, want, got)
}

// Below the lowest layer's links into usr, others leave nothing.
func TestDropRootLinks(t *testing.T) {
	dir := t.TempDir()
	for _, l := range demoRootLinks {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "usr", l), 0o755))
		require.NoError(t, os.Symlink("usr/"+l, filepath.Join(dir, l)))
	}
	write(t, dir, "bin/tool", "through the link")
	require.NoError(t, dropRootLinks(dir))
	var left []string
	entries, err := readLayer(dir)
	require.NoError(t, err)
	for _, e := range entries {
		left = append(left, e.path)
	}
	require.Equal(t, []string{"usr", "usr/bin", "usr/bin/tool"}, left)
}

func TestMissingTool(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	require.ErrorContains(t, javaRecipe.missing(), "image java: ")
}
