package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestNewest(t *testing.T) {
	require.Equal(t, "linux-image-6.12.107+deb12-cloud-amd64-unsigned", newest(
		"linux-image-6.12.43+deb12-cloud-amd64-unsigned - Linux 6.12 for x86-64 cloud\n"+
			"linux-image-6.12.107+deb12-cloud-amd64-unsigned - Linux 6.12 for x86-64 cloud\n"+
			"linux-image-6.12.9-cloud-amd64-unsigned - Linux 6.12 for x86-64 cloud\n"))
	require.Empty(t, newest(""))
}

func TestFindKernel(t *testing.T) {
	root := t.TempDir()
	_, err := findKernel(root)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, os.MkdirAll(filepath.Join(root, "boot"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "boot", "vmlinuz-6.12.1"), nil, 0o644))
	_, err = findKernel(root)
	require.ErrorIs(t, err, os.ErrNotExist)
	modules := filepath.Join(root, "usr", "lib", "modules", "6.12.1")
	require.NoError(t, os.MkdirAll(modules, 0o755))
	k, err := findKernel(root)
	require.NoError(t, err)
	require.Equal(t, kernel{"6.12.1", filepath.Join(root, "boot", "vmlinuz-6.12.1"), modules}, *k)
}

func TestParseNeeds(t *testing.T) {
	require.Equal(t, []string{"scsi_mod", "target_core_mod"}, parseNeeds("depends", "scsi-mod,target_core_mod"))
	require.Equal(t, []string{"a_b", "c"}, parseNeeds("softdep", "pre: a-b c post: d pre:"))
	require.Empty(t, parseNeeds("softdep", "post: d"))
}

func TestModuleNeeds(t *testing.T) {
	_, err := moduleNeeds([]byte("not ELF"))
	require.Error(t, err)
	self, err := os.ReadFile(os.Args[0])
	require.NoError(t, err)
	_, err = moduleNeeds(self)
	require.ErrorContains(t, err, ".modinfo")
}

func TestFlags(t *testing.T) {
	args := testArgs(&options{run: "A|B", timeout: 10 * time.Minute, testFlags: []string{"-count=2", "--short", "-mine", "x"}})
	require.Equal(t, []string{"-test.v", "-test.timeout=9m0s", "-test.run=A|B", "-test.count=2", "-test.short", "-mine", "x"}, args)
}

func TestCopyOutput(t *testing.T) {
	for serial, want := range map[string]struct {
		text   string
		failed int
		found  bool
	}{
		"a\r\nb\r\n" + resultMark + "2\r\nlater": {"a\nb\n", 2, true},
		"a\r\n" + resultMark + "x\r\n":           {"a\n" + resultMark + "x\n", 0, false},
		"a":                                      {"a", 0, false},
	} {
		var out bytes.Buffer
		failed, found := copyOutput(&out, strings.NewReader(serial))
		require.Equal(t, want.text, out.String())
		require.Equal(t, want.failed, failed)
		require.Equal(t, want.found, found)
	}
}

func TestUsage(t *testing.T) {
	require.Equal(t, 2, command(t.Context(), nil))
	require.Equal(t, 2, command(t.Context(), []string{"-nonsense"}))
}

// TestPack packs a tree and lists what the archive holds.
func TestPack(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("needs cpio")
	}
	dir := t.TempDir()
	im := &image{root: filepath.Join(dir, "root")}
	require.NoError(t, im.layout())
	require.NoError(t, im.addInit())
	initrd := filepath.Join(dir, "initrd")
	require.NoError(t, pack(t.Context(), im.root, initrd))
	archive, err := os.Open(initrd)
	require.NoError(t, err)
	defer archive.Close()
	list := exec.Command("cpio", "--quiet", "-t")
	list.Stdin = archive
	out, err := list.Output()
	require.NoError(t, err)
	names := strings.Fields(string(out))
	require.Subset(t, names, []string{"init", "bin", "usr/bin", "etc/passwd", "dev"})
}
