package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/reprise-project/reprise/backstore/registry"
)

// Chains tells which chains there are, as a [Snapshotter] does.
type Chains interface {
	List(ctx context.Context) ([]ChainInfo, error)
}

// An ImageService is the image service of Kubernetes' CRI: containerd's own, which
// gets every call as it is. Of a pull it takes the image pull secret, for the
// registry has to be asked again when the image is read. A secret that is good is
// kept as long as a chain of its repository is on the node, and replaced by the
// next pull's; a pull without one changes nothing. Kubelet has it with
// --image-service-endpoint. Safe for concurrent use.
type ImageService struct {
	cri.UnimplementedImageServiceServer
	conn    *grpc.ClientConn
	images  cri.ImageServiceClient // containerd's
	secrets *Secrets
	chains  Chains
	log     *slog.Logger
	closed  atomic.Bool
}

var _ cri.ImageServiceServer = (*ImageService)(nil)

const (
	// maxImageList bounds an answer of containerd, in bytes: kubelet takes as much.
	maxImageList = 16 << 20
	// reconnectTime is how long containerd is left alone when it could not be
	// reached.
	reconnectTime = 3 * time.Second
)

// NewImageService serves for the containerd at a unix socket, which need not be
// there yet. It keeps those of the secrets that the chains need. [ImageService.Close]
// it.
func NewImageService(ctx context.Context, socket string, secrets *Secrets, chains Chains, log *slog.Logger) (*ImageService, error) {
	wait := backoff.DefaultConfig
	wait.MaxDelay = reconnectTime
	s := &ImageService{secrets: secrets, chains: chains, log: log}
	var err error
	s.conn, err = grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: wait}),
		grpc.WithUnaryInterceptor(s.call),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxImageList)))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", socket, err)
	}
	s.images = cri.NewImageServiceClient(s.conn)
	s.tidy(ctx)
	return s, nil
}

// Register has a gRPC server answer for the service.
func (s *ImageService) Register(r grpc.ServiceRegistrar) { cri.RegisterImageServiceServer(r, s) }

// Close ends the connection to containerd. Calls under way, and those that come
// still, get an error that says to try again.
func (s *ImageService) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	return s.conn.Close()
}

// call makes the end of the connection that Close is an error that passes.
func (s *ImageService) call(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, conn, opts...)
	if err != nil && s.closed.Load() && ctx.Err() == nil {
		return status.Error(codes.Unavailable, "the daemon is being ended or replaced: try again")
	}
	return err
}

// PullImage implements [cri.ImageServiceServer]. The secret may be used before it
// returns: containerd has the snapshots made meanwhile.
func (s *ImageService) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	ref, err := reference.ParseDockerRef(r.GetImage().GetImage())
	secret := secretOf(r.GetAuth())
	if err != nil || secret == nil { // what is wrong with the name containerd says
		return s.images.PullImage(passOn(ctx), r)
	}
	end := s.secrets.offer(ref.Name(), secret)
	resp, err := s.images.PullImage(passOn(ctx), r)
	end(err == nil && s.needs(context.WithoutCancel(ctx), ref.Name()))
	return resp, err
}

// RemoveImage implements [cri.ImageServiceServer].
func (s *ImageService) RemoveImage(ctx context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	resp, err := s.images.RemoveImage(passOn(ctx), r)
	if err == nil {
		s.tidy(context.WithoutCancel(ctx))
	}
	return resp, err
}

// ListImages implements [cri.ImageServiceServer].
func (s *ImageService) ListImages(ctx context.Context, r *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	return s.images.ListImages(passOn(ctx), r)
}

// ImageStatus implements [cri.ImageServiceServer].
func (s *ImageService) ImageStatus(ctx context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	return s.images.ImageStatus(passOn(ctx), r)
}

// ImageFsInfo implements [cri.ImageServiceServer].
func (s *ImageService) ImageFsInfo(ctx context.Context, r *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return s.images.ImageFsInfo(passOn(ctx), r)
}

// StreamImages implements [cri.ImageServiceServer].
func (s *ImageService) StreamImages(r *cri.StreamImagesRequest, to grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	from, err := s.images.StreamImages(passOn(to.Context()), r)
	if err != nil {
		return err
	}
	for {
		resp, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = to.Send(resp)
		}
		if err != nil {
			return err
		}
	}
}

// passOn is the context of a call to containerd: what came with kubelet's, such as
// its trace, goes along.
func passOn(ctx context.Context) context.Context {
	in, _ := metadata.FromIncomingContext(ctx)
	out := metadata.MD{}
	for k, v := range in {
		if !strings.HasPrefix(k, ":") && !strings.HasPrefix(k, "grpc-") {
			out[k] = v
		}
	}
	return metadata.NewOutgoingContext(ctx, out)
}

// needs tells whether a chain is of the repository.
func (s *ImageService) needs(ctx context.Context, repository string) bool {
	all, err := s.repositories(ctx)
	return err != nil || all[repository]
}

// tidy forgets the secrets that no chain needs.
func (s *ImageService) tidy(ctx context.Context) {
	known := s.secrets.known() // before the chains: those of a pull come before its secret
	if len(known) == 0 {
		return
	}
	needed, err := s.repositories(ctx)
	if err != nil {
		s.log.Warn("image pull secrets of images that are gone are kept for now", "err", err)
		return
	}
	s.secrets.drop(known, needed)
}

// repositories are those of the chains.
func (s *ImageService) repositories(ctx context.Context) (map[string]bool, error) {
	list, err := s.chains.List(ctx)
	if err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(list))
	for _, c := range list {
		if r, err := registry.ParseReference(c.Ref); err == nil {
			names[r.Name()] = true
		}
	}
	return names, nil
}

// refusedPull says what to do about a registry that does not give its image: an
// image pull secret of kubelet's may be why containerd could pull it.
func refusedPull(err error) error {
	if !errdefs.IsUnauthorized(err) && !errdefs.IsPermissionDenied(err) {
		return err
	}
	return fmt.Errorf("%w; secrets of pods are known where kubelet has --image-service-endpoint, the socket of this daemon", err)
}
