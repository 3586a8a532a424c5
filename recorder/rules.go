package recorder

import (
	"fmt"
	"math"
	"sync"
	"time"
)

// never is a time that has not come.
const never = time.Duration(-1)

// rules decide when a recording ends. Times are since Header.Start.
type rules struct {
	opts Options

	// Of the goroutine run: the last first touch, or never, and for how long reads
	// had waited by then.
	last, stalled time.Duration

	mu    sync.Mutex    // guards the following
	ready time.Duration // 0 not yet
	how   string        // it became ready
	over  string        // why nothing more will be read; empty if it may be
	stop  string        // why the caller stops; empty if it does not
}

func (s *rules) setReady(now time.Duration, how string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready == 0 {
		s.ready, s.how = max(now, time.Microsecond), how
	}
}

func (s *rules) setStop(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stop == "" {
		s.stop = "stop: " + why
	}
}

func (s *rules) setOver(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = why
}

func (s *rules) readyTime() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready
}

func (s *rules) touched(now, stalled time.Duration) { s.last, s.stalled = now, stalled }

// check returns the reason to stop now, or else how long, if nothing else
// happens, none will apply. stalled is for how long reads have waited so far.
func (s *rules) check(now, stalled time.Duration, events, bytes int64) (reason string, next time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	settled := s.settled(now, stalled)
	most := left(0, s.opts.MaxDuration, now)
	switch {
	case s.stop != "":
		return s.stop, 0
	case events >= int64(s.opts.MaxEvents):
		return fmt.Sprintf("events: %d", events), 0
	case bytes >= s.opts.MaxBytes:
		return fmt.Sprintf("bytes: %d", bytes), 0
	case s.ready > 0 && (settled <= 0 || s.over != ""):
		return "ready: " + s.how, 0
	case s.over != "":
		return "stop: " + s.over, 0
	case settled <= 0:
		return fmt.Sprintf("quiet: nothing new for %v", s.opts.Quiet), 0
	case most <= 0:
		return fmt.Sprintf("duration: %v", s.opts.MaxDuration), 0
	}
	return "", min(settled, most)
}

// settled is the time that is left of the tail or, before it is ready, of Quiet.
func (s *rules) settled(now, stalled time.Duration) time.Duration {
	// Nothing was quiet while a read waited.
	waited := max(stalled-s.stalled, 0)
	switch {
	case s.ready > 0 && s.opts.Settle > 0:
		quiet := left(max(s.ready, s.last)+waited, s.opts.Settle, now)
		return min(quiet, left(s.ready, s.opts.Tail, now))
	case s.ready > 0:
		return left(s.ready, s.opts.Tail, now)
	case s.last != never:
		return left(s.last+waited, s.opts.Quiet, now)
	}
	return math.MaxInt64
}

// left is the time from now to d after from; d may be the largest there is.
func left(from, d, now time.Duration) time.Duration {
	if d > math.MaxInt64-from {
		return math.MaxInt64
	}
	return from + d - now
}
