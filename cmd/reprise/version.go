package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/tracefmt"
)

// version is set by the linker.
var version = "devel"

// tool is how this program signs what it writes.
func tool() string { return "reprise " + version }

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of the program and of its formats",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "reprise %s %s/%s %s, trace format %d\n",
				version, runtime.GOOS, runtime.GOARCH, runtime.Version(), tracefmt.Version)
			return err
		},
	}
}
