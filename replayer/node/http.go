package node

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// maxRequest bounds the body of a request, in bytes.
const maxRequest = 4 << 20

// Serve answers clients at l until ctx ends, and then what is under way: gRPC calls
// for [ServerOptions.CallGrace], the rest for a moment. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	h := &http.Server{Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	h.Protocols.SetHTTP1(true)
	h.Protocols.SetUnencryptedHTTP2(s.o.GRPC != nil)
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		wait, stop := s.calls.leave()
		defer stop()
		if h.Shutdown(wait) != nil {
			_ = h.Close()
		}
	})
	err := h.Serve(l)
	if !stop() {
		<-ended
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Handler answers the requests of clients; see api.go.
func (s *Server) Handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET "+apiVersion+"/server", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.Info(), nil) })
	m.HandleFunc("GET "+apiVersion+"/devices", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.List(), nil) })
	m.HandleFunc("PUT "+apiVersion+"/devices/{id}", s.putDevice)
	m.HandleFunc("GET "+apiVersion+"/devices/{id}", s.getDevice)
	m.HandleFunc("DELETE "+apiVersion+"/devices/{id}", s.deleteDevice)
	m.HandleFunc("POST "+apiVersion+"/devices/{id}/quiesce", s.postQuiesce)
	m.HandleFunc("POST "+apiVersion+"/devices/{id}/fail", s.postFail)
	m.HandleFunc("GET "+apiVersion+"/devices/{id}/lease", s.getLease)
	m.HandleFunc("POST "+apiVersion+"/upgrade", s.postUpgrade)
	m.Handle("GET /metrics", s.MetricsHandler())
	if s.o.HTTP != nil {
		m.Handle("/", s.o.HTTP)
	}
	if s.o.GRPC == nil {
		return m
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			s.calls.ServeHTTP(w, r)
			return
		}
		m.ServeHTTP(w, r)
	})
}

// answer sends v, or the error.
func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := http.StatusInternalServerError
		switch {
		case errors.Is(err, ErrNoDevice):
			status = http.StatusNotFound
		case errors.Is(err, errBusy):
			status = http.StatusConflict
		}
		w.WriteHeader(status)
		v = newFailure(err)
	}
	_ = json.NewEncoder(w).Encode(v) // a client that is gone does not want to know
}

func (s *Server) putDevice(w http.ResponseWriter, r *http.Request) {
	var req Request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&req); err != nil {
		answer(w, nil, err)
		return
	}
	req.ID = r.PathValue("id")
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := &replies{w: w}
	st, err := s.Attach(r.Context(), &req, func(line string) { out.send(reply{Log: line}) })
	if err != nil {
		out.send(reply{Error: newFailure(err)})
		return
	}
	out.send(reply{Status: st})
}

// replies sends lines as they come.
type replies struct {
	mu sync.Mutex // guards w
	w  http.ResponseWriter
}

func (o *replies) send(r reply) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if json.NewEncoder(o.w).Encode(r) == nil {
		_ = http.NewResponseController(o.w).Flush()
	}
}

func (s *Server) getDevice(w http.ResponseWriter, r *http.Request) {
	st, err := s.Status(r.Context(), r.PathValue("id"), r.URL.Query().Has("trace"))
	answer(w, st, err)
}

func (s *Server) deleteDevice(w http.ResponseWriter, r *http.Request) {
	err := s.Release(r.Context(), r.PathValue("id"), r.URL.Query().Has("detach"))
	answer(w, struct{}{}, err)
}

func (s *Server) postQuiesce(w http.ResponseWriter, r *http.Request) {
	var fail time.Duration
	if v := r.URL.Query().Get("fail"); v != "" {
		var err error
		if fail, err = time.ParseDuration(v); err != nil {
			answer(w, nil, err)
			return
		}
	}
	st, err := s.Quiesce(r.Context(), r.PathValue("id"), fail)
	answer(w, st, err)
}

func (s *Server) postFail(w http.ResponseWriter, r *http.Request) {
	answer(w, struct{}{}, s.Fail(r.Context(), r.PathValue("id")))
}

// getLease answers at once, and goes on answering for as long as the device is
// there. The client's end is the end of the lease.
func (s *Server) getLease(w http.ResponseWriter, r *http.Request) {
	d, err := s.device(r.Context(), r.PathValue("id"))
	if err != nil {
		answer(w, nil, err)
		return
	}
	letGo := d.hold()
	defer letGo()
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush()
	select {
	case <-d.gone:
	case <-r.Context().Done():
	case <-s.leaving:
	}
}

func (s *Server) postUpgrade(w http.ResponseWriter, r *http.Request) {
	var req UpgradeRequest
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&req)
	if err == nil && s.o.Upgrade == nil {
		err = errors.New("nobody would start the daemon again: run it under systemd or 'reprise supervise'")
	}
	if err == nil {
		err = s.o.Upgrade(req)
	}
	answer(w, s.Info(), err)
}
