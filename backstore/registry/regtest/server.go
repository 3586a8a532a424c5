package regtest

import (
	"context"
	"errors"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"sync"
	"time"
)

// A Server serves a handler on the loopback interface.
type Server struct {
	Addr string // 127.0.0.1:PORT: what references to it begin with

	srv    *http.Server
	h      http.Handler
	cancel context.CancelFunc
	wg     sync.WaitGroup // the accept loop and all handlers
	err    error          // of the accept loop

	mu     sync.Mutex // guards closed, and adding to wg
	closed bool
}

// Start serves h, often a *Link, until Close or the end of ctx.
func Start(ctx context.Context, h http.Handler) (*Server, error) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &Server{Addr: lis.Addr().String(), cancel: cancel, h: h}
	s.srv = &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          stdlog.New(io.Discard, "", 0),
		ReadHeaderTimeout: 10 * time.Second,
	}
	if l, ok := h.(interface {
		ConnContext(context.Context, net.Conn) context.Context
	}); ok {
		s.srv.ConnContext = l.ConnContext
	}
	s.wg.Go(func() {
		stop := context.AfterFunc(ctx, func() { s.srv.Close() })
		defer stop()
		if err := s.srv.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
			s.err = err
		}
	})
	return s, nil
}

// URL is the server's base.
func (s *Server) URL() string { return "http://" + s.Addr }

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		panic(http.ErrAbortHandler)
	}
	s.wg.Add(1)
	s.mu.Unlock()
	defer s.wg.Done()
	s.h.ServeHTTP(w, r)
}

// Close ends all connections, waits for the handlers, and returns what stopped
// the server before, if anything did. It may be called again.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.srv.Close()
	s.wg.Wait()
	return s.err
}
