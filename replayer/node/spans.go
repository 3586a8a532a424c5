package node

import (
	"context"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// tracer makes OpenTelemetry spans, which go nowhere unless the program has set
// where to.
var tracer = otel.Tracer("github.com/reprise-project/reprise/replayer/node")

// Attributes of spans.
const (
	attrImage  = attribute.Key("reprise.image")
	attrDevice = attribute.Key("reprise.device")
)

// traced makes a span of the attaching, with the phases as its events.
func (d *served) traced(attach func() error) error {
	_, span := tracer.Start(d.work, "attach device", trace.WithAttributes(
		attrImage.String(d.state.Request.Ref), attrDevice.String(d.id)))
	defer span.End()
	err := attach()
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, "")
	}
	if d.im != nil && span.IsRecording() {
		p := d.im.phases
		for _, phase := range p.List() {
			span.AddEvent(phase.Name, trace.WithTimestamp(p.Start().Add(phase.At)))
		}
	}
	return err
}

// traced makes a span of the replay, which end gives what has become of it.
func (r *replaying) traced(ctx context.Context, image string) (_ context.Context, end func()) {
	ctx, span := tracer.Start(ctx, "replay", trace.WithAttributes(attrImage.String(image)))
	return ctx, func() {
		span.SetAttributes(
			attribute.String("reprise.replay.outcome", r.outcome()), attribute.String("reprise.replay.reason", r.result.Reason),
			attribute.Int64("reprise.replay.bytes", r.result.Asked), attribute.Int64("reprise.replay.requests", int64(r.result.Sent)))
		span.End()
	}
}
