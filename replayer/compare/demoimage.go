package compare

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// DemoTag is the tag of the demo image in its layout.
const DemoTag = "demo"

// DemoPort is the port on 127.0.0.1 that the demo image's workload listens on, unless $PORT or its first
// argument says another.
const DemoPort = 8080

// DemoReadyLog matches the one line that the workload prints once it accepts connections.
const DemoReadyLog = `^ready on `

const (
	minDemoLayers = 6
	demoFormat    = "reprise demo image 1" // changes when the same files would give another image

	// annotationContents, in index.json: number of files and bytes of the tars.
	annotationContents = "dev.reprise.demo.contents"
)

//go:embed demoimage_app.py
var demoApp []byte

// DemoImageOptions say how to make a demo image. Nil and zero fields mean the defaults.
type DemoImageOptions struct {
	// Root is the tree whose usr folder is read; default "/".
	Root string
	// MinBytes of file content are required, default 500 MiB: less is an error that says how to get more.
	MinBytes int64
	// MaxBytes of file content bound the image, default 600 MiB; what every start needs comes first.
	MaxBytes int64
	// Concurrency is how many layers are written at once; default the number of processors.
	Concurrency int
	// Progress is told how many bytes of file content are done, of all; calls do not overlap.
	Progress func(done, total int64)
}

// DemoImage is an OCI image on disk whose workload is a Python HTTP server.
type DemoImage struct {
	Layout     string             // the OCI layout's folder
	Descriptor ocispec.Descriptor // of the image's manifest
	Layers     int
	Files      int   // of all kinds but folders
	Bytes      int64 // of the layers' tars, uncompressed
	Compressed int64 // of the layers' blobs
	Reused     bool  // it was there already
}

// Ref is the image's reference, as convert takes it.
func (d *DemoImage) Ref() string { return "oci:" + d.Layout + ":" + DemoTag }

// BuildDemoImage makes an OCI image of this machine's own /usr in a folder below dir, or finds it there.
//
// The image is what a Debian-based Python image is: a base layer with all that Python needs to run, layers of
// libraries, language runtimes, tools and shared data, the standard library, and the application on top. Its files
// are the machine's, with their modes, owners and times (whole seconds); nothing is padded. Only what everybody may
// read in /usr goes in, without /usr/local and without documentation; /etc is generated. The same files give the
// same image to the last byte.
//
// The folder's name is the digest of the list of files (names, sizes, times, modes) and of the workload: the image
// is made again when that changes, and former ones are left to the caller. Two builds at once do not disturb each
// other.
func BuildDemoImage(ctx context.Context, dir string, o *DemoImageOptions) (*DemoImage, error) {
	opts := o.withDefaults()
	layers, err := planDemoImage(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("demo image: %w", err)
	}
	layout := filepath.Join(dir, "demo-image-"+demoKey(layers))
	if d, err := openDemoImage(layout); err == nil {
		return d, nil
	}
	if err := buildDemoLayout(ctx, dir, layout, layers, opts); err != nil {
		return nil, fmt.Errorf("demo image: %w", err)
	}
	d, err := openDemoImage(layout)
	if err != nil {
		return nil, fmt.Errorf("demo image: %w", err)
	}
	d.Reused = false
	return d, nil
}

func (o *DemoImageOptions) withDefaults() *DemoImageOptions {
	var c DemoImageOptions
	if o != nil {
		c = *o
	}
	if c.Root == "" {
		c.Root = "/"
	}
	if c.MinBytes <= 0 {
		c.MinBytes = 500 << 20
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = max(600<<20, c.MinBytes)
	}
	if c.Concurrency <= 0 {
		c.Concurrency = runtime.GOMAXPROCS(0)
	}
	if c.Progress == nil {
		c.Progress = func(done, total int64) {}
	}
	return &c
}

// demoKey names the image that the layers will give.
func demoKey(layers []demoLayer) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s %s\n", demoFormat, runtime.GOARCH)
	for _, l := range layers {
		fmt.Fprintf(h, "layer %q %d\n", l.name, len(l.entries))
		for _, e := range l.entries {
			fmt.Fprintf(h, "%q %o %d:%d %d %d %q %q %q\n", e.path, e.mode, e.uid, e.gid, e.size, e.mtime, e.link,
				e.hard, e.data)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// buildDemoLayout writes the layout beside its final place and renames it, so that what has the name is whole.
func buildDemoLayout(ctx context.Context, dir, layout string, layers []demoLayer, o *DemoImageOptions) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(dir, "demo-image-tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.MkdirAll(blobDir(tmp), 0o755); err != nil {
		return err
	}
	written, err := writeDemoLayers(ctx, tmp, layers, o)
	if err != nil {
		return err
	}
	if err := writeIndex(tmp, imageOf(demoConfig(), layers, written), written); err != nil {
		return err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := os.Rename(tmp, layout); err == nil {
		return nil
	}
	if _, err := openDemoImage(layout); err == nil {
		return nil // another build was first
	}
	if err := os.RemoveAll(layout); err != nil { // a damaged one
		return err
	}
	return os.Rename(tmp, layout)
}

// writeIndex writes what stands above the layers: config, manifest, index.json, oci-layout.
func writeIndex(layout string, image ocispec.Image, written []writtenLayer) error {
	config, err := json.Marshal(image)
	if err != nil {
		return err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
	}
	if m.Config, err = writeBlob(layout, ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	var files int
	var size int64
	for _, w := range written {
		m.Layers = append(m.Layers, w.desc)
		files += w.files
		size += w.tarSize
	}
	manifest, err := json.Marshal(m)
	if err != nil {
		return err
	}
	desc, err := writeBlob(layout, ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	desc.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	desc.Annotations = map[string]string{
		ocispec.AnnotationRefName: DemoTag,
		annotationContents:        fmt.Sprint(files, " ", size),
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{desc},
	})
	if err != nil {
		return err
	}
	marker, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(layout, ocispec.ImageLayoutFile), marker, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(layout, ocispec.ImageIndexFile), index, 0o644)
}

func demoConfig() ocispec.ImageConfig {
	return ocispec.ImageConfig{
		Env: []string{
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"LANG=C.UTF-8",
			fmt.Sprintf("PORT=%d", DemoPort),
		},
		// -B: bytecode that is missing is not written; -u: the log line comes at once.
		Entrypoint:   []string{"/usr/bin/python3", "-B", "-u", "/srv/app.py"},
		WorkingDir:   "/srv",
		ExposedPorts: map[string]struct{}{fmt.Sprintf("%d/tcp", DemoPort): {}},
		StopSignal:   "SIGTERM",
	}
}

// imageOf is the image of these layers for this machine's kind of processor.
func imageOf(config ocispec.ImageConfig, layers []demoLayer, written []writtenLayer) ocispec.Image {
	img := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	for i, w := range written {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, w.diffID)
		img.History = append(img.History, ocispec.History{CreatedBy: "reprise demo", Comment: layers[i].name})
	}
	return img
}

// openDemoImage reads a layout that an earlier build left; blobs are checked by size, not by digest.
func openDemoImage(layout string) (*DemoImage, error) {
	var index ocispec.Index
	if err := readJSON(filepath.Join(layout, ocispec.ImageIndexFile), &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) != 1 {
		return nil, fmt.Errorf("%s: %d manifests, want 1", layout, len(index.Manifests))
	}
	d := &DemoImage{Layout: layout, Descriptor: index.Manifests[0], Reused: true}
	if _, err := fmt.Sscan(d.Descriptor.Annotations[annotationContents], &d.Files, &d.Bytes); err != nil {
		return nil, fmt.Errorf("%s: annotation %s: %w", layout, annotationContents, err)
	}
	if err := checkBlobs(layout, d.Descriptor); err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	if err := readJSON(blobPath(layout, d.Descriptor.Digest), &m); err != nil {
		return nil, err
	}
	if err := checkBlobs(layout, append(m.Layers, m.Config)...); err != nil {
		return nil, err
	}
	d.Layers = len(m.Layers)
	for _, l := range m.Layers {
		d.Compressed += l.Size
	}
	return d, nil
}

func checkBlobs(layout string, blobs ...ocispec.Descriptor) error {
	for _, b := range blobs {
		if err := b.Digest.Validate(); err != nil {
			return fmt.Errorf("%s: blob %q: %w", layout, b.Digest, err)
		}
		fi, err := os.Stat(blobPath(layout, b.Digest))
		if err != nil {
			return err
		}
		if fi.Size() != b.Size {
			return fmt.Errorf("%s: blob %s: %d bytes, want %d", layout, b.Digest, fi.Size(), b.Size)
		}
	}
	return nil
}

// maxDemoJSON bounds what is read of an index, a manifest or a config.
const maxDemoJSON = 1 << 20

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDemoJSON+1))
	if err != nil {
		return err
	}
	if len(data) > maxDemoJSON {
		return fmt.Errorf("%s: larger than %d bytes", path, maxDemoJSON)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func blobDir(layout string) string { return filepath.Join(layout, ocispec.ImageBlobsDir, "sha256") }

func blobPath(layout string, d digest.Digest) string {
	return filepath.Join(blobDir(layout), d.Encoded())
}

func writeBlob(layout, mediaType string, data []byte) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return d, os.WriteFile(blobPath(layout, d.Digest), data, 0o644)
}
