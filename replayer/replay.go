package replayer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/reprise-project/reprise/backstore"
)

// Result is what a replay has done.
type Result struct {
	Used    bool          `json:"used"`             // something was fetched, or was there already
	Reason  string        `json:"reason"`           // why the replay ended, or was not used
	Took    time.Duration `json:"took_ns"`          // from start to end
	Wants   int           `json:"ranges"`           // of the plan
	Need    int64         `json:"need_bytes"`       // that the trace asks for
	Asked   int64         `json:"asked_bytes"`      // requested
	Here    int64         `json:"here_bytes"`       // on the node or under way already
	Sent    int           `json:"requests"`         // sent
	Failed  int           `json:"failed_requests"`  // left to demand
	Matched float64       `json:"matched_coverage"` // share of the trace that applies to the image
}

// When a replay is looked at, and what makes it a wrong one: after it has
// brought judgeBytes, and demand has fetched judgeMisses times by itself, less
// than judgeShare of it has been read.
const (
	judgeEvery  = 100 * time.Millisecond
	judgeBytes  = 4 << 20
	judgeMisses = 24
	judgeShare  = 0.05
)

var errWrong = errors.New("stopped: demand reads other parts than the trace says; it is of another workload, record again")

// Replay brings what the plan wants onto the node, in order and behind demand.
// It returns when everything is there or has failed, when it turns out not to
// help, or when ctx ends. It never returns an error: a replay that fails
// leaves a lazy start, and Result says why.
func Replay(ctx context.Context, blobs backstore.Stack, p *Plan) Result {
	start := time.Now()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	done := make(chan struct{})
	judged := make(chan struct{})
	go func() {
		defer close(judged)
		judge(blobs, done, stop)
	}()
	got, err := blobs.Prefetch(ctx, p, nil)
	close(done)
	<-judged
	r := Result{
		Used: got.Bytes+got.Here > 0, Took: time.Since(start),
		Wants: len(p.Wants), Need: p.Need, Asked: got.Bytes, Here: got.Here,
		Sent: got.Requests, Failed: got.Failed, Matched: p.Coverage(),
	}
	r.Reason = reason(ctx, err, got)
	return r
}

func reason(ctx context.Context, err error, got backstore.PrefetchResult) string {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errWrong):
		return cause.Error()
	case cause != nil:
		return "stopped: the container ended first"
	case err != nil:
		return fmt.Sprintf("%d requests failed and were left to demand, the first: %v", max(got.Failed, 1), err)
	}
	return "replayed"
}

// judge stops a replay that is of no use.
func judge(blobs backstore.Stack, done <-chan struct{}, stop context.CancelCauseFunc) {
	t := time.NewTicker(judgeEvery)
	defer t.Stop()
	first := blobs.Stats()
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		if useless(first, blobs.Stats()) {
			stop(errWrong)
			return
		}
	}
}

func useless(first, now backstore.Stats) bool {
	brought := now.BackgroundBytes - first.BackgroundBytes
	misses := now.DemandRequests - first.DemandRequests
	used := now.Used - first.Used
	return brought >= judgeBytes && misses >= judgeMisses && float64(used) < judgeShare*float64(brought)
}
