package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

func descriptorDigest(s string) digest.Digest { return digest.Digest(s) }

func TestPushSkipsWhatIsThere(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 100_000)
	require.NoError(t, f.Push(t.Context(), f.repo, d, func() (io.ReadCloser, error) {
		t.Error("opened")
		return opener(content)()
	}))
	require.Equal(t, map[string]int{"blob": 1}, f.kinds())
	ok, err := f.Exists(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.True(t, ok)
	ok, err = f.Exists(t.Context(), f.repo, descriptor("", []byte("other")))
	require.NoError(t, err)
	require.False(t, ok)
	got, err := f.Get(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.Equal(t, content, got)
}

func TestPushRetries(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	content := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{9}).Read(content)
	d := descriptor("application/octet-stream", content)
	var puts atomic.Int64
	f.link.SetFault(func(r *http.Request) *regtest.Fault {
		if r.Method != http.MethodPut {
			return nil
		}
		switch puts.Add(1) {
		case 1:
			return &regtest.Fault{Status: 503}
		case 2:
			return &regtest.Fault{Reset: true}
		}
		return nil
	})
	var opened atomic.Int64
	require.NoError(t, f.Push(t.Context(), f.repo, d, func() (io.ReadCloser, error) {
		opened.Add(1)
		return opener(content)()
	}))
	require.EqualValues(t, 3, opened.Load())
	require.EqualValues(t, 3, puts.Load())

	require.ErrorContains(t, f.Push(t.Context(), f.repo, descriptor("", []byte("good")), opener([]byte("evil"))), "DIGEST_INVALID")
	boom := errors.New("boom")
	err := f.Push(t.Context(), f.repo, descriptor("", []byte("x")), func() (io.ReadCloser, error) { return nil, boom })
	require.ErrorIs(t, err, boom)
	f.link.SetFault(always(regtest.Fault{Status: 403}))
	require.ErrorContains(t, f.Push(t.Context(), f.repo, descriptor("", []byte("x")), opener([]byte("x"))), "docker login")
}

func TestPushEmptyBlob(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 0)
	ok, err := f.Exists(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.True(t, ok)
}

func TestPushManifestChecksBytes(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	raw := mustJSON(t, image("x", nil))
	d := descriptor(ocispec.MediaTypeImageManifest, raw)
	require.Error(t, f.Push(t.Context(), f.repo, d, opener(raw[1:])))
	require.Error(t, f.Push(t.Context(), f.repo+"@"+descriptor("", nil).Digest.String(), d, opener(raw)))
	require.Zero(t, f.link.Stats().Requests)
}

func TestMount(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, _ := f.push(t, 1, 1000)
	require.NoError(t, f.Mount(t.Context(), f.addr+"/other", d, "some/repo"))
	err := f.Mount(t.Context(), f.addr+"/other", descriptor("", []byte("nowhere")), "some/repo")
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "push it")
	log := f.link.Stats().Log
	require.Equal(t, "DELETE", log[len(log)-1].Method, "the upload is given up")
}

func TestDelete(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d := f.put(t, f.repo, ocispec.MediaTypeImageManifest, image("x", nil))
	ref := f.repo + "@" + d.Digest.String()
	require.Error(t, f.Delete(t.Context(), f.repo))
	f.link.SetFault(always(regtest.Fault{Status: 405}))
	err := f.Delete(t.Context(), ref)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "does not allow deletes")
	f.link.SetFault(nil)
	_, err = f.Resolve(t.Context(), ref)
	require.NoError(t, err)
	require.NoError(t, f.Delete(t.Context(), ref))
	_, err = f.Resolve(t.Context(), ref)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorIs(t, f.Delete(t.Context(), ref), os.ErrNotExist)
}

func (f *fixture) putReferrer(t *testing.T, c *Client, name string, subject ocispec.Descriptor) (ocispec.Descriptor, error) {
	t.Helper()
	raw := mustJSON(t, image(name, &subject))
	d := descriptor(ocispec.MediaTypeImageManifest, raw)
	return d, c.PutReferrer(t.Context(), f.repo, d, raw)
}

func TestReferrers(t *testing.T) {
	for _, noAPI := range []bool{false, true} {
		t.Run("noAPI="+map[bool]string{true: "yes", false: "no"}[noAPI], func(t *testing.T) {
			f := newFixture(t, Options{}, regtest.RegistryOptions{NoReferrers: noAPI})
			subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
			list := func(typ string) []ocispec.Descriptor {
				t.Helper()
				l, err := f.Referrers(t.Context(), f.repo, subject.Digest, typ)
				require.NoError(t, err)
				return l
			}
			f.link.Reset()
			require.Empty(t, list(""))
			require.Equal(t, map[string]int{"referrers": 1, "tag": 1}, f.kinds())

			one, err := f.putReferrer(t, f.Client, "one", subject)
			require.NoError(t, err)
			two, err := f.putReferrer(t, f.Client, "two", subject)
			require.NoError(t, err)
			_, err = f.putReferrer(t, f.Client, "two", subject)
			require.NoError(t, err, "again")
			got := list("application/vnd.test")
			require.Len(t, got, 2)
			for _, d := range got {
				require.Equal(t, "application/vnd.test", d.ArtifactType)
				require.Contains(t, []digest.Digest{one.Digest, two.Digest}, d.Digest)
				require.NotEmpty(t, d.Annotations["n"])
			}
			require.Empty(t, list("application/vnd.other"))
			_, err = f.ManifestByTag(t.Context(), f.repo, FallbackTag(subject.Digest))
			require.Error(t, err, "an index, or none")
			require.Equal(t, !noAPI, errors.Is(err, os.ErrNotExist))

			require.NoError(t, f.DeleteReferrer(t.Context(), f.repo, subject.Digest, one.Digest))
			got = list("application/vnd.test")
			require.Len(t, got, 1)
			require.Equal(t, two.Digest, got[0].Digest)
			require.ErrorIs(t, f.DeleteReferrer(t.Context(), f.repo, subject.Digest, one.Digest), os.ErrNotExist)
		})
	}
}

func TestReferrersErrors(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	raw := mustJSON(t, image("no subject", nil))
	require.ErrorContains(t, f.PutReferrer(t.Context(), f.repo, descriptor(ocispec.MediaTypeImageManifest, raw), raw), "no subject")
	f.link.SetFault(always(regtest.Fault{Status: 500}))
	_, err := f.Referrers(t.Context(), f.repo, subject.Digest, "")
	require.ErrorContains(t, err, "500")
	for name, fault := range map[string]regtest.Fault{
		"not an index": {Status: 200, Body: "<html>"},
		"bad request":  {Status: 400},
		"not here":     {Status: 405},
	} {
		f.link.SetFault(func(r *http.Request) *regtest.Fault {
			if strings.Contains(r.URL.Path, "/referrers/") {
				return &fault
			}
			return nil
		})
		l, err := f.Referrers(t.Context(), f.repo, subject.Digest, "")
		require.NoError(t, err, name)
		require.Empty(t, l)
	}
}

// A registry that reports the config's type as the artifact's, in pages.
func TestReferrersUntypedAndPaged(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	one, err := f.putReferrer(t, f.Client, "one", subject)
	require.NoError(t, err)
	two, err := f.putReferrer(t, f.Client, "two", subject)
	require.NoError(t, err)
	f.link.SetFault(func(r *http.Request) *regtest.Fault {
		if !strings.Contains(r.URL.Path, "/referrers/") {
			return nil
		}
		idx := emptyIndex()
		fault := &regtest.Fault{Status: 200, Header: http.Header{}}
		if r.URL.Query().Get("page") == "" {
			one.ArtifactType = ocispec.MediaTypeEmptyJSON
			idx.Manifests = []ocispec.Descriptor{one}
			fault.Header.Set("Link", `</v2/some/repo/referrers/x?page=2>; rel="next"`)
		} else {
			idx.Manifests = []ocispec.Descriptor{two, {Digest: "x"}}
		}
		raw, _ := json.Marshal(idx)
		fault.Body = string(raw)
		return fault
	})
	got, err := f.Referrers(t.Context(), f.repo, subject.Digest, "application/vnd.test")
	require.NoError(t, err)
	require.Len(t, got, 2)
	require.Equal(t, "one", got[0].Annotations["n"])
	got, err = f.Referrers(t.Context(), f.repo, subject.Digest, "application/vnd.other")
	require.NoError(t, err)
	require.Empty(t, got)
}

// Two clients with one lock directory are two processes on one machine.
func TestConcurrentReferrersLoseNone(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{NoReferrers: true})
	second, _ := newClient(t, Options{LockDir: f.o.LockDir})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	var g errgroup.Group
	var mu sync.Mutex
	want := map[digest.Digest]bool{}
	for i := range 50 {
		c := f.Client
		if i%2 == 1 {
			c = second
		}
		g.Go(func() error {
			d, err := f.putReferrer(t, c, strings.Repeat("x", i), subject)
			mu.Lock()
			want[d.Digest] = true
			mu.Unlock()
			return err
		})
	}
	require.NoError(t, g.Wait())
	got, err := f.Referrers(t.Context(), f.repo, subject.Digest, "")
	require.NoError(t, err)
	require.Len(t, want, 50)
	require.Len(t, got, 50)
	for _, d := range got {
		require.True(t, want[d.Digest])
	}
}

// Another machine, which does not see our lock, overwrites the index.
func TestLostReferrerIsPutAgain(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{NoReferrers: true})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	raw := mustJSON(t, emptyIndex())
	var overwritten atomic.Int64
	var clobber atomic.Bool
	clobber.Store(true)
	other, _ := newClient(t, Options{})
	f.link.SetFault(func(r *http.Request) *regtest.Fault {
		// The read after the write: by then the other one has written.
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, FallbackTag(subject.Digest)) && clobber.Load() && overwritten.Load() < 4 {
			if overwritten.Add(1)%2 == 0 {
				r2, _ := ParseReference(f.repo)
				if _, err := other.putManifest(t.Context(), r2, FallbackTag(subject.Digest), ocispec.MediaTypeImageIndex, raw); err != nil {
					t.Error(err)
				}
			}
		}
		return nil
	})
	d, err := f.putReferrer(t, f.Client, "one", subject)
	require.NoError(t, err)
	clobber.Store(false)
	got, err := f.Referrers(t.Context(), f.repo, subject.Digest, "")
	require.NoError(t, err)
	require.Len(t, got, 1)
	require.Equal(t, d.Digest, got[0].Digest)
	require.EqualValues(t, 4, overwritten.Load())
}

func TestLockDirOfAnother(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	file := t.TempDir() + "/file"
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	f.o.LockDir = file
	_, err := f.lock(t.Context(), "x")
	require.Error(t, err)
}

// TestTags lists tags of a registry that gives them in pages, and as it likes.
func TestTags(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	for _, tag := range []string{"a", "p-1", "p-2", "q"} {
		f.put(t, f.repo+":"+tag, ocispec.MediaTypeImageManifest, image("x", nil))
	}
	got, err := f.Tags(t.Context(), f.repo, "p-")
	require.NoError(t, err)
	require.Equal(t, []string{"p-1", "p-2"}, got)
	got, err = f.Tags(t.Context(), f.addr+"/nosuch", "p-")
	require.NoError(t, err)
	require.Empty(t, got)

	asked := 0
	f.link.SetFault(func(r *http.Request) *regtest.Fault {
		asked++
		if r.URL.Query().Get("page") == "" {
			require.Equal(t, "p-", r.URL.Query().Get("last"))
			return &regtest.Fault{Status: 200, Body: `{"tags":["p-1","p-2"]}`, Header: http.Header{"Link": {`</v2/x/tags/list?page=2>; rel="next"`}}}
		}
		return &regtest.Fault{Status: 200, Body: `{"tags":["p-3","p-\u0000","q"]}`, Header: http.Header{"Link": {`</v2/x/tags/list?page=3>; rel="next"`}}}
	})
	got, err = f.Tags(t.Context(), f.repo, "p-")
	require.NoError(t, err)
	require.Equal(t, []string{"p-1", "p-2", "p-3"}, got)
	require.Equal(t, 2, asked, "nothing comes after what is behind the prefix")
	f.link.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Status: 200, Body: `[]`} })
	_, err = f.Tags(t.Context(), f.repo, "p-")
	require.ErrorContains(t, err, "is not a list of tags")
	f.link.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Status: 403} })
	_, err = f.Tags(t.Context(), f.repo, "p-")
	require.Error(t, err)
}

// TestLateLostReferrerIsPutAgain has another machine, whose write took long, overwrite
// the index after the entry was seen there.
func TestLateLostReferrerIsPutAgain(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{NoReferrers: true})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	raw := mustJSON(t, emptyIndex())
	other, _ := newClient(t, Options{})
	r, err := ParseReference(f.repo)
	require.NoError(t, err)
	var gets atomic.Int64
	f.link.SetFault(func(q *http.Request) *regtest.Fault {
		// Read to be written, looked at, looked at again.
		if q.Method == http.MethodGet && strings.HasSuffix(q.URL.Path, FallbackTag(subject.Digest)) && gets.Add(1) == 3 {
			if _, err := other.putManifest(t.Context(), r, FallbackTag(subject.Digest), ocispec.MediaTypeImageIndex, raw); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	_, err = f.putReferrer(t, f.Client, "one", subject)
	require.NoError(t, err)
	require.EqualValues(t, 6, gets.Load())
	got, err := f.Referrers(t.Context(), f.repo, subject.Digest, "")
	require.NoError(t, err)
	require.Len(t, got, 1)
}

// TestIndexOfMissing has a registry refuse the index: in passing, and as long as it
// names what somebody has deleted.
func TestIndexOfMissing(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{NoReferrers: true})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	one, err := f.putReferrer(t, f.Client, "one", subject)
	require.NoError(t, err)
	gone, err := f.putReferrer(t, f.Client, "gone", subject)
	require.NoError(t, err)
	require.NoError(t, f.Delete(t.Context(), f.repo+"@"+gone.Digest.String()))
	var puts atomic.Int64
	f.link.SetFault(func(q *http.Request) *regtest.Fault {
		if q.Method != http.MethodPut || !strings.HasSuffix(q.URL.Path, FallbackTag(subject.Digest)) {
			return nil
		}
		body, err := io.ReadAll(q.Body)
		if err != nil {
			t.Error(err)
		}
		q.Body = io.NopCloser(bytes.NewReader(body))
		if puts.Add(1) == 2 || bytes.Contains(body, []byte(gone.Digest)) {
			return &regtest.Fault{Status: http.StatusBadRequest, Body: `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}`}
		}
		return nil
	})
	two, err := f.putReferrer(t, f.Client, "two", subject)
	require.NoError(t, err)
	require.EqualValues(t, 3, puts.Load())
	got, err := f.Referrers(t.Context(), f.repo, subject.Digest, "")
	require.NoError(t, err)
	require.ElementsMatch(t, []digest.Digest{one.Digest, two.Digest}, []digest.Digest{got[0].Digest, got[1].Digest})

	f.link.SetFault(func(q *http.Request) *regtest.Fault {
		if q.Method == http.MethodPut && strings.HasSuffix(q.URL.Path, FallbackTag(subject.Digest)) {
			return &regtest.Fault{Status: http.StatusBadRequest}
		}
		return nil
	})
	_, err = f.putReferrer(t, f.Client, "three", subject)
	require.ErrorContains(t, err, "400")
}

// A registry whose files are just being written by somebody else denies a blob.
func TestPushAgainWhatIsDenied(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	var puts, denied atomic.Int64
	f.link.SetFault(func(q *http.Request) *regtest.Fault {
		if q.Method == http.MethodPut && strings.Contains(q.URL.Path, "/manifests/") && puts.Add(1) <= denied.Load() {
			return &regtest.Fault{Status: http.StatusBadRequest, Body: `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown to registry"}]}`}
		}
		return nil
	})
	subject := f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	puts.Store(0)
	denied.Store(2)
	_, err := f.putReferrer(t, f.Client, "one", subject)
	require.NoError(t, err)
	require.EqualValues(t, 3, puts.Load())

	denied.Store(1 << 30)
	_, err = f.putReferrer(t, f.Client, "two", subject)
	require.ErrorContains(t, err, "BLOB_UNKNOWN")
}
