package main

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/reprise-project/reprise/snapshotter"
)

// addContainerd adds what the daemon needs to know of the containerd that it serves.
func (f *nodeFlags) addContainerd(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.containerd, "containerd", "/run/containerd/containerd.sock", "containerd's socket, which the CRI's image service is passed on to; empty for none")
}

// secretsPath is where the daemon of a state directory keeps image pull secrets.
func secretsPath(root string) string { return filepath.Join(root, "secrets.json") }

// openSecrets has the node ask registries with the image pull secrets, too, that
// kubelet has pulled with. It comes before [nodeFlags.open].
func (f *nodeFlags) openSecrets(root string, log *slog.Logger) *snapshotter.Secrets {
	s := snapshotter.OpenSecrets(secretsPath(root), log)
	f.credentials = s.Credentials
	return s
}

// serveImages has r answer for the CRI's image service, if there is a containerd to
// pass it on to. Call the end after r's.
func (f *nodeFlags) serveImages(ctx context.Context, r grpc.ServiceRegistrar, secrets *snapshotter.Secrets, sn *snapshotter.Snapshotter, log *slog.Logger) (end func(), err error) {
	if f.containerd == "" {
		return func() {}, nil
	}
	images, err := snapshotter.NewImageService(ctx, f.containerd, secrets, sn, log)
	if err != nil {
		return nil, err
	}
	images.Register(r)
	return func() { _ = images.Close() }, nil
}
