package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

func newBlob() *cobra.Command {
	return group("blob", "One blob or file: wrapper, ZFile, LSMT",
		newBlobInfo(), newBlobUnpack(), newBlobVerify())
}

// blob is an open local blob.
type blob struct {
	f    *os.File
	size int64
	z    *zfile.Reader // nil for a bare file
	raw  *io.SectionReader
	tar  bool
	base int64
}

func openBlob(path string) (*blob, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: is not a file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	b := &blob{f: f}
	if err := b.open(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

func (b *blob) open() error {
	fi, err := b.f.Stat()
	if err != nil {
		return err
	}
	b.size = fi.Size()
	isZ, err := zfile.IsZFile(b.f, b.size)
	if err != nil {
		return err
	}
	off, n, wrapped, err := zfile.Unwrap(b.f, b.size)
	if err != nil {
		return err
	}
	b.base, b.tar = off, wrapped
	if !isZ {
		b.raw = io.NewSectionReader(b.f, off, n)
		return nil
	}
	if b.z, err = zfile.Open(b.f, b.size); err != nil {
		return err
	}
	b.raw = io.NewSectionReader(b.z, 0, b.z.Size())
	return nil
}

// isLSMT tells whether what is inside begins as LSMT files do.
func (b *blob) isLSMT() (bool, error) {
	var magic [8]byte
	if b.raw.Size() < int64(len(magic)) {
		return false, nil
	}
	if _, err := b.raw.ReadAt(magic[:], 0); err != nil {
		return false, err
	}
	return string(magic[:4]) == "LSMT", nil
}

// layer opens what is inside as an LSMT layer; nil if it is something else.
func (b *blob) layer() (*lsmt.Layer, error) {
	is, err := b.isLSMT()
	if err != nil || !is {
		return nil, err
	}
	return lsmt.OpenLayer(b.raw, b.raw.Size())
}

// known refuses what is not a blob at all.
func (b *blob) known() error {
	if b.z != nil {
		return nil
	}
	is, err := b.isLSMT()
	if err == nil && !is {
		err = errors.New("neither a ZFile nor an LSMT file")
	}
	return err
}

// blobInfo is what blob info prints.
type blobInfo struct {
	File    string     `json:"file"`
	Size    int64      `json:"size"`
	Tar     bool       `json:"tar"`
	Base    int64      `json:"base"`
	ZFile   *zfileInfo `json:"zfile,omitempty"`
	Decoded int64      `json:"decoded"`
	LSMT    *lsmtInfo  `json:"lsmt,omitempty"`
}

type zfileInfo struct {
	Algo      string `json:"algo"`
	BlockSize int    `json:"block_size"`
	Verify    bool   `json:"verify"`
	Blocks    int    `json:"blocks"`
	Index     int64  `json:"index_bytes"`
}

type lsmtInfo struct {
	VirtualSize int64  `json:"virtual_size"`
	UUID        string `json:"uuid"`
	ParentUUID  string `json:"parent_uuid"`
	Message     string `json:"message,omitempty"`
	Segments    int    `json:"segments"`
	Mapped      int64  `json:"mapped_bytes"`
	Zeroed      int64  `json:"zeroed_bytes"`
}

func newBlobInfo() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Say what a blob is made of",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			b, err := openBlob(a[0])
			if err != nil {
				return err
			}
			defer b.f.Close()
			info, err := b.info(a[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, info)
			}
			info.print(cmd.OutOrStdout())
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (b *blob) info(name string) (*blobInfo, error) {
	info := &blobInfo{File: name, Size: b.size, Tar: b.tar, Base: b.base, Decoded: b.raw.Size()}
	if b.z != nil {
		i := b.z.Info()
		info.ZFile = &zfileInfo{i.Algo.String(), i.BlockSize, i.Verify, i.Blocks, i.IndexLength}
	}
	l, err := b.layer()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if l != nil {
		info.LSMT = describe(l)
	}
	return info, nil
}

func describe(l *lsmt.Layer) *lsmtInfo {
	d := &lsmtInfo{
		VirtualSize: l.VirtualSize(), UUID: l.UUID(), ParentUUID: l.ParentUUID(),
		Message: l.Message(), Segments: l.Index().Len(),
	}
	for s := range l.Index().All() {
		switch s.Kind {
		case lsmt.Data:
			d.Mapped += s.Len
		case lsmt.Zero:
			d.Zeroed += s.Len
		}
	}
	return d
}

func (i *blobInfo) print(w io.Writer) {
	wrapper := "none"
	if i.Tar {
		wrapper = fmt.Sprintf("tar, content at byte %d", i.Base)
	}
	fmt.Fprintf(w, "blob      %s, %s (%d bytes)\nwrapper   %s\n", i.File, size(i.Size), i.Size, wrapper)
	if z := i.ZFile; z != nil {
		fmt.Fprintf(w, "zfile     %s, %s blocks, %d of them, checksums %s, decodes to %s (%d bytes, ratio %.2f)\n",
			z.Algo, size(int64(z.BlockSize)), z.Blocks, onOff(z.Verify), size(i.Decoded), i.Decoded, ratio(i.Size, i.Decoded))
	} else {
		fmt.Fprintf(w, "zfile     no: not compressed\n")
	}
	if l := i.LSMT; l != nil {
		fmt.Fprintf(w, "lsmt      device of %s, %d segments, %s of data, %s zeroed\nuuid      %s, parent %s\n",
			size(l.VirtualSize), l.Segments, size(l.Mapped), size(l.Zeroed), l.UUID, l.ParentUUID)
		if l.Message != "" {
			fmt.Fprintf(w, "message   %q\n", l.Message)
		}
	} else {
		fmt.Fprintf(w, "lsmt      no: some other file\n")
	}
}

func newBlobUnpack() *cobra.Command {
	return &cobra.Command{
		Use:   "unpack SRC DST",
		Short: "Write what the ZFile in SRC decodes to ('-' is standard output)",
		Args:  args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			b, err := openBlob(a[0])
			if err != nil {
				return err
			}
			defer b.f.Close()
			if err := b.known(); err != nil {
				return fmt.Errorf("unpack %s: %w", a[0], err)
			}
			return writeOut(cmd, a[1], func(w io.Writer) error {
				if err := copyRange(cmd.Context(), b.raw, 0, b.raw.Size(), writer{w}); err != nil {
					return fmt.Errorf("unpack %s: %w", a[0], err)
				}
				return nil
			})
		},
	}
}

func newBlobVerify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify FILE",
		Short: "Check every checksum and structure of a blob",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			b, err := openBlob(a[0])
			if err != nil {
				return err
			}
			defer b.f.Close()
			if err := b.known(); err != nil {
				return fmt.Errorf("verify %s: %w", a[0], err)
			}
			if b.z != nil {
				if err := b.z.Verify(cmd.Context()); err != nil {
					return fmt.Errorf("%s: %w", a[0], err)
				}
			}
			if _, err := b.layer(); err != nil {
				return fmt.Errorf("%s: %w", a[0], err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: good\n", a[0])
			return nil
		},
	}
}
