package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/snapshotter"
)

func newPull() *cobra.Command {
	var (
		f nodeFlags
		o snapshotter.PullOptions
	)
	cmd := &cobra.Command{
		Use:   "pull REF",
		Short: "Pull an image lazily through containerd",
		Long: `Pull an image through containerd, so that it starts with the snapshotter of
'reprise daemon'. Of layers in overlaybd format nothing is fetched: containerd has
the manifest and the config, and a container reads the rest as it needs it. Layers
in other formats are downloaded and unpacked.

containerd has to know the snapshotter; in /etc/containerd/config.toml:

  [proxy_plugins.reprise]
    type = "snapshot"
    address = "/run/reprise/reprise.sock"

'ctr run --snapshotter reprise REF NAME' starts a container then. Kubernetes needs
no 'reprise pull': see the README.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			o.Platform = f.platform
			reg := f.registry()
			c, err := registry.New(&reg)
			if err != nil {
				return err
			}
			defer c.Close()
			im, err := snapshotter.Pull(cmd.Context(), c, a[0], &o)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s@%s\n", im.Name, im.Digest)
			return err
		},
	}
	f.addRegistry(cmd)
	f.addPlatform(cmd)
	fs := cmd.Flags()
	fs.StringVar(&o.Address, "address", "/run/containerd/containerd.sock", "containerd's socket")
	fs.StringVarP(&o.Namespace, "namespace", "n", "default", "containerd's namespace; Kubernetes has k8s.io")
	fs.StringVar(&o.Snapshotter, "snapshotter", snapshotter.DefaultName, "name of the snapshotter in containerd's configuration")
	return cmd
}
