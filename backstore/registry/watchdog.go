package registry

import (
	"context"
	"errors"
	"io"
	"time"
)

var errStalled = errors.New("no bytes for too long")

// A watched body is one that fails when a read of it takes too long. That
// nobody reads it is nothing wrong.
type watched struct {
	body    io.ReadCloser
	ctx     context.Context // of the request
	cancel  context.CancelCauseFunc
	timer   *time.Timer
	timeout time.Duration
}

// watch makes the context of a request whose body will be watched.
func watch(ctx context.Context, timeout time.Duration) *watched {
	w := &watched{timeout: timeout}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	return w
}

// start puts the body under watch.
func (w *watched) start(body io.ReadCloser) io.ReadCloser {
	w.body = body
	w.timer = time.AfterFunc(w.timeout, func() { w.cancel(errStalled) })
	w.timer.Stop()
	return w
}

func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(w.timeout)
	n, err := w.body.Read(p)
	w.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) && errors.Is(context.Cause(w.ctx), errStalled) {
		err = errStalled
	}
	return n, err
}

func (w *watched) Close() error {
	w.timer.Stop()
	err := w.body.Close()
	w.cancel(nil)
	return err
}
