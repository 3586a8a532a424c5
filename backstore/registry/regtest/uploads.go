package regtest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// uploads are the sessions of blobs being pushed in several requests.
type uploads struct {
	dir string

	mu   sync.Mutex // guards open
	open map[string]*upload
}

// An upload's bytes so far are in a file, which is made with the first of them.
type upload struct {
	mu   sync.Mutex // held by the request that is on; guards what follows
	path string
	size int64
}

func (u *uploads) start() string {
	id := strconv.FormatUint(rand.Uint64(), 36)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.open == nil {
		u.open = map[string]*upload{}
	}
	u.open[id] = &upload{path: filepath.Join(u.dir, "session-"+id)}
	return id
}

func (u *uploads) get(id string) *upload {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.open[id]
}

func (u *uploads) end(id string) {
	u.mu.Lock()
	s := u.open[id]
	delete(u.open, id)
	u.mu.Unlock()
	if s != nil {
		os.Remove(s.path)
	}
}

// add appends a request's body.
func (s *upload) add(body io.Reader) error {
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, body)
	s.size += n
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}

// upload is the push of a blob. All ways end in the library's push in one
// request, which checks the digest and keeps nothing in memory.
func (g *Registry) upload(w http.ResponseWriter, r *http.Request, repo, id string) {
	if id == "" {
		g.startUpload(w, r, repo)
		return
	}
	s := g.uploads.get(id)
	if s == nil {
		fail(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Method {
	case http.MethodPatch:
		if from, _, ok := strings.Cut(r.Header.Get("Content-Range"), "-"); ok && from != strconv.FormatInt(s.size, 10) {
			fail(w, http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "not where the upload is")
			return
		}
		if err := s.add(r.Body); err != nil {
			fail(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
			return
		}
		g.progress(w, repo, id, s, http.StatusAccepted)
	case http.MethodGet:
		g.progress(w, repo, id, s, http.StatusNoContent)
	case http.MethodPut:
		g.finishUpload(w, r, repo, s)
		g.uploads.end(id)
	case http.MethodDelete:
		g.uploads.end(id)
		w.WriteHeader(http.StatusNoContent)
	default:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method)
	}
}

func (g *Registry) startUpload(w http.ResponseWriter, r *http.Request, repo string) {
	query := r.URL.Query()
	mount := query.Get("mount")
	switch {
	case r.Method != http.MethodPost:
		fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", r.Method)
	case query.Get("digest") != "":
		g.inner.ServeHTTP(w, r)
	case mount != "" && g.has(mount):
		w.Header().Set("Location", "/v2/"+repo+"/blobs/"+mount)
		w.Header().Set("Docker-Content-Digest", mount)
		w.WriteHeader(http.StatusCreated)
	default:
		id := g.uploads.start()
		g.progress(w, repo, id, &upload{}, http.StatusAccepted)
	}
}

func (g *Registry) progress(w http.ResponseWriter, repo, id string, s *upload, status int) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/"+id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(0, s.size-1)))
	w.WriteHeader(status)
}

// finishUpload pushes the session's bytes and the request's own.
func (g *Registry) finishUpload(w http.ResponseWriter, r *http.Request, repo string, s *upload) {
	push := r.Clone(r.Context())
	push.Method = http.MethodPost
	push.URL.Path = "/v2/" + repo + "/blobs/uploads/"
	push.URL.RawQuery = url.Values{"digest": {r.URL.Query().Get("digest")}}.Encode()
	if s.size > 0 {
		if err := s.add(r.Body); err != nil {
			fail(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
			return
		}
		f, err := os.Open(s.path)
		if err != nil {
			fail(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
			return
		}
		defer f.Close()
		push.Body, push.ContentLength = f, s.size
	}
	g.inner.ServeHTTP(w, push)
}
