package main

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"google.golang.org/grpc/stats"
)

func TestTracingEndpoint(t *testing.T) {
	for endpoint, want := range map[string]string{
		"http://127.0.0.1:4318":       "http://127.0.0.1:4318/v1/traces",
		"https://otel.example.com/":   "https://otel.example.com/v1/traces",
		"https://otel.example.com/in": "https://otel.example.com/in",
	} {
		c := tracing{Endpoint: endpoint}
		require.NoError(t, c.check())
		require.Equal(t, want, c.url())
	}
	for _, endpoint := range []string{"127.0.0.1:4318", "grpc://a", "http://", "http://user:word@a", "http://a?b", "http://a#b", ":"} {
		c := tracing{Endpoint: endpoint}
		require.EqualError(t, c.check(), "tracing.endpoint \""+endpoint+"\": not a URL such as http://127.0.0.1:4318")
	}
}

// TestTracingOff: by default there are no spans at all.
func TestTracingOff(t *testing.T) {
	before := otel.GetTracerProvider()
	options, stop, err := defaultConfig().Tracing.start(t.Context(), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.Empty(t, options)
	stop()
	require.Equal(t, before, otel.GetTracerProvider())
}

func TestTracedCalls(t *testing.T) {
	for name, want := range map[string]bool{
		"/containerd.services.snapshots.v1.Snapshots/Prepare": true,
		"/containerd.services.snapshots.v1.Snapshots/Remove":  true,
		"/containerd.services.snapshots.v1.Snapshots/Stat":    false,
		"/containerd.services.snapshots.v1.Snapshots/Usage":   false,
		"/containerd.services.snapshots.v1.Snapshots/List":    false,
	} {
		require.Equal(t, want, traced(&stats.RPCTagInfo{FullMethodName: name}), name)
	}
}

// TestTracingErrors: a collector that is away is not worth a line every few seconds.
func TestTracingErrors(t *testing.T) {
	var out bytes.Buffer
	e := &tracingErrors{log: slog.New(slog.NewTextHandler(&out, nil))}
	for _, says := range []string{"away", "away", "refused", "refused", "away"} {
		e.Handle(errors.New(says))
	}
	require.Equal(t, 3, strings.Count(out.String(), "level=WARN msg=tracing"), out.String())
}
