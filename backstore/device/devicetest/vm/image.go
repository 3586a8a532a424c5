package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// tools are copied into the machine where the host has them.
var tools = []string{
	"mkfs.ext4", "e2fsck", "debugfs", "dumpe2fs", "resize2fs", "mkfs.erofs", "fsck.erofs", "mkfs.xfs", "xfs_repair",
	"fio", "losetup", "blkdiscard", "blockdev", "mount", "umount", "fstrim", "nbd-client",
	"sh", "cat", "ls", "cp", "dd", "sleep", "true", "false", "sha256sum", "tar", "dmesg", "ps",
}

// plan is what the machine is to do; it lies in the image as planFile.
type plan struct {
	Modules  []string // files in moduleDir, in order
	Env      []string
	Args     []string // of every test binary
	Packages []testPackage
}

type testPackage struct {
	Path   string // import path
	Dir    string // in the machine
	Binary string // in the machine
}

// Places in the machine.
const (
	planFile  = "/vm.json"
	moduleDir = "/modules"
	binaryDir = "/tests"
	sourceDir = "/src"
)

// image is the tree that becomes the initramfs.
type image struct {
	root string
	plan plan
}

// buildImage makes the initramfs in dir and returns its path.
func buildImage(ctx context.Context, dir string, k *kernel, o *options) (string, error) {
	im := &image{root: filepath.Join(dir, "root")}
	im.plan.Env = environment()
	im.plan.Args = testArgs(o)
	steps := []func() error{
		im.layout,
		im.addInit,
		im.addTools,
		func() (err error) {
			im.plan.Modules, err = stageModules(ctx, k, im.path(moduleDir))
			return err
		},
		func() error { return im.addTests(ctx, o.packages) },
		im.writePlan,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return "", fmt.Errorf("make the image: %w", err)
		}
	}
	initrd := filepath.Join(dir, "initrd")
	return initrd, pack(ctx, im.root, initrd)
}

// testArgs are the flags of the test binaries. Their own time limit comes a
// little before the machine's, since it tells where the time went.
func testArgs(o *options) []string {
	args := []string{"-test.v", "-test.timeout=" + (o.timeout - min(o.timeout/4, time.Minute)).String()}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	for _, f := range o.testFlags {
		args = append(args, testFlag(f))
	}
	return args
}

// testFlag turns a flag of `go test` into the binary's.
func testFlag(f string) string {
	name, _, _ := strings.Cut(strings.TrimLeft(f, "-"), "=")
	switch name {
	case "bench", "benchtime", "benchmem", "count", "short", "failfast", "parallel", "skip", "cpu", "shuffle":
		if strings.HasPrefix(f, "-") {
			return "-test." + strings.TrimLeft(f, "-")
		}
	}
	return f
}

func environment() []string {
	env := []string{"PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin", "HOME=/root", "TMPDIR=/tmp", "REPRISE_VM=1"}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "REPRISE_") && !strings.HasPrefix(v, "REPRISE_VM=") {
			env = append(env, v)
		}
	}
	return env
}

func (im *image) path(p string) string { return filepath.Join(im.root, p) }

// layout makes what a root file system has before anything is in it.
func (im *image) layout() error {
	for _, d := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "proc", "sys", "dev", "run", "tmp",
		"root", "var/tmp", "var/lib"} {
		if err := os.MkdirAll(im.path(d), 0o755); err != nil {
			return err
		}
	}
	for link, to := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64",
		"etc/mtab": "../proc/self/mounts"} {
		if err := os.Symlink(to, im.path(link)); err != nil {
			return err
		}
	}
	for file, text := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"etc/group":  "root:x:0:\nnogroup:x:65534:\n",
		"etc/hosts":  "127.0.0.1 localhost\n",
	} {
		if err := os.WriteFile(im.path(file), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, f := range []string{"/etc/mke2fs.conf"} {
		if err := im.copyAs(f, f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// addInit makes this program the first process.
func (im *image) addInit() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := im.copyAs(self, "/init"); err != nil {
		return err
	}
	return im.addLibraries(self)
}

func (im *image) addTools() error {
	for _, name := range tools {
		path, err := exec.LookPath(name)
		for _, dir := range []string{"/usr/sbin/", "/sbin/"} { // not in the path of ordinary users
			if err != nil {
				path, err = exec.LookPath(dir + name)
			}
		}
		if err != nil {
			continue
		}
		if err := im.copyAs(path, path); err != nil {
			return err
		}
		if err := im.addLibraries(path); err != nil {
			return err
		}
	}
	return nil
}

// addLibraries copies the shared libraries that ldd names for a program:
// "name => /path (address)", and "/path (address)" for the loader. It fails
// for a program without any.
func (im *image) addLibraries(program string) error {
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil //nolint:nilerr // "not a dynamic executable"
	}
	for line := range strings.Lines(string(out)) {
		for field := range strings.FieldsSeq(line) {
			if !strings.HasPrefix(field, "/") {
				continue
			}
			if err := im.copyAs(field, field); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyAs copies what path leads to, unless the image has it already.
func (im *image) copyAs(path, as string) error {
	as = im.path(as)
	if _, err := os.Stat(as); err == nil {
		return nil
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(as), 0o755); err != nil {
		return err
	}
	info, err := os.Stat(real)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(real)
	if err != nil {
		return err
	}
	return os.WriteFile(as, b, info.Mode().Perm())
}

// addTests builds the packages' test binaries.
func (im *image) addTests(ctx context.Context, packages []string) error {
	root, err := goOutput(ctx, "list", "-m", "-f", "{{.Dir}}")
	if err != nil {
		return err
	}
	root = strings.TrimSpace(root)
	if err := im.copyAs(filepath.Join(root, "go.mod"), filepath.Join(sourceDir, "go.mod")); err != nil {
		return err
	}
	list, err := goOutput(ctx, append([]string{"list", "-f", "{{.ImportPath}}\t{{.Dir}}"}, packages...)...)
	if err != nil {
		return err
	}
	for line := range strings.Lines(list) {
		path, dir, _ := strings.Cut(strings.TrimSpace(line), "\t")
		if err := im.addTest(ctx, path, root, dir); err != nil {
			return err
		}
	}
	if len(im.plan.Packages) == 0 {
		return errors.New("no package has tests")
	}
	return nil
}

func (im *image) addTest(ctx context.Context, path, root, dir string) error {
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		return err
	}
	p := testPackage{
		Path:   path,
		Dir:    filepath.Join(sourceDir, rel),
		Binary: filepath.Join(binaryDir, strings.ReplaceAll(rel, "/", "-")+".test"),
	}
	if _, err := goOutput(ctx, "test", "-c", "-ldflags=-s -w", "-o", im.path(p.Binary), path); err != nil {
		return err
	}
	if _, err := os.Stat(im.path(p.Binary)); err != nil {
		return nil //nolint:nilerr // a package without tests
	}
	im.plan.Packages = append(im.plan.Packages, p)
	if err := os.MkdirAll(im.path(p.Dir), 0o755); err != nil {
		return err
	}
	data := filepath.Join(dir, "testdata")
	if _, err := os.Stat(data); err != nil {
		return nil //nolint:nilerr // it has none
	}
	return os.CopyFS(filepath.Join(im.path(p.Dir), "testdata"), os.DirFS(data))
}

// goOutput runs the go command without cgo, so that what it builds needs no
// libraries.
func goOutput(ctx context.Context, args ...string) (string, error) {
	c := exec.CommandContext(ctx, "go", args...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), nil
}

func (im *image) writePlan() error {
	b, err := json.Marshal(&im.plan)
	if err != nil {
		return err
	}
	return os.WriteFile(im.path(planFile), b, 0o644)
}

// pack writes the tree as a cpio archive, which belongs to root and is not
// compressed: unpacking would take the machine longer.
func pack(ctx context.Context, root, dst string) error {
	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	c := exec.CommandContext(ctx, "cpio", "--quiet", "--null", "-o", "-H", "newc", "-R", "+0:+0")
	c.Dir = root
	c.Stdout = out
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		return errors.Join(err, out.Close())
	}
	if err := c.Start(); err != nil {
		return errors.Join(fmt.Errorf("cpio: %w", err), out.Close())
	}
	names := bufio.NewWriter(in)
	err = filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		names.WriteString(rel + "\x00")
		return err
	})
	return errors.Join(err, names.Flush(), in.Close(), c.Wait(), out.Close())
}
