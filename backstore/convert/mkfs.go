package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// fsUUID is the UUID and the directory hash seed of every file system that is
// made here. Only ext4 is: it does not mind two mounts with the same UUID.
const fsUUID = "7265706c-6179-4e00-8000-657874340001"

// The file system. Every feature is named, so that neither the version nor the
// configuration of mke2fs decides:
//
//   - No journal. Layers are read-only once they are made.
//   - uninit_bg, so that the tables of unused groups are neither written nor
//     read; no metadata_csum, as the reference has it: its checksums cover the
//     random inode generations and would make every layer different.
//   - sparse_super2 without backup superblocks, which nobody would ever use
//     and which cost half a megabyte at 64 GiB.
//   - flex_bg with 512 groups, which is 64 GiB: with the usual 16 the kernel
//     spreads directories over the device; this way all inodes are together
//     and all data follow (300 MB of /usr: 9 extents instead of 44).
const fsFeatures = "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg," +
	"huge_file,large_file,sparse_super2,uninit_bg"

// mkfsArgs are the arguments for dev. prezeroed is an extended option that
// e2fsprogs has from 1.46.6 on: it marks the inode tables as zeroed without
// writing them.
func mkfsArgs(dev string, prezeroed bool) []string {
	ext := "nodiscard,num_backup_sb=0,hash_seed=" + fsUUID
	if prezeroed {
		ext += ",lazy_itable_init=0,assume_storage_prezeroed=1"
	} else {
		ext += ",lazy_itable_init=1"
	}
	return []string{
		"-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-G", "512",
		"-O", fsFeatures, "-E", ext, "-U", fsUUID, dev,
	}
}

// mkfs makes the file system of an image on a device that reads as zeros.
func mkfs(ctx context.Context, dev string) error {
	tool, err := findTool("mkfs.ext4", "e2fsprogs")
	if err != nil {
		return err
	}
	err = runMkfs(ctx, tool, mkfsArgs(dev, true))
	if err != nil && strings.Contains(err.Error(), "assume_storage_prezeroed") {
		err = runMkfs(ctx, tool, mkfsArgs(dev, false))
	}
	return err
}

func runMkfs(ctx context.Context, tool string, args []string) error {
	runtime.LockOSThread() // see childCommand
	defer runtime.UnlockOSThread()
	cmd := childCommand(ctx, tool, args...)
	// Time 0 would mean now.
	cmd.Env = append(os.Environ(), "MKE2FS_CONFIG=/dev/null", "E2FSPROGS_FAKE_TIME=1", "LC_ALL=C")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, strings.TrimSpace(out.String()))
	}
	return nil
}

// findTool looks in PATH and in the directories of system tools, which the
// PATH of a user may lack.
func findTool(name, pkg string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	} else if !errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: not found: install %s", name, pkg)
}
