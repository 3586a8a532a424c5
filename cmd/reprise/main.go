// Command reprise records which blocks of a container image a first start
// reads, keeps that trace beside the image, and prefetches along it on every
// later cold start. DESIGN and formats are described in README.md and in the
// packages.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/recorder/container"
)

// Exit status of the command. A container's own status is passed on by run.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	nameProcess()
	container.Init() // does not return where this process is a container's stage
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once; the kernel cleans up
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// nameProcess gives the children that are /proc/self/exe the program's name in
// ps, and in traces, which name who reads.
func nameProcess() {
	const comm = "/proc/self/comm"
	if name, err := os.ReadFile(comm); err == nil && string(name) == "exe\n" {
		_ = os.WriteFile(comm, []byte("reprise"), 0)
	}
}

// run executes one command line and returns its exit status.
func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	fmt.Fprintln(root.ErrOrStderr(), "reprise:", err)
	var usage *usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(root.ErrOrStderr(), "Try '%s --help'.\n", usage.path)
		return exitUsage
	}
	return exitFailed
}

// exitStatus ends the command with a status of its own, without a message.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError is a command line that was wrong.
type usageError struct {
	path string
	err  error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{cmd.CommandPath(), fmt.Errorf(format, args...)}
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "reprise",
		Short:         "Record a container image's first start, replay it at every cold start",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q", args[0])
			}
			return cmd.Help()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{cmd.CommandPath(), err}
	})
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(
		newConvert(), newMount(), newUmount(), newRun(), newRecord(), newAttach(), newPull(),
		newTrace(), newImage(), newBlob(), newDemo(), newSimulate(), newPs(), newSupervise(), newDoctor(), newVersion(),
		newDaemon(), newServe(), newKeep(),
	)
	return root
}

// args makes wrong positional arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &usageError{cmd.CommandPath(), err}
		}
		return nil
	}
}

// group is a command that only has subcommands.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q", args[0])
			}
			return usagef(cmd, "a subcommand is missing")
		},
	}
	cmd.AddCommand(subs...)
	return cmd
}
