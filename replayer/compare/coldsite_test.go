package compare

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// A coldSite is a registry with the images and their traces. Everything that is
// slow to make stays in its directory:
//
//	debs, npm      packages as they were fetched
//	NAME-DIGEST    images
//	layers         of the converted images
//	registry       its blobs
//	NAME.warm      state directories that have all bytes of an image
//	NAME*.trace    recordings, made anew by each process
type coldSite struct {
	dir     string
	codec   convert.Options // of the layers: Algo and BlockSize alone
	program string
	near    *regtest.Server // without a link
	reg     *regtest.Registry
	client  *registry.Client
	say     func(format string, args ...any)

	originals map[string]*DemoImage // before conversion
}

// readyFlags are those of every start.
var readyFlags = []string{"--net", "own", "--ready-log", "^ready on "}

func openColdSite(ctx context.Context, dir string, codec convert.Options, program string, say func(string, ...any)) (*coldSite, error) {
	s := &coldSite{dir: dir, codec: codec, program: program, say: say, originals: map[string]*DemoImage{}}
	if err := os.MkdirAll(s.path(""), 0o755); err != nil {
		return nil, err
	}
	var err error
	if s.reg, err = regtest.NewRegistry(&regtest.RegistryOptions{Dir: filepath.Join(dir, "registry")}); err != nil {
		return nil, err
	}
	if s.near, err = regtest.Start(ctx, s.reg); err != nil {
		return nil, err
	}
	if s.client, err = registry.New(nil); err != nil {
		return nil, errors.Join(err, s.near.Close())
	}
	return s, nil
}

func (s *coldSite) Close() error { return errors.Join(s.client.Close(), s.near.Close()) }

// behind serves the registry behind a link.
func (s *coldSite) behind(ctx context.Context, spec string) (*regtest.Link, *regtest.Server, error) {
	l, err := regtest.ParseLink(spec)
	if err != nil {
		return nil, nil, err
	}
	link := regtest.NewLink(l, s.reg)
	srv, err := regtest.Start(ctx, link)
	return link, srv, err
}

// path is where a file stays that belongs to converted images: traces, results.
func (s *coldSite) path(name string) string {
	if s.codec.Algo == 0 {
		return filepath.Join(s.dir, name)
	}
	return filepath.Join(s.dir, fmt.Sprintf("%v-%dk", s.codec.Algo, s.codec.BlockSize>>10), name)
}

// codecName says how layers are compressed.
func (s *coldSite) codecName() string {
	if s.codec.Algo == 0 {
		return "lz4 in blocks of 4 KiB"
	}
	return fmt.Sprintf("%v in blocks of %d KiB", s.codec.Algo, s.codec.BlockSize>>10)
}

func repository(name string) string { return "coldstart/" + name + ":lazy" }

// image builds and converts one image.
func (s *coldSite) image(ctx context.Context, r recipe) error {
	if err := r.missing(); err != nil {
		return err
	}
	b := &pkgBuilder{dir: s.dir, say: s.say}
	im, err := b.build(ctx, r)
	if err != nil {
		return err
	}
	s.originals[r.name] = im
	size, err := s.convert(ctx, im, s.ref(r.name))
	if err != nil {
		return err
	}
	s.say("%s: %d layers, %d files, %.0f MB, gzip %.0f MB, overlaybd (%s) %.0f MB",
		r.name, im.Layers, im.Files, float64(im.Bytes)/1e6, float64(im.Compressed)/1e6, s.codecName(), float64(size)/1e6)
	return nil
}

// ref is an image without a link.
func (s *coldSite) ref(name string) string { return s.near.Addr + "/" + repository(name) }

// traces fills the image's warm directory, records it, and attaches its trace.
func (s *coldSite) traces(ctx context.Context, name string) error {
	if err := FillRoot(ctx, s.path(name+".warm"), s.ref(name)); err != nil {
		return err
	}
	return s.recordings(ctx, name, s.ref(name))
}

// convert puts the converted image at the registry and returns the size of its
// layers.
func (s *coldSite) convert(ctx context.Context, im *DemoImage, ref string) (size int64, err error) {
	src, err := convert.At(im.Ref(), s.client)
	if err != nil {
		return 0, err
	}
	dst, err := convert.At(ref, s.client)
	if err != nil {
		return 0, err
	}
	_, err = convert.Convert(ctx, src, dst, &convert.Options{
		CacheDir: s.path("layers"), Algo: s.codec.Algo, BlockSize: s.codec.BlockSize,
		Progress: func(e convert.Event) {
			if e.Done && e.Stage == convert.Push {
				size += e.Bytes
			}
		},
	})
	return size, err
}

// otherWorkload reads many files of any of the images.
var otherWorkload = []string{"--entrypoint", "/bin/sh", "--ready-exit"}

const otherScript = `find /usr/bin /usr/share -type f | sort | sed -n '0~11p' | head -600 | tr '\n' '\0' | xargs -0 cat > /dev/null`

// recordings are a cold start's, which is attached; a warm start's, for the
// times between its reads; and another workload's.
func (s *coldSite) recordings(ctx context.Context, name, ref string) error {
	cold := s.path(name + ".trace")
	if err := s.record(ctx, ref, "", cold, readyFlags); err != nil {
		return err
	}
	if err := s.record(ctx, ref, s.path(name+".warm"), s.path(name+".warm.trace"), readyFlags); err != nil {
		return err
	}
	other := slices.Concat([]string{"--net", "own"}, otherWorkload)
	if err := s.record(ctx, ref, "", s.path(name+".other.trace"), other, "-c", otherScript); err != nil {
		return err
	}
	if err := Truncate(cold, s.path(name+".truncated.trace")); err != nil {
		return err
	}
	return s.attach(ctx, ref, cold)
}

// record runs `reprise record` with a state directory, by default an empty one.
func (s *coldSite) record(ctx context.Context, ref, root, out string, flags []string, args ...string) error {
	if err := os.Remove(out); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	empty, err := os.MkdirTemp(s.dir, "record-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(empty)
	if err := dropCaches(s.dir); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	argv := slices.Concat([]string{"record", "--root", cmp.Or(root, empty), "-o", out}, flags, []string{ref})
	if len(args) > 0 {
		argv = append(append(argv, "--"), args...)
	}
	_, err = output(exec.CommandContext(ctx, s.program, argv...))
	return err
}

func (s *coldSite) attach(ctx context.Context, ref, file string) error {
	t, err := tracefmt.Open(file)
	if err != nil {
		return err
	}
	m, err := s.client.Manifest(ctx, ref, nil)
	if err != nil {
		return err
	}
	store, err := artifact.New(s.client, ref)
	if err != nil {
		return err
	}
	_, err = store.Push(ctx, m.Descriptor, t, nil)
	return err
}

// bound is the lower bound of a start on the link, from its recordings.
func (s *coldSite) bound(name string, link regtest.LinkSpec) (time.Duration, error) {
	cold, err := tracefmt.Open(s.path(name + ".trace"))
	if err != nil {
		return 0, err
	}
	warm, err := tracefmt.Open(s.path(name + ".warm.trace"))
	if err != nil {
		return 0, err
	}
	w, err := replayer.NewWorkload(cold, warm)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return replayer.LowerBound([]*replayer.Workload{w}, &replayer.SimOptions{Link: replayer.Link{Delay: link.Delay, Rate: link.Rate}})
}
