package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// wantedModules are loaded with what they depend on. One that the kernel has
// built in, or not at all, is left out.
var wantedModules = []string{
	"configfs", "loop", "fuse", "nbd", "ublk_drv", "uio", "target_core_user", "tcm_loop", "sd_mod",
	"crc32c_intel", "erofs", "xfs", "overlay",
}

// moduleLoader collects modules in the order in which they can be loaded.
type moduleLoader struct {
	files map[string]string // module → its file in the package
	dst   string            // folder that gets them
	order []string          // names of files in dst
	seen  map[string]bool
}

// stageModules writes the wanted modules to dst and returns their file names
// in the order in which they can be loaded.
func stageModules(ctx context.Context, k *kernel, dst string) ([]string, error) {
	l := &moduleLoader{files: map[string]string{}, dst: dst, seen: map[string]bool{}}
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return nil, err
	}
	err := filepath.WalkDir(k.modules, func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(d.Name(), ".ko"); ok && err == nil {
			l.files[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, name := range wantedModules {
		if err := l.add(ctx, name); err != nil {
			return nil, fmt.Errorf("kernel module %s: %w", name, err)
		}
	}
	return l.order, nil
}

// add adds a module after those that it needs.
func (l *moduleLoader) add(ctx context.Context, name string) error {
	path := l.files[name]
	if path == "" || l.seen[name] {
		return nil
	}
	l.seen[name] = true
	object, err := readModule(ctx, path)
	if err != nil {
		return err
	}
	needs, err := moduleNeeds(object)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, n := range needs {
		if err := l.add(ctx, n); err != nil {
			return err
		}
	}
	l.order = append(l.order, name+".ko")
	return os.WriteFile(filepath.Join(l.dst, name+".ko"), object, 0o644)
}

// moduleName is a module's name, given that of its file: the kernel does not
// tell - from _.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func readModule(ctx context.Context, path string) ([]byte, error) {
	if !strings.HasSuffix(path, ".xz") {
		return os.ReadFile(path)
	}
	b, err := exec.CommandContext(ctx, "xz", "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("xz -dc %s: %w", path, err)
	}
	return b, nil
}

// moduleNeeds reads the modules that one depends on. The package comes without
// the table of them, modules.dep, which depmod makes when it is installed, but
// each module says it: NUL-terminated "key=value" in section .modinfo.
func moduleNeeds(object []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var needs []string
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		if (key == "depends" || key == "softdep") && value != "" {
			needs = append(needs, parseNeeds(key, value)...)
		}
	}
	return needs, nil
}

// parseNeeds splits "a,b" of depends, and takes the modules after "pre:" of a
// softdep, "pre: a b post: c".
func parseNeeds(key, value string) []string {
	var needs []string
	if key == "depends" {
		for s := range strings.SplitSeq(value, ",") {
			needs = append(needs, moduleName(s))
		}
		return needs
	}
	pre := false
	for s := range strings.FieldsSeq(value) {
		switch {
		case strings.HasSuffix(s, ":"):
			pre = s == "pre:"
		case pre:
			needs = append(needs, moduleName(s))
		}
	}
	return needs
}
