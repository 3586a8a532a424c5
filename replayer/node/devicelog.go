package node

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
)

// A deviceLog is what a server logs of one device: it goes to the server's own
// log, and to those who follow it, as lines.
type deviceLog struct {
	*slog.Logger
	lines *lines
}

func newDeviceLog(base *slog.Logger) *deviceLog {
	l := &lines{}
	text := slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelWarn})
	return &deviceLog{slog.New(both{base.Handler(), text}), l}
}

// follow calls say with each line from now on, from many goroutines, until the
// function it returns is called.
func (l *deviceLog) follow(say func(line string)) (end func()) {
	f := &say
	l.lines.mu.Lock()
	defer l.lines.mu.Unlock()
	l.lines.to = append(l.lines.to, f)
	return func() {
		l.lines.mu.Lock()
		defer l.lines.mu.Unlock()
		for i, g := range l.lines.to {
			if g == f {
				l.lines.to = append(l.lines.to[:i:i], l.lines.to[i+1:]...)
				return
			}
		}
	}
}

// lines passes on what is written, a line at a time.
type lines struct {
	mu sync.Mutex // guards to
	to []*func(string)
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, say := range l.to {
		(*say)(strings.TrimSuffix(string(p), "\n"))
	}
	return len(p), nil
}

// both logs to two handlers.
type both [2]slog.Handler

func (b both) Enabled(ctx context.Context, l slog.Level) bool {
	return b[0].Enabled(ctx, l) || b[1].Enabled(ctx, l)
}

func (b both) Handle(ctx context.Context, r slog.Record) error {
	var errs []error
	for _, h := range b {
		if h.Enabled(ctx, r.Level) {
			errs = append(errs, h.Handle(ctx, r.Clone()))
		}
	}
	return errors.Join(errs...)
}

func (b both) WithAttrs(a []slog.Attr) slog.Handler {
	return both{b[0].WithAttrs(a), b[1].WithAttrs(a)}
}

func (b both) WithGroup(name string) slog.Handler {
	return both{b[0].WithGroup(name), b[1].WithGroup(name)}
}
