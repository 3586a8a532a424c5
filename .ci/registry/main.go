// Command registry is distribution's registry, of which the project's tests start
// one of their own: registry serve CONFIG. It has a module of its own, so that
// what it needs is not in the program's.
package main

import (
	"os"

	"github.com/distribution/distribution/v3/registry"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

func main() {
	if registry.RootCmd.Execute() != nil {
		os.Exit(1)
	}
}
