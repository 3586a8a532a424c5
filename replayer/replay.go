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

	Outside   int64 `json:"outside_bytes"`   // that demand fetched and the trace does not have
	Overtaken int64 `json:"overtaken_bytes"` // of the trace, that demand fetched before the replay
	Skipped   int64 `json:"skipped_bytes"`   // of the trace, left to demand because it had passed them
	Held      int   `json:"held"`            // times that it waited for demand to meet the trace again
}

// Complete is the reason of a replay that came to its end.
const Complete = "replayed"

// judgeEvery is how often a replay is looked at.
const judgeEvery = 20 * time.Millisecond

// errStopped is the cause of a replay that its judge ended.
type errStopped struct{ why string }

func (e errStopped) Error() string { return e.why }

// Replay brings what the plan wants onto the node, in order and behind demand.
// It returns when everything is there or has failed, when it turns out not to
// help, or when ctx ends. It never returns an error: a replay that fails
// leaves a lazy start, and Result says why.
//
// While demand reads other parts than the plan has, nothing is fetched; it goes
// on when demand meets the plan again, and ends when it does not.
func Replay(ctx context.Context, blobs backstore.Stack, p *Plan) Result {
	start := time.Now()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	r := replay{p: p, blobs: blobs, first: blobs.Stats(), stop: stop, resumed: make(chan struct{}, 1)}
	got := backstore.PrefetchResult{Here: p.drop(blobs.Has)}
	var err error
	if !p.empty() {
		err = r.run(ctx, &got)
	}
	result := Result{
		Used: got.Bytes+got.Here > 0, Took: time.Since(start),
		Wants: len(p.Wants), Need: p.Need, Asked: got.Bytes, Here: got.Here,
		Sent: got.Requests, Failed: got.Failed, Matched: p.Coverage(), Held: r.held,
	}
	result.Reason = reason(ctx, err, got)
	p.mu.Lock()
	defer p.mu.Unlock()
	result.Outside, result.Overtaken, result.Skipped = p.seen.OutBytes, p.seen.InBytes, p.skipped
	return result
}

func (p *Plan) empty() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.left == 0
}

func (p *Plan) isHeld() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held
}

// replay is a running [Replay].
type replay struct {
	p       *Plan
	blobs   backstore.Stack
	first   backstore.Stats // when it began
	stop    context.CancelCauseFunc
	resumed chan struct{} // told when the plan is not held any more
	held    int           // of the judge, until it has ended
}

// run prefetches, as often as it was held and goes on, beside its judge.
func (r *replay) run(ctx context.Context, got *backstore.PrefetchResult) (first error) {
	done := make(chan struct{})
	judged := make(chan struct{})
	go func() {
		defer close(judged)
		r.judge(done)
	}()
	defer func() {
		close(done)
		<-judged
	}()
	for {
		part, err := r.blobs.Prefetch(ctx, r.p, nil)
		got.Requests += part.Requests
		got.Bytes += part.Bytes
		got.Here += part.Here
		got.Failed += part.Failed
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			return first
		}
		if !r.p.wasHeld() {
			if first == nil && r.p.again(r.blobs.Has) {
				continue
			}
			return first
		}
		forget := r.blobs.Watch(r.p)
		for ctx.Err() == nil && r.p.isHeld() {
			select {
			case <-r.resumed:
			case <-ctx.Done():
			}
		}
		forget()
	}
}

// judge looks at the replay until it is done, and ends it if it is of no use.
func (r *replay) judge(done <-chan struct{}) {
	t := time.NewTicker(judgeEvery)
	defer t.Stop()
	var j judge
	last := goOn
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		held := r.p.isHeld()
		now := r.blobs.Stats()
		v := r.p.judge(&j, now.Used-r.first.Used, now.BackgroundBytes-r.first.BackgroundBytes)
		switch {
		case v == endWrong || v == endLate:
			r.stop(errStopped{r.p.why(v)})
			return
		case v == hold && last != hold:
			r.held++
		case held && !r.p.isHeld():
			select {
			case r.resumed <- struct{}{}:
			default: // it was told before
			}
		}
		last = v
	}
}

func (p *Plan) why(v verdict) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.why(v, p.skipped+p.passed(false), p.Bytes)
}

// wasHeld tells, once, whether Next has given out nothing because it was held.
func (p *Plan) wasHeld() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	broke := p.broke
	p.broke = false
	return broke
}

func reason(ctx context.Context, err error, got backstore.PrefetchResult) string {
	var stopped errStopped
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &stopped):
		return stopped.why
	case cause != nil:
		return "stopped: the container ended first"
	case errors.Is(err, backstore.ErrStopped):
		return err.Error()
	case err != nil:
		return fmt.Sprintf("%d requests failed and were left to demand, the first: %v", max(got.Failed, 1), err)
	}
	return Complete
}
