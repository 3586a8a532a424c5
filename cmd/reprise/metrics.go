package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// How often it is tried to listen for Prometheus, while the process before still
// does perhaps, and for how long.
const (
	metricsPoll = 100 * time.Millisecond
	metricsWait = 10 * time.Second
)

// serveMetrics answers at GET /metrics of addr, unless that is empty, until stop
// is called. An address that cannot be had is logged only: devices matter more.
func serveMetrics(addr string, h http.Handler, log *slog.Logger) (stop func()) {
	if addr == "" {
		return func() {}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ctx, cancel := context.WithCancel(context.Background())
	serve := func(l net.Listener) {
		log.Info("metrics", "address", l.Addr())
		_ = srv.Serve(l)
	}
	var wg sync.WaitGroup
	l, err := net.Listen("tcp", addr)
	wg.Go(func() {
		if err != nil {
			l, err = listenLater(ctx, addr)
		}
		if err != nil {
			log.Warn("no metrics", "address", addr, "err", err)
			return
		}
		serve(l)
	})
	return func() {
		cancel()
		_ = srv.Close()
		wg.Wait()
	}
}

// listenLater tries for a while.
func listenLater(ctx context.Context, addr string) (net.Listener, error) {
	ctx, cancel := context.WithTimeout(ctx, metricsWait)
	defer cancel()
	t := time.NewTicker(metricsPoll)
	defer t.Stop()
	for {
		l, err := net.Listen("tcp", addr)
		if err == nil {
			return l, nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, err
		}
	}
}
