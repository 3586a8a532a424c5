package snapshotter

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/reprise-project/reprise/backstore/registry"
)

// imageServer is the image service behind the one under test.
type imageServer struct {
	cri.UnimplementedImageServiceServer
	pull func() error // called in the middle of a pull

	mu   sync.Mutex // guards what follows
	got  []proto.Message
	meta metadata.MD
}

// called notes a request, and answers as the server for calls of its kind does.
func called[T any](ctx context.Context, s *imageServer, r proto.Message, resp T) (T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, r)
	s.meta, _ = metadata.FromIncomingContext(ctx)
	return resp, nil
}

func (s *imageServer) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	if err := s.pull(); err != nil {
		return nil, err
	}
	return called(ctx, s, r, &cri.PullImageResponse{ImageRef: "pulled"})
}

func (s *imageServer) RemoveImage(ctx context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	return called(ctx, s, r, &cri.RemoveImageResponse{})
}

func (s *imageServer) ListImages(ctx context.Context, r *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	long := make([]*cri.Image, 50_000) // more than gRPC's usual 4 MiB
	for i := range long {
		long[i] = &cri.Image{Id: "sha256:" + string(bytes.Repeat([]byte{'a'}, 100))}
	}
	return called(ctx, s, r, &cri.ListImagesResponse{Images: long})
}

func (s *imageServer) ImageStatus(ctx context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	return called(ctx, s, r, &cri.ImageStatusResponse{Info: map[string]string{"a": "b"}})
}

func (s *imageServer) ImageFsInfo(ctx context.Context, r *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	return called(ctx, s, r, &cri.ImageFsInfoResponse{ImageFilesystems: []*cri.FilesystemUsage{{Timestamp: 7}}})
}

func (s *imageServer) StreamImages(r *cri.StreamImagesRequest, to grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	for _, id := range []string{"one", "two"} {
		if err := to.Send(&cri.StreamImagesResponse{Images: []*cri.Image{{Id: id}}}); err != nil {
			return err
		}
	}
	_, err := called(to.Context(), s, r, struct{}{})
	return err
}

// refs are chains of these images.
type refs struct {
	mu  sync.Mutex // guards what follows
	of  []string
	err error
}

func (c *refs) set(of ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of = of
}

func (c *refs) List(context.Context) (list []ChainInfo, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.of {
		list = append(list, ChainInfo{Ref: r})
	}
	return list, c.err
}

// listen serves on a socket until the test ends, and gives its path.
func listen(t *testing.T, s *grpc.Server) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cri") // sockets have short paths
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		require.NoError(t, <-served)
	})
	return l.Addr().String()
}

// A criBench is an image service under test between its caller and another one.
type criBench struct {
	behind  *imageServer
	front   *ImageService
	chains  *refs
	path    string // of the secrets
	log     *bytes.Buffer
	secrets *Secrets
	cri.ImageServiceClient
}

func newCRI(t *testing.T) *criBench {
	t.Helper()
	b := &criBench{behind: &imageServer{pull: func() error { return nil }}, chains: &refs{}, log: &bytes.Buffer{}}
	b.path = filepath.Join(t.TempDir(), "secrets.json")
	log := slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	behind := grpc.NewServer()
	cri.RegisterImageServiceServer(behind, b.behind)
	b.secrets = OpenSecrets(b.path, log)
	var err error
	b.front, err = NewImageService(t.Context(), listen(t, behind), b.secrets, b.chains, log)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.front.Close()) })
	front := grpc.NewServer()
	b.front.Register(front)
	conn, err := grpc.NewClient("unix:"+listen(t, front), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxImageList)))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	b.ImageServiceClient = cri.NewImageServiceClient(conn)
	return b
}

// passwords are what there is for a repository.
func (b *criBench) passwords(repository string) (list []string) {
	for _, c := range b.secrets.Credentials(repository, "r.test") {
		list = append(list, c.Password)
	}
	return list
}

// saved are what a daemon that is started now knows.
func (b *criBench) saved(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for repository, v := range OpenSecrets(b.path, slog.New(slog.DiscardHandler)).known() {
		found[repository] = v.cred.Password
	}
	return found
}

func pullOf(ref, password string) *cri.PullImageRequest {
	return &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: &cri.AuthConfig{Username: "me", Password: password}}
}

// Every call gets to the service behind as it is, and so does the answer.
func TestImageServicePasses(t *testing.T) {
	b := newCRI(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-11-22-01")
	check := func(want proto.Message, err error) {
		t.Helper()
		require.NoError(t, err)
		require.Len(t, b.behind.got, 1)
		require.True(t, proto.Equal(want, b.behind.got[0]), "%v", b.behind.got[0])
		require.Equal(t, []string{"00-11-22-01"}, b.behind.meta.Get("traceparent"))
		b.behind.got, b.behind.meta = nil, nil
	}
	pull := pullOf("r.test/a/b:c", "word")
	pull.SandboxConfig = &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "pod"}}
	pull.Image.Annotations = map[string]string{"a": "b"}
	unknown := []byte{0xfa, 0x3f, 0x01, 'x'} // a field of a version to come
	pull.ProtoReflect().SetUnknown(unknown)
	pulled, err := b.PullImage(ctx, pull)
	check(pull, err)
	require.Equal(t, "pulled", pulled.ImageRef)
	remove := &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: "x"}}
	_, err = b.RemoveImage(ctx, remove)
	check(remove, err)
	list := &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: "y"}}}
	listed, err := b.ListImages(ctx, list)
	check(list, err)
	require.Len(t, listed.Images, 50_000)
	st := &cri.ImageStatusRequest{Verbose: true}
	status, err := b.ImageStatus(ctx, st)
	check(st, err)
	require.Equal(t, "b", status.Info["a"])
	info, err := b.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	check(&cri.ImageFsInfoRequest{}, err)
	require.EqualValues(t, 7, info.ImageFilesystems[0].Timestamp)
	stream, err := b.StreamImages(ctx, &cri.StreamImagesRequest{})
	require.NoError(t, err)
	for _, id := range []string{"one", "two"} {
		some, err := stream.Recv()
		require.NoError(t, err)
		require.Equal(t, id, some.Images[0].Id)
	}
	_, err = stream.Recv()
	require.Error(t, err)
	check(&cri.StreamImagesRequest{}, nil)
}

func TestImageServiceErrors(t *testing.T) {
	b := newCRI(t)
	b.behind.pull = func() error { return status.Error(codes.NotFound, "no such image") }
	for _, r := range []*cri.PullImageRequest{pullOf("r.test/a", "word"), pullOf("not a name", "word"), {}} {
		_, err := b.PullImage(t.Context(), r)
		require.Equal(t, codes.NotFound, status.Code(err))
		require.ErrorContains(t, err, "no such image")
	}
	s, err := NewImageService(t.Context(), filepath.Join(t.TempDir(), "none"), b.secrets, b.chains, slog.Default())
	require.NoError(t, err, "containerd need not be there")
	_, err = s.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.NoError(t, s.Close())
}

// A pull ends with the service.
func TestImageServiceClose(t *testing.T) {
	b := newCRI(t)
	pulling, end := make(chan struct{}), make(chan struct{})
	b.behind.pull = func() error {
		close(pulling)
		<-end
		return nil
	}
	t.Cleanup(sync.OnceFunc(func() { close(end) }))
	pulled := make(chan error, 1)
	go func() {
		_, err := b.PullImage(t.Context(), pullOf("r.test/a", "word"))
		pulled <- err
	}()
	<-pulling
	require.Len(t, b.passwords("r.test/a"), 1)
	require.NoError(t, b.front.Close())
	require.Equal(t, codes.Unavailable, status.Code(<-pulled))
	require.Empty(t, b.passwords("r.test/a"))
	_, err := b.ImageStatus(t.Context(), &cri.ImageStatusRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.ErrorContains(t, err, "try again")
}

// A secret is used from when a pull begins, and stays if it was good and there is
// something to read with it.
func TestImageServiceSecrets(t *testing.T) {
	b := newCRI(t)
	const repository = "r.test/a/b"
	var during []string
	b.behind.pull = func() error {
		during = b.passwords(repository)
		return nil
	}
	pull := func(password string) {
		t.Helper()
		_, err := b.PullImage(t.Context(), pullOf(repository+":c", password))
		require.NoError(t, err)
	}

	pull("ordinary")
	require.Equal(t, []string{"ordinary"}, during)
	require.Empty(t, b.passwords(repository), "nothing is read lazily")
	require.NoFileExists(t, b.path)

	b.chains.set(repository + "@sha256:0000000000000000000000000000000000000000000000000000000000000000")
	pull("first")
	require.Equal(t, []string{"first"}, during)
	require.Equal(t, []string{"first"}, b.passwords(repository))
	require.Equal(t, map[string]string{repository: "first"}, b.saved(t))
	fi, err := os.Stat(b.path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode())

	pull("second")
	require.Equal(t, []string{"first", "second"}, during)
	require.Equal(t, []string{"second"}, b.passwords(repository), "renewed")
	require.Equal(t, map[string]string{repository: "second"}, b.saved(t))

	b.behind.pull = func() error { return errors.New("refused") }
	_, err = b.PullImage(t.Context(), pullOf(repository, "bad"))
	require.Error(t, err)
	b.behind.pull = func() error { return nil }
	_, err = b.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: repository}})
	require.NoError(t, err, "somebody without a secret")
	require.Equal(t, []string{"second"}, b.passwords(repository))
	require.Empty(t, b.passwords("r.test/a"), "it is no other repository's")

	// Names are short, too.
	b.chains.set(repository, "docker.io/library/nginx@sha256:0000000000000000000000000000000000000000000000000000000000000000")
	_, err = b.PullImage(t.Context(), pullOf("nginx", "hub"))
	require.NoError(t, err)
	require.Equal(t, map[string]string{repository: "second", "docker.io/library/nginx": "hub"}, b.saved(t))

	// While the chains are not known, nothing is forgotten.
	b.chains.err = errors.New("no database")
	remove := &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: repository}}
	_, err = b.RemoveImage(t.Context(), remove)
	require.NoError(t, err)
	require.Equal(t, []string{"second"}, b.passwords(repository))
	b.chains.err = nil
	_, err = b.RemoveImage(t.Context(), remove)
	require.NoError(t, err)
	require.Equal(t, []string{"second"}, b.passwords(repository), "a container may still be there")
	b.chains.set("r.test/other")
	_, err = b.RemoveImage(t.Context(), remove)
	require.NoError(t, err)
	require.Empty(t, b.passwords(repository))
	require.Empty(t, b.saved(t))
	for _, word := range []string{"ordinary", "first", "second", "bad"} {
		require.NotContains(t, b.log.String(), word)
	}
}

func TestSecretOf(t *testing.T) {
	encoded := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for _, c := range []struct {
		auth           *cri.AuthConfig
		user, password string
		none           bool
		host           string // "r.test" by default
	}{
		{auth: nil, none: true},
		{auth: &cri.AuthConfig{}, none: true},
		{auth: &cri.AuthConfig{RegistryToken: "x"}, none: true},
		{auth: &cri.AuthConfig{Username: "me", Password: "word", IdentityToken: "x"}, user: "me", password: "word"},
		{auth: &cri.AuthConfig{IdentityToken: "token"}, password: "token"},
		{auth: &cri.AuthConfig{Auth: encoded("me:a:b")}, user: "me", password: "a:b"},
		{auth: &cri.AuthConfig{Auth: encoded("me:word\x00\x00")}, user: "me", password: "word"},
		{auth: &cri.AuthConfig{Auth: encoded("me")}, none: true},
		{auth: &cri.AuthConfig{Auth: "%"}, none: true},
		{auth: &cri.AuthConfig{Username: "me", ServerAddress: "https://r.test/v2/"}, user: "me"},
		{auth: &cri.AuthConfig{Username: "me", ServerAddress: "r.test"}, user: "me"},
		{auth: &cri.AuthConfig{Username: "me", ServerAddress: "127.0.0.1:5000"}, user: "me", host: "127.0.0.1:5000"},
		{auth: &cri.AuthConfig{Username: "me", ServerAddress: "https://index.docker.io/v1/"}, user: "me", host: "registry-1.docker.io"},
		{auth: &cri.AuthConfig{Username: "me", ServerAddress: "https://other.test"}, none: true},
	} {
		if c.host == "" {
			c.host = "r.test"
		}
		s := secretOf(c.auth)
		if c.none {
			require.True(t, s == nil || !s.isFor(c.host), "%v", c.auth)
			continue
		}
		require.NotNil(t, s, "%v", c.auth)
		require.True(t, s.isFor(c.host), "%v", c.auth)
		require.True(t, s.cred == registry.Credential{Username: c.user, Password: c.password}, "%v", c.auth)
	}
}

// A file that is not good holds up nobody, and is not shown.
func TestSecretsFile(t *testing.T) {
	for _, content := range []string{"", "{", `{"version":1,"secrets":"hidden"}`, `{"version":2,"secrets":{"r.test/a":{"password":"hidden"}}}`} {
		path := filepath.Join(t.TempDir(), "secrets.json")
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
		require.NoError(t, os.WriteFile(path+".new", []byte("half"), 0o644)) // of a daemon that was killed
		var log bytes.Buffer
		s := OpenSecrets(path, slog.New(slog.NewTextHandler(&log, nil)))
		require.Contains(t, log.String(), path)
		require.NotContains(t, log.String(), "hidden")
		s.offer("r.test/a", &secret{cred: registry.Credential{Username: "me", Password: "word"}})(true)
		again := OpenSecrets(path, slog.New(slog.DiscardHandler))
		require.Len(t, again.Credentials("r.test/a", "r.test"), 1)
		fi, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), fi.Mode())
		require.NoFileExists(t, path+".new")
	}
	var log bytes.Buffer
	s := OpenSecrets(filepath.Join(t.TempDir(), "none", "secrets.json"), slog.New(slog.NewTextHandler(&log, nil)))
	s.offer("r.test/a", &secret{cred: registry.Credential{Username: "me", Password: "word"}})(true)
	require.Contains(t, log.String(), "would not survive")
	require.Len(t, s.Credentials("r.test/a", "r.test"), 1)
}

// Many pulls at once, some of them of the same repository.
func TestSecretsAtOnce(t *testing.T) {
	s := OpenSecrets(filepath.Join(t.TempDir(), "secrets.json"), slog.Default())
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			repository := "r.test/" + string(rune('a'+i%5))
			end := s.offer(repository, &secret{cred: registry.Credential{Username: "me", Password: string(rune('a' + i))}})
			require.NotEmpty(t, s.Credentials(repository, "r.test"))
			end(i%2 == 0)
			s.drop(s.known(), map[string]bool{"r.test/a": true, "r.test/b": true, "r.test/c": true})
		})
	}
	wg.Wait()
	require.Empty(t, s.offered)
	require.Len(t, OpenSecrets(s.path, slog.Default()).good, 3)
}
