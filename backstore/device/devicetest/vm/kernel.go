package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kernel is an unpacked kernel package.
type kernel struct {
	version string // as `uname -r` says it
	image   string // path of vmlinuz
	modules string // folder of the modules
}

// openKernel returns the kernel in the user's cache folder, after fetching it
// if there is none.
func openKernel(ctx context.Context) (*kernel, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "reprise", "vm")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	root := filepath.Join(dir, "linux")
	k, err := findKernel(root)
	if errors.Is(err, os.ErrNotExist) {
		if err := fetchKernel(ctx, dir, root); err != nil {
			return nil, fmt.Errorf("fetch a kernel: %w", err)
		}
		k, err = findKernel(root)
	}
	return k, err
}

// findKernel finds what a kernel package unpacked at root.
func findKernel(root string) (*kernel, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) == 0 {
		return nil, fmt.Errorf("kernel below %s: %w", root, os.ErrNotExist)
	}
	version := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	for _, lib := range []string{"lib", "usr/lib"} {
		modules := filepath.Join(root, lib, "modules", version)
		if _, err := os.Stat(modules); err == nil {
			return &kernel{version: version, image: images[0], modules: modules}, nil
		}
	}
	return nil, fmt.Errorf("modules of %s: %w", images[0], os.ErrNotExist)
}

// fetchKernel downloads the package into dir and unpacks it as root, all of it
// or nothing.
func fetchKernel(ctx context.Context, dir, root string) error {
	tmp, err := os.MkdirTemp(dir, "fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := download(ctx, tmp); err != nil {
		if os.Geteuid() != 0 {
			return fmt.Errorf("%w (are the package lists current? apt-get update)", err)
		}
		if err := tool(ctx, tmp, "apt-get", "-qq", "update"); err != nil {
			fmt.Fprintln(os.Stderr, "vm:", err) // some lists may have been read
		}
		if err := download(ctx, tmp); err != nil {
			return err
		}
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d packages: %w", len(debs), err)
	}
	unpacked := filepath.Join(tmp, "linux")
	if err := tool(ctx, tmp, "dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return err
	}
	if err := os.RemoveAll(root); err != nil { // half of one
		return err
	}
	return os.Rename(unpacked, root)
}

// download puts the newest package into dir.
func download(ctx context.Context, dir string) error {
	list, err := exec.CommandContext(ctx, "apt-cache", "search", "--names-only",
		`^linux-image-6\.12\.[^ ]*-cloud-amd64-unsigned$`).Output()
	if err != nil {
		return fmt.Errorf("apt-cache search: %w", err)
	}
	name := newest(string(list))
	if name == "" {
		return errors.New("apt knows no package linux-image-6.12.*-cloud-amd64-unsigned")
	}
	fmt.Fprintln(os.Stderr, "vm: downloading", name)
	// The user _apt, as whom root's apt-get downloads, cannot write everywhere.
	return tool(ctx, dir, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name)
}

var numbers = regexp.MustCompile(`\d+`)

// newest returns the package of the highest version in the lines "name - text"
// that apt-cache printed, "" if there is none.
func newest(list string) string {
	var best string
	var bestVersion []int
	for line := range strings.Lines(list) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		var version []int
		for _, s := range numbers.FindAllString(name, -1) {
			n, _ := strconv.Atoi(s)
			version = append(version, n)
		}
		if best == "" || slices.Compare(version, bestVersion) > 0 {
			best, bestVersion = name, version
		}
	}
	return best
}

// lock keeps other runs out of the cache folder until the function that it
// returns is called.
func lock(path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f.Close, nil
}

// tool runs a program of the host in dir.
func tool(ctx context.Context, dir, name string, args ...string) error {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, out)
	}
	return nil
}
