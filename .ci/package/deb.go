package main

import (
	"bytes"
	"compress/gzip"
	"crypto/md5"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"text/template"
)

// A debFile is a file of a Debian package.
type debFile struct {
	name string // in the package
	mode os.FileMode
	text []byte // or
	from string // a file here
}

// deb makes the Debian package of an architecture. deb(5), deb-control(5).
func (r *release) deb(arch string) (string, error) {
	tree, err := os.MkdirTemp("", "reprise-deb-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tree)
	if err := os.Chmod(tree, 0o755); err != nil { // it becomes the root directory's
		return "", err
	}
	files, err := r.debFiles(arch)
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if err := f.write(tree); err != nil {
			return "", err
		}
	}
	if err := r.debControl(tree, arch); err != nil {
		return "", err
	}
	name := filepath.Join(r.out, fmt.Sprintf("reprise_%s_%s.deb", debian(r.version), arch))
	cmd := exec.Command("dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", tree, name)
	cmd.Stderr = os.Stderr
	return name, cmd.Run() // which takes its times from SOURCE_DATE_EPOCH
}

// debFiles are all but those of dpkg itself.
func (r *release) debFiles(arch string) ([]debFile, error) {
	changelog, err := r.zipped("CHANGELOG.md")
	if err != nil {
		return nil, err
	}
	files := []debFile{
		{name: "usr/bin/reprise", mode: 0o755, from: r.program(arch)},
		{name: "usr/lib/systemd/system/reprise.service", mode: 0o644, from: r.deploy("reprise.service")},
		{name: "etc/reprise/config.toml", mode: 0o644, from: filepath.Join(r.tree, "cmd", "reprise", "config.toml")},
		{name: "usr/share/doc/reprise/README.md", mode: 0o644, from: filepath.Join(r.tree, "README.md")},
		{name: "usr/share/doc/reprise/changelog.gz", mode: 0o644, text: changelog},
		{name: "usr/share/doc/reprise/copyright", mode: 0o644, from: r.deploy("debian/copyright")},
	}
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		files = append(files, debFile{name: "DEBIAN/" + script, mode: 0o755, from: r.deploy("debian/" + script)})
	}
	completion, err := r.completion()
	if err != nil || completion == nil {
		return files, err
	}
	return append(files, debFile{name: "usr/share/bash-completion/completions/reprise", mode: 0o644, text: completion}), nil
}

// completion is the shell's, if a program was built that can print it here.
func (r *release) completion() ([]byte, error) {
	text, err := exec.Command(r.program(runtime.GOARCH), "completion", "bash").Output()
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return text, err
}

// zipped is a file of the tree, the same whenever it is made.
func (r *release) zipped(name string) ([]byte, error) {
	p, err := os.ReadFile(filepath.Join(r.tree, name))
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(p); err != nil {
		return nil, err
	}
	err = w.Close()
	return out.Bytes(), err
}

// write puts the file into the tree of a package.
func (f *debFile) write(tree string) error {
	if f.from != "" {
		p, err := os.ReadFile(f.from)
		if err != nil {
			return err
		}
		f.text = p
	}
	name := filepath.Join(tree, f.name)
	if err := mkdirAll(tree, filepath.Dir(f.name)); err != nil {
		return err
	}
	if err := os.WriteFile(name, f.text, f.mode); err != nil {
		return err
	}
	return os.Chmod(name, f.mode) // whatever the umask
}

// mkdirAll makes directories below root that all may enter.
func mkdirAll(root, dir string) error {
	path := root
	for part := range strings.SplitSeq(dir, "/") {
		path = filepath.Join(path, part)
		if err := os.Mkdir(path, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
		if err := os.Chmod(path, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// debControl adds what dpkg reads of the other files.
func (r *release) debControl(tree, arch string) error {
	var sums, confs bytes.Buffer
	var size int64
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := strings.TrimPrefix(path, tree+"/")
		if strings.HasPrefix(name, "DEBIAN/") {
			return nil
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		size += int64(len(p))
		fmt.Fprintf(&sums, "%x  %s\n", md5.Sum(p), name)
		if strings.HasPrefix(name, "etc/") {
			fmt.Fprintf(&confs, "/%s\n", name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	control, err := r.control(arch, size)
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{"control": control, "md5sums": sums.Bytes(), "conffiles": confs.Bytes()} {
		f := debFile{name: "DEBIAN/" + name, mode: 0o644, text: text}
		if err := f.write(tree); err != nil {
			return err
		}
	}
	return nil
}

// control fills in the package's description.
func (r *release) control(arch string, size int64) ([]byte, error) {
	t, err := template.ParseFiles(r.deploy("debian/control"))
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = t.Execute(&out, struct {
		Version, Arch string
		Size          int64 // KiB
	}{debian(r.version), arch, (size + 1023) / 1024})
	return out.Bytes(), err
}
