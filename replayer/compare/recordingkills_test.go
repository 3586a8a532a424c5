package compare

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

// longestNaming is about how long files are looked for after a recording.
const longestNaming = 2 * time.Second

// kills kills the recorder of a real image at random moments after the end of the
// recording, while files are looked for: the trace is complete, and nothing but
// files is left behind. Moments before that are TestRecordKills' of cmd/reprise.
func (b *coldBench) kills() {
	_, srv, err := b.site.behind(b.ctx, b.links[0])
	require.NoError(b.t, err)
	defer srv.Close()
	for _, name := range b.images {
		for range b.count(5) {
			b.killAfter(srv.Addr, name, time.Duration(rand.Int64N(int64(longestNaming))))
		}
	}
}

func (b *coldBench) killAfter(addr, name string, moment time.Duration) {
	dir, err := os.MkdirTemp(b.site.dir, "kills-")
	require.NoError(b.t, err)
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "trace")
	cmd := exec.CommandContext(b.ctx, b.site.program, "record", "--root", filepath.Join(dir, "root"), "--net", "own", "-o", file, addr+"/"+repository(name))
	require.NoError(b.t, cmd.Start())
	ended := func() bool {
		t, err := tracefmt.Open(file)
		return err == nil && t.End != nil
	}
	b.until("the recording is over", ended)
	time.Sleep(moment) // it is what the experiment is about
	_ = cmd.Process.Kill()
	how := "killed"
	if cmd.Wait() == nil {
		how = "ended before it was killed"
	}
	var left []string
	b.until("all goes but files", func() bool {
		left = leftOf(dir, addr)
		return len(left) == 0
	})
	require.True(b.t, ended(), "the trace is not complete")
	entries, err := os.ReadDir(dir)
	require.NoError(b.t, err)
	b.say("%s, %v after the end: %s; nothing is left but files: %v", name, moment.Round(time.Millisecond), how, entries)
}

// until waits for what comes by itself.
func (b *coldBench) until(what string, is func() bool) {
	for deadline := time.Now().Add(recordTime); !is(); time.Sleep(10 * time.Millisecond) {
		require.NoError(b.t, b.ctx.Err())
		require.True(b.t, time.Now().Before(deadline), "in vain: %s", what)
	}
}

// leftOf lists the processes and mounts that have to do with a directory, and
// the loop devices of images at a registry.
func leftOf(dir, addr string) (left []string) {
	look := func(pattern, part string) {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			if p, err := os.ReadFile(name); err == nil && bytes.Contains(p, []byte(part)) {
				left = append(left, name)
			}
		}
	}
	look("/proc/[0-9]*/cmdline", dir)
	look("/sys/block/loop*/loop/backing_file", addr)
	look(fmt.Sprintf("/proc/%d/mounts", os.Getpid()), dir)
	return left
}
