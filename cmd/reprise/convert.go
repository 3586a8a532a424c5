package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/zfile"
)

func newConvert() *cobra.Command {
	var (
		nf       nodeFlags
		o        convert.Options
		algo     string
		block    int
		platform string
	)
	cmd := &cobra.Command{
		Use:   "convert SRC DST",
		Short: "Make an overlaybd image from an OCI or Docker image",
		Long: `Make an overlaybd image from an OCI or Docker image. SRC and DST are each a
reference at a registry or an OCI layout, oci:DIR[:TAG]. Layers that were
converted before with the same settings are used again.`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			var err error
			if o.Algo, err = zfile.ParseAlgo(algo); err != nil {
				return usagef(cmd, "--algo: %v", err)
			}
			if o.BlockSize = block << 10; block < 4 || block > 64 || block&(block-1) != 0 {
				return usagef(cmd, "--block %d: one of 4, 8, 16, 32, 64 (KiB)", block)
			}
			if n := o.DeviceSize; n < 1<<20 || n > 16<<40 || n%4096 != 0 {
				return usagef(cmd, "--device-size %d: a multiple of 4096 from %d to %d", n, 1<<20, int64(16<<40))
			}
			if o.Level < 0 || o.Level > 22 || o.Level != 0 && o.Algo == zfile.LZ4 {
				return usagef(cmd, "--level %d: from 1 to 22, and for zstd only", o.Level)
			}
			if platform != "" {
				p, err := platforms.Parse(platform)
				if err != nil {
					return usagef(cmd, "--platform: %v", err)
				}
				o.Platform = &p
			}
			return runConvert(cmd, nf.registry(), a[0], a[1], &o)
		},
	}
	nf.addRegistry(cmd)
	fs := cmd.Flags()
	fs.StringVar(&algo, "algo", "lz4", "compression: lz4 or zstd")
	fs.IntVar(&block, "block", 4, "size of a compressed block, KiB: 4 to 64")
	fs.IntVar(&o.Level, "level", 0, "compression level of zstd (default 3)")
	fs.Int64Var(&o.DeviceSize, "device-size", 64<<30, "size of the block device, bytes; it is sparse")
	fs.StringVar(&platform, "platform", "", "os/arch[/variant] to take from a multi-platform image (default: this machine's)")
	fs.StringVar(&o.CacheDir, "cache-dir", "", "keep converted layers here for later conversions")
	fs.StringVar(&o.Workdir, "work-dir", "", "temporary files (default: the cache directory, or the system's)")
	return cmd
}

func runConvert(cmd *cobra.Command, ro registry.Options, from, to string, o *convert.Options) error {
	client, err := registry.New(&ro)
	if err != nil {
		return err
	}
	defer client.Close()
	src, err := convert.At(from, client)
	if err != nil {
		return err
	}
	dst, err := convert.At(to, client)
	if err != nil {
		return err
	}
	p := newProgress(cmd.ErrOrStderr())
	o.Progress = p.layer
	d, err := convert.Convert(cmd.Context(), src, dst, o)
	p.done()
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", to, d.Digest)
	return nil
}

// progress says what goes on: one line that changes on a terminal, plain lines
// elsewhere.
type progress struct {
	w        io.Writer
	terminal bool
	start    time.Time
	open     bool // the last line has not ended
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(f.Fd())), start: time.Now()}
}

// layer tells of one step of a conversion.
func (p *progress) layer(e convert.Event) {
	what := fmt.Sprintf("layer %d/%d %s", e.Layer+1, e.Layers, e.Stage)
	switch {
	case e.Warning != "":
		p.line(what + ": " + e.Warning)
	case e.Done:
		p.line(fmt.Sprintf("%-22s %s", what, size(e.Bytes)))
	default:
		p.status(what + " …")
	}
}

// line says something that stays.
func (p *progress) line(s string) {
	p.clear()
	fmt.Fprintf(p.w, "%6.1fs  %s\n", time.Since(p.start).Seconds(), s)
}

// status says what goes on now; only a terminal shows it.
func (p *progress) status(s string) {
	if !p.terminal {
		return
	}
	p.clear()
	fmt.Fprintf(p.w, "%6.1fs  %s", time.Since(p.start).Seconds(), s)
	p.open = true
}

func (p *progress) clear() {
	if p.open {
		fmt.Fprint(p.w, "\r", strings.Repeat(" ", 60), "\r")
		p.open = false
	}
}

func (p *progress) done() { p.clear() }
