package regtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

func newRegistry(t *testing.T, noRefs bool) (*Registry, string) {
	t.Helper()
	dir := t.TempDir()
	g, err := NewRegistry(&RegistryOptions{Dir: dir, NoReferrers: noRefs})
	require.NoError(t, err)
	return g, dir
}

func do(t *testing.T, c *http.Client, method, url, body string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	require.NoError(t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, string(b)
}

func TestRegistryUploads(t *testing.T) {
	g, dir := newRegistry(t, false)
	s, c := serve(t, g)
	base := s.URL() + "/v2/some/repo/blobs/uploads/"
	start := func() string {
		resp, _ := do(t, c, "POST", base, "")
		require.Equal(t, 202, resp.StatusCode)
		return s.URL() + resp.Header.Get("Location")
	}
	dg := func(s string) string { return digest.FromString(s).String() }
	check := func(content string) {
		t.Helper()
		resp, b := do(t, c, "GET", s.URL()+"/v2/some/repo/blobs/"+dg(content), "", "Range", "bytes=1-2")
		require.Equal(t, 206, resp.StatusCode)
		require.Equal(t, content[1:3], b)
		require.Equal(t, fmt.Sprintf("bytes 1-2/%d", len(content)), resp.Header.Get("Content-Range"))
		resp, _ = do(t, c, "HEAD", s.URL()+"/v2/some/repo/blobs/"+dg(content), "")
		require.Equal(t, 200, resp.StatusCode)
		require.EqualValues(t, len(content), resp.ContentLength)
	}
	// In one request, in two, in chunks, all chunks first.
	resp, _ := do(t, c, "POST", base+"?digest="+dg("in one"), "in one")
	require.Equal(t, 201, resp.StatusCode)
	check("in one")
	resp, _ = do(t, c, "PUT", start()+"?digest="+dg("in two"), "in two")
	require.Equal(t, 201, resp.StatusCode)
	check("in two")
	u := start()
	resp, _ = do(t, c, "PATCH", u, "in ", "Content-Range", "0-2")
	require.Equal(t, 202, resp.StatusCode)
	require.Equal(t, "0-2", resp.Header.Get("Range"))
	resp, _ = do(t, c, "PATCH", u, "x", "Content-Range", "7-7")
	require.Equal(t, 416, resp.StatusCode)
	resp, _ = do(t, c, "PATCH", u, "ch")
	require.Equal(t, 202, resp.StatusCode)
	resp, _ = do(t, c, "GET", u, "")
	require.Equal(t, "0-4", resp.Header.Get("Range"))
	resp, _ = do(t, c, "PUT", u+"?digest="+dg("in chunks"), "unks")
	require.Equal(t, 201, resp.StatusCode)
	check("in chunks")
	resp, _ = do(t, c, "PUT", u+"?digest="+dg("in chunks"), "")
	require.Equal(t, 404, resp.StatusCode)

	resp, _ = do(t, c, "PUT", start()+"?digest="+dg("other"), "bytes")
	require.Equal(t, 400, resp.StatusCode)
	resp, _ = do(t, c, "DELETE", start(), "")
	require.Equal(t, 204, resp.StatusCode)
	resp, _ = do(t, c, "POST", base+"?mount="+dg("in one")+"&from=a", "")
	require.Equal(t, 201, resp.StatusCode)
	resp, _ = do(t, c, "POST", base+"?mount="+dg("nowhere")+"&from=a", "")
	require.Equal(t, 202, resp.StatusCode)

	left, err := os.ReadDir(filepath.Join(dir, "uploads"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestRegistryReferrers(t *testing.T) {
	for _, noRefs := range []bool{false, true} {
		g, _ := newRegistry(t, noRefs)
		s, c := serve(t, g)
		subject := digest.FromString("subject")
		get := func(query string) (*http.Response, ocispec.Index) {
			resp, b := do(t, c, "GET", s.URL()+"/v2/a/referrers/"+subject.String()+query, "")
			var idx ocispec.Index
			if resp.StatusCode == 200 {
				require.NoError(t, json.Unmarshal([]byte(b), &idx))
			}
			return resp, idx
		}
		if noRefs {
			resp, _ := get("")
			require.Equal(t, 404, resp.StatusCode)
			continue
		}
		_, idx := get("")
		require.Empty(t, idx.Manifests)
		raw, err := json.Marshal(ocispec.Manifest{
			Versioned:    specs.Versioned{SchemaVersion: 2},
			MediaType:    ocispec.MediaTypeImageManifest,
			ArtifactType: "application/vnd.x",
			Config:       ocispec.DescriptorEmptyJSON,
			Layers:       []ocispec.Descriptor{ocispec.DescriptorEmptyJSON},
			Subject:      &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject, Size: 7},
		})
		require.NoError(t, err)
		resp, _ := do(t, c, "PUT", s.URL()+"/v2/a/manifests/"+digest.FromBytes(raw).String(), string(raw),
			"Content-Type", ocispec.MediaTypeImageManifest)
		require.Equal(t, 201, resp.StatusCode)
		_, idx = get("?artifactType=application/vnd.x")
		require.Len(t, idx.Manifests, 1)
		require.Equal(t, "application/vnd.x", idx.Manifests[0].ArtifactType)
		resp, idx = get("?artifactType=application/vnd.y")
		require.Empty(t, idx.Manifests)
		require.Equal(t, "artifactType", resp.Header.Get("OCI-Filters-Applied"))
	}
}

func TestProxy(t *testing.T) {
	var host, auth string
	store, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		auth = r.Header.Get("Authorization")
		io.WriteString(w, "stored")
	}))
	up, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host = r.Host
		switch {
		case r.Method == "POST":
			w.Header().Set("Location", "http://"+r.Host+"/v2/a/blobs/uploads/1?x=y")
			w.WriteHeader(202)
		default:
			http.Redirect(w, r, store.URL()+"/blob", http.StatusTemporaryRedirect)
		}
	}))
	p, err := NewProxy(up.URL())
	require.NoError(t, err)
	l := NewLink(LinkSpec{}, p)
	s, c := serve(t, l)
	resp, _ := do(t, c, "POST", s.URL()+"/v2/a/blobs/uploads/", "")
	require.Equal(t, "/v2/a/blobs/uploads/1?x=y", resp.Header.Get("Location"))
	require.Equal(t, up.Addr, host)
	resp, b := do(t, c, "GET", s.URL()+"/v2/a/blobs/x", "", "Authorization", "secret")
	require.Equal(t, 200, resp.StatusCode)
	require.Equal(t, "stored", b)
	require.Empty(t, auth)
	require.EqualValues(t, 6, l.Stats().BytesSent)
	require.NoError(t, p.Close())
	_, err = NewProxy("ftp://x")
	require.Error(t, err)
}

// The registry keeps no blob in memory, whichever way it comes.
func TestRegistryMemory(t *testing.T) {
	g, _ := newRegistry(t, false)
	const size = 64 << 20
	zeros := func() io.Reader { return io.LimitReader(zeroReader{}, size) }
	h := sha256.New()
	io.Copy(h, zeros())
	dg := fmt.Sprintf("sha256:%x", h.Sum(nil))
	push := func(patch bool) func() {
		return func() {
			id := g.uploads.start()
			put := zeros()
			if patch {
				put = bytes.NewReader(nil)
				req, _ := http.NewRequest("PATCH", "/v2/a/blobs/uploads/"+id, zeros())
				g.ServeHTTP(discard{}, req)
			}
			req, _ := http.NewRequest("PUT", "/v2/a/blobs/uploads/"+id+"?digest="+dg, put)
			req.ContentLength = -1
			g.ServeHTTP(discard{}, req)
		}
	}
	for _, f := range []func(){push(false), push(true)} {
		require.Less(t, allocated(f), uint64(4<<20))
		require.True(t, g.has(dg))
	}
	read := func() {
		req, _ := http.NewRequest("GET", "/v2/a/blobs/"+dg, nil)
		g.ServeHTTP(discard{}, req)
	}
	require.Less(t, allocated(read), uint64(1<<20))
}
