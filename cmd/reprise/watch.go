package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/replayer/node"
)

// A mount whose server was killed answers nothing but errors, for ever. So each
// server has a watcher: this program once more, in a session of its own, that
// reads from a pipe which the server alone can write to. The server says
// goodbye when all is well; an end without a goodbye is a kill, and the watcher
// unmounts.

// watchName is the hidden command of the watcher.
const watchName = "watch-mount"

// reapTime bounds how long a killed server may take to be gone.
const reapTime = time.Minute

// startWatch starts the watcher of a mount that this process is going to serve.
// goodbye ends it.
func startWatch(root string, m node.MountState) (goodbye func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", watchName, "--", root, m.Dir, strconv.Itoa(m.Pid))
	cmd.Args[0] = "reprise"
	cmd.Dir = "/"
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("start the mount's watcher: %w", err)
	}
	waited := make(chan struct{})
	go func() { // also when it is killed: no zombie stays
		defer close(waited)
		_ = cmd.Wait()
	}()
	return func() {
		_, _ = io.WriteString(w, "goodbye")
		_ = w.Close()
		<-waited
	}, nil
}

func newWatch() *cobra.Command {
	return &cobra.Command{
		Use:    watchName + " ROOT DIR PID",
		Short:  "Unmount what a killed server leaves",
		Hidden: true,
		Args:   args(cobra.ExactArgs(3)),
		RunE: func(_ *cobra.Command, a []string) error {
			pid, err := strconv.Atoi(a[2])
			if err != nil {
				return err
			}
			said, err := io.ReadAll(os.Stdin)
			if err != nil || len(said) > 0 {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), reapTime)
			defer cancel()
			return node.Reap(ctx, a[0], a[1], pid)
		},
	}
}
