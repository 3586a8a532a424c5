package main_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const modulePath = "github.com/reprise-project/reprise"

// above stands for all rows above one's own.
const above = "all above"

// packages says who may import whom, in order: imports only point up. A package that is not here may not be;
// folders below an internal folder belong to the row above it.
var packages = []struct {
	name string
	may  []string
}{
	{"zfile", nil},
	{"tracefmt", nil},
	{"bpf", nil},
	{"backstore/lsmt", nil},
	{"backstore", []string{"zfile", "backstore/lsmt"}},
	{"backstore/registry", []string{"backstore"}},
	{"backstore/registry/regtest", nil},
	{"backstore/registry/registrytest", []string{"backstore/registry/regtest"}},
	{"backstore/device", nil},
	{"backstore/device/devicetest", []string{"backstore/device"}},
	{"backstore/device/devicetest/vm", nil},
	{"backstore/convert", []string{"zfile", "backstore", "backstore/lsmt", "backstore/registry", "backstore/device"}},
	{"tracefmt/artifact", []string{"tracefmt", "backstore/registry"}},
	{"recorder", []string{"tracefmt", "backstore"}},
	{"recorder/probe", []string{"bpf", "tracefmt"}},
	{"recorder/container", nil},
	{"replayer", []string{"tracefmt", "backstore"}},
	{"replayer/node", []string{above}},
	{"replayer/compare", []string{above}},
	{"snapshotter", []string{above}},
	{"cmd/reprise", []string{above}},
}

// heavy says which packages may import a module, or a part of it: the longest prefix counts.
var heavy = map[string][]string{
	"github.com/klauspost/compress":                    {"zfile", "tracefmt", "backstore/convert", "replayer/compare"},
	"github.com/pierrec/lz4":                           {"zfile"},
	"github.com/vmihailenco/msgpack":                   {"tracefmt"},
	"github.com/cilium/ebpf":                           {"bpf", "recorder/probe"},
	"github.com/containerd/containerd/v2":              {"snapshotter"},
	"github.com/containerd/containerd/v2/core/images":  {"backstore/registry", "backstore/convert", "snapshotter"},
	"github.com/containerd/containerd/v2/core/remotes": {"backstore/registry"},
	"github.com/containerd/containerd/api":             {"snapshotter"},
	"google.golang.org/grpc":                           {"snapshotter", "cmd/reprise"},
	"github.com/containerd/log":                        {"backstore/registry"}, // to quieten core/remotes
	"github.com/sirupsen/logrus":                       {"backstore/registry"}, // likewise
	"github.com/containerd/containerd/v2/pkg/archive":  {"backstore/convert"},
	"github.com/containerd/containerd/v2/pkg/oci":      {"recorder/container"},
	"github.com/distribution/reference":                {"snapshotter"}, // names in the CRI
	"k8s.io/cri-api":                                   {"snapshotter"},
	"github.com/opencontainers/runtime-spec":           {"recorder/container"},
	"github.com/google/go-containerregistry":           {"backstore/registry/regtest", "backstore/registry/registrytest"},
	"github.com/hanwen/go-fuse":                        {"backstore/device"},
	"github.com/coreos/go-systemd/v22":                 {"cmd/reprise"},
	"github.com/godbus/dbus/v5":                        {"cmd/reprise"},
	"github.com/mdlayher/genetlink":                    {"backstore/device"},
	"github.com/mdlayher/netlink":                      {"backstore/device"},
	"oras.land/oras-go/v2":                             {"tracefmt/artifact"},
	"oras.land/oras-go/v2/registry/remote/credentials": {"backstore/registry"},
	"github.com/prometheus/client_golang":              {"replayer/node", "snapshotter", "cmd/reprise"},
	"go.opentelemetry.io/contrib":                      {"cmd/reprise"},
	"go.opentelemetry.io/otel":                         {"replayer/node", "snapshotter", "cmd/reprise"},
	"go.opentelemetry.io/otel/exporters":               {"cmd/reprise"},
	"go.opentelemetry.io/otel/sdk":                     {"cmd/reprise"},
	"github.com/docker/go-units":                       {"cmd/reprise"},
	"github.com/pelletier/go-toml":                     {"cmd/reprise"},
	"github.com/spf13/cobra":                           {"cmd/reprise"},
	"github.com/spf13/pflag":                           {"cmd/reprise"},
	"github.com/vbauerster/mpb":                        {"cmd/reprise"},
	"golang.org/x/term":                                {"cmd/reprise"},
	"github.com/stretchr/testify":                      {"backstore/device/devicetest"},
}

// light are the small modules that any package may import.
var light = []string{
	"golang.org/x/sync",
	"golang.org/x/sys",
	"github.com/containerd/errdefs",
	"github.com/containerd/platforms",
	"github.com/moby/sys",
	"github.com/opencontainers/go-digest",
	"github.com/opencontainers/image-spec",
}

// testSupport are packages of ours that tests of any package may import.
var testSupport = []string{"backstore/registry", "backstore/registry/regtest", "backstore/registry/registrytest", "backstore/device/devicetest"}

// row is the position in packages of a folder's row; -1 if it has none.
func row(dir string) int {
	if i := strings.Index(dir+"/", "/internal/"); i >= 0 {
		dir = dir[:i]
	}
	for i, p := range packages {
		if p.name == dir {
			return i
		}
	}
	return -1
}

// checkImport says what is wrong when a file of the folder imports the path; "" if nothing is.
func checkImport(dir, imported string, test bool) string {
	if first, _, _ := strings.Cut(imported, "/"); !strings.Contains(first, ".") {
		return "" // the standard library
	}
	if rel, ok := strings.CutPrefix(imported, modulePath+"/"); ok {
		return checkOurs(dir, rel, test)
	}
	return checkTheirs(dir, imported, test)
}

func checkOurs(dir, imported string, test bool) string {
	from, to := row(dir), row(imported)
	switch {
	case from < 0:
		return dir + " is not in the table of packages"
	case to < 0:
		return imported + " is not in the table of packages"
	case from == to:
		return ""
	case test && (to < from || slices.Contains(testSupport, imported)):
		return ""
	}
	may := packages[from].may
	if slices.Contains(may, packages[to].name) || to < from && slices.Contains(may, above) {
		return ""
	}
	return fmt.Sprintf("may not import %s", imported)
}

// checkTheirs lets tests import what they like: it is not linked into the program.
func checkTheirs(dir, imported string, test bool) string {
	if test || slices.ContainsFunc(light, func(m string) bool { return within(imported, m) }) {
		return ""
	}
	longest := ""
	for m := range heavy {
		if within(imported, m) && len(m) > len(longest) {
			longest = m
		}
	}
	if longest == "" {
		return imported + " is not in the table of modules"
	}
	if i := row(dir); i < 0 || !slices.Contains(heavy[longest], packages[i].name) {
		return fmt.Sprintf("may not import %s; only %s may", imported, strings.Join(heavy[longest], ", "))
	}
	return ""
}

func within(imported, module string) bool {
	return imported == module || strings.HasPrefix(imported, module+"/")
}

// TestImports reads every source file of the tree. It parses instead of running the go command, so that the test
// cache sees which files it depends on.
func TestImports(t *testing.T) {
	root := moduleRoot(t)
	var files int
	require.NoError(t, filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != root && skipDir(d.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		files++
		return checkFile(t, root, name)
	}))
	require.NotZero(t, files)
}

// skipDir follows the go command.
func skipDir(name string) bool {
	return name == "vendor" || name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")
}

func checkFile(t *testing.T, root, name string) error {
	rel, err := filepath.Rel(root, name)
	if err != nil {
		return err
	}
	dir := path.Dir(filepath.ToSlash(rel))
	if row(dir) < 0 {
		t.Errorf("%s: the package is not in the table of packages (see packages in imports_test.go)", rel)
		return nil
	}
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
	if err != nil {
		return err
	}
	for _, s := range f.Imports {
		imported, err := strconv.Unquote(s.Path.Value)
		if err != nil {
			return err
		}
		if bad := checkImport(dir, imported, strings.HasSuffix(name, "_test.go")); bad != "" {
			t.Errorf("%s: %s", rel, bad)
		}
	}
	return nil
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		require.NotEqual(t, dir, filepath.Dir(dir), "no go.mod above the working directory")
		dir = filepath.Dir(dir)
	}
}

// The table itself: each row is there once, and allows only rows above it.
func TestImportTable(t *testing.T) {
	seen := make(map[string]bool)
	for _, p := range packages {
		require.False(t, seen[p.name], p.name)
		for _, m := range p.may {
			require.True(t, m == above || seen[m], "%s: %s does not stand above it", p.name, m)
		}
		seen[p.name] = true
	}
	for m, users := range heavy {
		for _, u := range users {
			require.True(t, seen[u], "%s: %s is not in the table", m, u)
		}
	}
}

func TestCheckImport(t *testing.T) {
	tests := []struct {
		dir, imported string
		test          bool
		want          string
	}{
		{dir: "zfile", imported: "archive/tar"},
		{dir: "zfile", imported: "github.com/pierrec/lz4/v4"},
		{dir: "backstore", imported: "github.com/pierrec/lz4/v4", want: "only zfile may"},
		{dir: "backstore", imported: "github.com/pierrec/lz4/v4", test: true},
		{dir: "zfile", imported: "github.com/pierrec/lz4x", want: "not in the table of modules"},
		{dir: "backstore", imported: modulePath + "/zfile"},
		{dir: "backstore", imported: modulePath + "/backstore/registry", want: "may not import"},
		{dir: "backstore", imported: modulePath + "/backstore/registry/regtest", want: "may not import"},
		{dir: "backstore", imported: modulePath + "/backstore/registry/regtest", test: true},
		{dir: "zfile", imported: modulePath + "/backstore", test: true, want: "may not import"},
		{dir: "recorder", imported: modulePath + "/backstore/device", want: "may not import"},
		{dir: "recorder", imported: modulePath + "/backstore/device", test: true},
		{dir: "replayer/node", imported: modulePath + "/recorder/container"},
		{dir: "replayer/node", imported: modulePath + "/replayer/compare", want: "may not import"},
		{dir: "backstore/device", imported: modulePath + "/backstore/device/internal/fuse"},
		{dir: "backstore/device/internal/fuse", imported: "github.com/hanwen/go-fuse/v2/fuse"},
		{dir: "backstore/device/internal/fuse", imported: modulePath + "/zfile", want: "may not import"},
		{dir: "snapshotter", imported: "github.com/containerd/containerd/v2/core/remotes/docker", want: "only backstore/registry may"},
		{dir: "util", imported: modulePath + "/zfile", want: "util is not in the table"},
		{dir: "zfile", imported: modulePath + "/util", want: "util is not in the table"},
	}
	for _, tt := range tests {
		got := checkImport(tt.dir, tt.imported, tt.test)
		if tt.want == "" {
			require.Empty(t, got, "%+v", tt)
		} else {
			require.Contains(t, got, tt.want, "%+v", tt)
		}
	}
}
