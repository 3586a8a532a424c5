package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"path"
	"sync"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// tracing says where OpenTelemetry spans go.
type tracing struct {
	Endpoint string  `toml:"endpoint"`
	Sample   float64 `toml:"sample"`
}

func (t *tracing) check() error {
	if !(t.Sample >= 0 && t.Sample <= 1) {
		return fmt.Errorf("tracing.sample %v: from 0 to 1", t.Sample)
	}
	u, err := url.Parse(t.Endpoint)
	if t.Endpoint != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "") {
		return fmt.Errorf("tracing.endpoint %q: not a URL such as http://127.0.0.1:4318", t.Endpoint)
	}
	return nil
}

// url is where spans are posted.
func (t *tracing) url() string {
	u, err := url.Parse(t.Endpoint)
	if err != nil {
		return t.Endpoint
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces"
	}
	return u.String()
}

// lastSpans is how long the last spans may take to leave.
const lastSpans = 2 * time.Second

// start begins to send spans, if that was asked for: those of this process, and
// those of a gRPC server that is made with the options. An endpoint that cannot be
// reached is logged only. stop sends what is left.
func (t *tracing) start(ctx context.Context, log *slog.Logger) (o []grpc.ServerOption, stop func(), err error) {
	if t.Endpoint == "" {
		return nil, func() {}, nil
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(t.url()))
	if err != nil {
		return nil, nil, fmt.Errorf("tracing: %w", err)
	}
	about, err := resource.New(ctx, resource.WithHost(), resource.WithAttributes(
		attribute.String("service.name", "reprise"), attribute.String("service.version", version)), resource.WithFromEnv())
	if err != nil {
		log.Warn("tracing: not all is known of this machine", "err", err)
	}
	p := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter), sdktrace.WithResource(about),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(t.Sample))))
	otel.SetTracerProvider(p)
	otel.SetErrorHandler(&tracingErrors{log: log})
	o = []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(p), otelgrpc.WithPropagators(propagation.TraceContext{}), otelgrpc.WithFilter(traced)))}
	return o, func() {
		ctx, cancel := context.WithTimeout(context.Background(), lastSpans)
		defer cancel()
		if err := p.Shutdown(ctx); err != nil {
			otel.Handle(err)
		}
	}, nil
}

// traced leaves out what containerd and the kubelet ask over and over again.
func traced(call *stats.RPCTagInfo) bool {
	switch path.Base(call.FullMethodName) {
	case "Stat", "List", "Usage":
		return false
	}
	return true
}

// tracingErrors logs an error once for as long as it is the same.
type tracingErrors struct {
	log *slog.Logger

	mu   sync.Mutex // guards last
	last string
}

// Handle implements [otel.ErrorHandler].
func (e *tracingErrors) Handle(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if says := err.Error(); says != e.last {
		e.last = says
		e.log.Warn("tracing", "err", err)
	}
}
