package main

import (
	_ "embed" // the unit
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// packagedUnit is the daemon's unit as packages have it, with the program at
// unitProgram. systemd.service(5), systemd.kill(5).
//
//go:embed deploy/reprise.service
var packagedUnit string

const unitProgram = "/usr/bin/reprise"

// unitOf is the unit of a program somewhere else; systemd.syntax(7) has the
// quotes.
func unitOf(program string) string {
	if strings.ContainsAny(program, " \t\"'\\") {
		program = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(program) + `"`
	}
	program = strings.ReplaceAll(program, "%", "%%") // no specifiers
	return strings.Replace(packagedUnit, "ExecStart="+unitProgram+" ", "ExecStart="+program+" ", 1)
}

func newUnit() *cobra.Command {
	return &cobra.Command{
		Use:   "unit",
		Short: "Print a systemd unit for the daemon",
		Long: `Print a systemd unit for the daemon, with this program:

  reprise daemon unit > /etc/systemd/system/reprise.service
  systemctl daemon-reload && systemctl enable --now reprise

'reprise daemon install' does the same, and copies the program.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), unitOf(self()))
			return err
		},
	}
}
