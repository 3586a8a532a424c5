package regtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// RegistryOptions of NewRegistry.
type RegistryOptions struct {
	// Dir is where blobs are kept. It is made where it is missing. Required.
	Dir string
	// NoReferrers leaves the Referrers API out, so that clients have to use
	// the fallback tag.
	NoReferrers bool
}

// maxManifest bounds what is read of a manifest, in bytes.
const maxManifest = 8 << 20

// A Registry is an embedded registry: go-containerregistry's, with the blobs in
// files and the manifests in memory. It holds no blob in memory: uploads, which
// the library would collect there, one at a time, are spooled to a file or
// passed through. It needs no closing.
type Registry struct {
	inner   http.Handler
	blobs   *blobs
	uploads uploads
	noRefs  bool
}

// NewRegistry makes a registry without manifests; blobs that Dir holds are
// there.
func NewRegistry(o *RegistryOptions) (*Registry, error) {
	if o == nil || o.Dir == "" {
		return nil, errors.New("registry: no directory for its blobs")
	}
	b := &blobs{dir: filepath.Join(o.Dir, "blobs"), tmp: filepath.Join(o.Dir, "uploads")}
	if err := os.RemoveAll(b.tmp); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	for _, dir := range []string{b.dir, b.tmp} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
	}
	return &Registry{
		inner: registry.New(
			registry.WithBlobHandler(b),
			registry.WithReferrersSupport(!o.NoReferrers),
			registry.Logger(stdlog.New(io.Discard, "", 0)),
		),
		blobs:   b,
		uploads: uploads{dir: b.tmp},
		noRefs:  o.NoReferrers,
	}, nil
}

func (g *Registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	repo, what, name := splitPath(r.URL.Path)
	switch {
	case what == "uploads":
		g.upload(w, r, repo, name)
	case what == "blobs":
		g.inner.ServeHTTP(w, r)
	case what == "referrers" && !g.noRefs && r.Method == http.MethodGet:
		g.referrers(w, r, repo)
	default:
		// The library holds its lock while it writes an answer, which may be
		// to a slow client.
		r.Body = http.MaxBytesReader(w, r.Body, maxManifest)
		g.ask(r).copyTo(w)
	}
}

// splitPath reads /v2/REPO/WHAT/NAME, with "uploads" for blobs/uploads.
func splitPath(path string) (repo, what, name string) {
	parts := strings.Split(strings.TrimPrefix(path, "/v2/"), "/")
	n := len(parts)
	switch {
	case n >= 4 && parts[n-3] == "blobs" && parts[n-2] == "uploads":
		return strings.Join(parts[:n-3], "/"), "uploads", parts[n-1]
	case n >= 3 && parts[n-2] == "blobs" && parts[n-1] == "uploads":
		return strings.Join(parts[:n-2], "/"), "uploads", ""
	case n >= 3:
		return strings.Join(parts[:n-2], "/"), parts[n-2], parts[n-1]
	}
	return "", "", ""
}

// has says whether there is such a blob.
func (g *Registry) has(dgst string) bool {
	h, err := v1.NewHash(dgst)
	if err != nil {
		return false
	}
	_, err = g.blobs.Stat(context.Background(), "", h)
	return err == nil
}

// answer is one of the library's, kept back.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (g *Registry) ask(r *http.Request) *answer {
	a := &answer{header: http.Header{}}
	g.inner.ServeHTTP(a, r)
	return a
}

func (a *answer) Header() http.Header { return a.header }

func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

func (a *answer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return a.body.Write(p)
}

func (a *answer) copyTo(w http.ResponseWriter) {
	for k, v := range a.header {
		w.Header()[k] = v
	}
	w.WriteHeader(max(a.status, http.StatusOK))
	w.Write(a.body.Bytes())
}

// referrers answers as the spec has it. The library lists the config's media
// type as the artifact type and does not filter.
func (g *Registry) referrers(w http.ResponseWriter, r *http.Request, repo string) {
	a := g.ask(r)
	var idx ocispec.Index
	if a.status == http.StatusNotFound {
		idx.SchemaVersion, idx.MediaType = 2, ocispec.MediaTypeImageIndex // no such repository yet
	} else if a.status != http.StatusOK || json.Unmarshal(a.body.Bytes(), &idx) != nil {
		a.copyTo(w)
		return
	}
	want := r.URL.Query().Get("artifactType")
	keep := []ocispec.Descriptor{}
	for _, d := range idx.Manifests {
		d.ArtifactType = g.artifactType(r, repo, d)
		if want == "" || d.ArtifactType == want {
			keep = append(keep, d)
		}
	}
	idx.Manifests = keep
	if want != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(idx)
}

func (g *Registry) artifactType(r *http.Request, repo string, d ocispec.Descriptor) string {
	get := r.Clone(r.Context())
	get.URL.Path = "/v2/" + repo + "/manifests/" + d.Digest.String()
	var m ocispec.Manifest
	if json.Unmarshal(g.ask(get).body.Bytes(), &m) == nil && m.ArtifactType != "" {
		return m.ArtifactType
	}
	return d.ArtifactType
}
