package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// A plugin is a server with a gRPC service whose calls end when they are told to.
type plugin struct {
	t       *testing.T
	socket  string
	conn    *grpc.ClientConn
	stop    context.CancelFunc
	served  chan error
	begun   chan context.Context // of a call
	release chan struct{}
}

func newPlugin(t *testing.T, grace time.Duration) *plugin {
	p := &plugin{
		t: t, socket: filepath.Join(t.TempDir(), "s"), served: make(chan error, 1),
		begun: make(chan context.Context), release: make(chan struct{}),
	}
	g := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		if err := s.RecvMsg(new(emptypb.Empty)); err != nil {
			return err
		}
		p.begun <- s.Context()
		select {
		case <-p.release:
			return s.SendMsg(new(emptypb.Empty))
		case <-s.Context().Done():
			return context.Cause(s.Context())
		}
	}))
	s := NewBrokenServer(errors.New("there are no devices"), &ServerOptions{GRPC: g, CallGrace: grace})
	l, err := net.Listen("unix", p.socket)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	p.stop = cancel
	go func() { p.served <- s.Serve(ctx, l) }()
	p.conn, err = grpc.NewClient("unix://"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.conn.Close()) })
	return p
}

// call begins one, and returns its context and where its error will be.
func (p *plugin) call() (context.Context, <-chan error) {
	failed := make(chan error, 1)
	go func() {
		failed <- p.conn.Invoke(p.t.Context(), "/service/Call", new(emptypb.Empty), new(emptypb.Empty))
	}()
	return <-p.begun, failed
}

// leave tells the server to end, and returns when it takes no more connections.
func (p *plugin) leave() {
	p.stop()
	for {
		c, err := net.Dial("unix", p.socket)
		if err != nil {
			return
		}
		c.Close()
	}
}

// TestServeFinishesCalls: calls under way when the server ends are answered.
func TestServeFinishesCalls(t *testing.T) {
	p := newPlugin(t, time.Hour)
	_, first := p.call()
	ctx, second := p.call()
	p.leave()
	require.Empty(t, p.served)
	p.release <- struct{}{}
	p.release <- struct{}{}
	require.NoError(t, <-first)
	require.NoError(t, <-second)
	require.NoError(t, <-p.served)
	require.ErrorIs(t, ctx.Err(), context.Canceled, "as it is over")
}

// TestServeCutsCalls: a call that takes too long is ended. What its client is told
// depends on how far the answer was.
func TestServeCutsCalls(t *testing.T) {
	p := newPlugin(t, time.Nanosecond)
	ctx, failed := p.call()
	p.leave()
	<-ctx.Done()
	require.Equal(t, errLeaving, context.Cause(ctx))
	err := <-failed
	require.Contains(t, []codes.Code{codes.Unknown, codes.Canceled}, status.Code(err), "%v", err)
	require.NoError(t, <-p.served)
}

// TestCallsIdle: what bounds the wait begins anew with each call.
func TestCallsIdle(t *testing.T) {
	inside, leave := make(chan struct{}), make(chan struct{})
	c := newCalls(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		inside <- struct{}{}
		<-leave
	}), time.Hour)
	serve := func() {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
		require.NoError(t, err)
		go c.ServeHTTP(nil, r)
		<-inside
	}
	serve()
	wait, stop := c.leave()
	serve()
	leave <- struct{}{}
	serve()
	require.NoError(t, wait.Err())
	require.False(t, c.idle.Stop(), "it does not run while there are calls")
	leave <- struct{}{}
	leave <- struct{}{}
	<-wait.Done() // by itself
	require.ErrorIs(t, wait.Err(), context.Canceled)
	stop()
}

// TestRequestTraceWait: a request says how long its trace may be looked for, or the
// node does.
func TestRequestTraceWait(t *testing.T) {
	n, err := Open(&Config{Root: t.TempDir(), TraceWait: 3 * time.Second})
	require.NoError(t, err)
	for asked, want := range map[time.Duration]time.Duration{0: 3 * time.Second, time.Second: time.Second} {
		w, err := n.with(&Request{TraceWait: asked}, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		require.Equal(t, want, w.o.TraceWait)
		require.NoError(t, w.client.Close())
	}
	require.NoError(t, n.Close())
}
