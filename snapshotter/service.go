package snapshotter

import (
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc"
)

// Register has a gRPC server answer for a snapshotter, as a proxy plugin of
// containerd does.
func Register(r grpc.ServiceRegistrar, s snapshots.Snapshotter) {
	snapshotsapi.RegisterSnapshotsServer(r, snapshotservice.FromSnapshotter(s))
}
