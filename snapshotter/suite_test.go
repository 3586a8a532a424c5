package snapshotter

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/reprise-project/reprise/replayer/node"
)

// noDevices is a server that is never asked.
type noDevices struct{ node.Devices }

func (noDevices) Release(context.Context, string, bool) error { return nil }

// TestSuite is containerd's own, over the socket of a proxy plugin.
func TestSuite(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	// The suite knows by this name that overlayfs does not rename directories of lower layers.
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := New(ctx, root, noDevices{}, nil)
		if err != nil {
			return nil, nil, err
		}
		dir, err := os.MkdirTemp("", "plugin") // sockets have short paths
		if err != nil {
			return nil, nil, err
		}
		l, err := net.Listen("unix", filepath.Join(dir, "s"))
		if err != nil {
			return nil, nil, err
		}
		server := grpc.NewServer()
		Register(server, s)
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "reprise")
		return client, func() error {
			err := conn.Close()
			server.Stop()
			return errors.Join(err, <-served, s.Close(), os.RemoveAll(dir))
		}, nil
	})
}
