// Command package makes what the project is installed from, of programs that were built before: a Debian package
// and an image of each architecture, the chart, and a manifest of the chart's defaults.
//
//	package -version V [-tree DIR] [-out DIR] [-image NAME] ARCH…
//
// OUT/ARCH/reprise are the programs; cmd/reprise/deploy of the tree has most of the rest. It has a module of its own, so
// that what it needs is not in the program's.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// A release is what is packaged.
type release struct {
	tree, out string // directories: of the sources, of programs and packages
	version   string // by semantic versioning, which is a Debian version as well
	image     string // name in a registry, without a tag
	archs     []string
	time      time.Time // of everything in it
}

func main() {
	var (
		r       release
		version string
	)
	flag.StringVar(&version, "version", "", "as git describe gives it")
	flag.StringVar(&r.tree, "tree", ".", "the sources")
	flag.StringVar(&r.out, "out", "bin/package", "directory of the programs, and for the packages")
	flag.StringVar(&r.image, "image", "registry.example.com/reprise", "name that the image will have in a registry")
	flag.Parse()
	r.archs, r.version = flag.Args(), semantic(version)
	if err := r.make(); err != nil {
		fmt.Fprintln(os.Stderr, "package:", err)
		os.Exit(1)
	}
}

// make makes all of it, and says what.
func (r *release) make() error {
	if len(r.archs) == 0 {
		return errors.New("name an architecture")
	}
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH, the time of everything in the packages: %w", err)
	}
	r.time = time.Unix(seconds, 0).UTC()
	for _, arch := range r.archs {
		if err := say(r.deb(arch)); err != nil {
			return fmt.Errorf("package of %s: %w", arch, err)
		}
	}
	if err := say(r.oci()); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if err := say(r.chart()); err != nil {
		return fmt.Errorf("chart: %w", err)
	}
	if err := say(r.manifest()); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	return nil
}

// say says what was made.
func say(name string, err error) error {
	if err != nil {
		return err
	}
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	fmt.Printf("%9d  %s\n", fi.Size(), name)
	return nil
}

// program is the one that was built for an architecture.
func (r *release) program(arch string) string { return filepath.Join(r.out, arch, "reprise") }

// deploy is a file of cmd/reprise/deploy.
func (r *release) deploy(name string) string {
	return filepath.Join(r.tree, "cmd", "reprise", "deploy", name)
}
