package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/replayer/node"
)

func newImage() *cobra.Command {
	return group("image", "An image or a config.v1.json: layers, flat device, checksums",
		newImageInfo(), newImageDump(), newImageVerify())
}

// withImage opens an image for one command.
func withImage(cmd *cobra.Command, nf *nodeFlags, ref string, use func(*node.Image) error) error {
	nf.noDevice = true
	n, err := nf.open(cmd)
	if err != nil {
		return err
	}
	im, err := n.OpenImage(cmd.Context(), ref, nil)
	if err != nil {
		return errors.Join(err, n.Close())
	}
	return errors.Join(use(im), im.Close(), n.Close())
}

// imageCommand is a subcommand that looks at an image. Its state directory is
// a temporary one unless --root names one, so that it works for everybody.
func imageCommand(use, short string, n int, do func(cmd *cobra.Command, im *node.Image, a []string) error) *cobra.Command {
	var nf nodeFlags
	cmd := &cobra.Command{
		Use: use, Short: short, Args: args(cobra.ExactArgs(n)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := nf.check(cmd); err != nil {
				return err
			}
			if !cmd.Flags().Changed("root") {
				dir, err := os.MkdirTemp("", "reprise-image-")
				if err != nil {
					return err
				}
				defer os.RemoveAll(dir)
				nf.root = dir
			}
			return withImage(cmd, &nf, a[0], func(im *node.Image) error { return do(cmd, im, a) })
		},
	}
	nf.add(cmd)
	return cmd
}

// imageInfo is what image info prints.
type imageInfo struct {
	Image    string      `json:"image"`
	Manifest string      `json:"manifest,omitempty"`
	Size     int64       `json:"device_size"`
	FSType   string      `json:"fs_type"`
	Segments int         `json:"segments"`
	Command  []string    `json:"command,omitempty"`
	Layers   []layerInfo `json:"layers"`
}

type layerInfo struct {
	Name    string `json:"name"`
	Digest  string `json:"digest,omitempty"`
	Size    int64  `json:"size"`
	Decoded int64  `json:"decoded"`
	Codec   string `json:"codec"`
}

func newImageInfo() *cobra.Command {
	var asJSON bool
	cmd := imageCommand("info REF", "Say what an image is made of", 1,
		func(cmd *cobra.Command, im *node.Image, _ []string) error {
			info := imageInfo{
				Image: im.Ref, Manifest: string(im.Manifest), Size: im.Size(), FSType: im.FSType,
				Segments: im.Segments(), Command: im.Command(nil),
			}
			for _, l := range im.Layers() {
				info.Layers = append(info.Layers, layerInfo{l.Name, string(l.Digest), l.Size, l.Decoded, l.Codec})
			}
			if asJSON {
				return printJSON(cmd, info)
			}
			info.print(cmd.OutOrStdout())
			return nil
		})
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (i *imageInfo) print(w io.Writer) {
	fmt.Fprintf(w, "image     %s\n", i.Image)
	if i.Manifest != "" {
		fmt.Fprintf(w, "manifest  %s\n", i.Manifest)
	}
	fmt.Fprintf(w, "device    %s, %s, %d segments\n", size(i.Size), i.FSType, i.Segments)
	if len(i.Command) > 0 {
		fmt.Fprintf(w, "command   %q\n", i.Command)
	}
	for n, l := range i.Layers {
		fmt.Fprintf(w, "layer %-3d %s, %s of %s, %s\n", n, l.Name, size(l.Size), size(l.Decoded), l.Codec)
	}
}

func newImageDump() *cobra.Command {
	return imageCommand("dump REF DST", "Write the flat device, sparse ('-' is standard output)", 2,
		func(cmd *cobra.Command, im *node.Image, a []string) error {
			return writeOut(cmd, a[1], func(w io.Writer) error { return dump(cmd.Context(), w, im) })
		})
}

// dump writes the device to w: only what is mapped where w is a new file, all
// of it otherwise.
func dump(ctx context.Context, w io.Writer, im *node.Image) error {
	f, ok := w.(*os.File)
	if !ok || !canBeSparse(f) {
		return copyRange(ctx, im, 0, im.Size(), writer{w})
	}
	if err := f.Truncate(im.Size()); err != nil {
		return err
	}
	for _, s := range im.Extents(0, im.Size()) {
		if s.Kind != lsmt.Data {
			continue
		}
		if err := copyRange(ctx, im, s.Off, s.Len, holey{f}); err != nil {
			return err
		}
	}
	_, err := f.Seek(im.Size(), io.SeekStart) // for who writes to it next
	return err
}

// canBeSparse tells whether a file, which may be our standard output, is empty
// and can be written at any offset.
func canBeSparse(f *os.File) bool {
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != 0 {
		return false
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	at, seekErr := f.Seek(0, io.SeekCurrent)
	return err == nil && seekErr == nil && flags&unix.O_APPEND == 0 && at == 0
}

// writer writes one piece after the other, whatever their offsets.
type writer struct{ io.Writer }

func (w writer) WriteAt(p []byte, _ int64) (int, error) { return w.Write(p) }

// holey leaves out zeros.
type holey struct{ *os.File }

var zeros [4096]byte

func (h holey) WriteAt(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		part := p[done:min(done+len(zeros), len(p))]
		if !bytes.Equal(part, zeros[:len(part)]) {
			if _, err := h.File.WriteAt(part, off+int64(done)); err != nil {
				return done, err
			}
		}
		done += len(part)
	}
	return len(p), nil
}

// copyRange copies [off, off+n) in order, until ctx ends.
func copyRange(ctx context.Context, r io.ReaderAt, off, n int64, w io.WriterAt) error {
	buf := make([]byte, min(n, 1<<20))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(n, int64(len(buf)))]
		if m, err := r.ReadAt(p, off); m < len(p) {
			return cmp.Or(err, io.ErrUnexpectedEOF)
		}
		if _, err := w.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

func newImageVerify() *cobra.Command {
	return imageCommand("verify REF", "Read all of an image and check every checksum and digest", 1,
		func(cmd *cobra.Command, im *node.Image, _ []string) error {
			if err := im.Verify(cmd.Context()); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: good, %d layers\n", im.Ref, len(im.Layers()))
			return nil
		})
}
