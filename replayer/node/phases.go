package node

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// Phases are the named steps of a start, each at its time since the beginning.
type Phases struct {
	start time.Time
	mu    sync.Mutex // guards list
	list  []Phase
}

// A Phase is a step that was reached.
type Phase struct {
	Name string        `json:"name"`
	At   time.Duration `json:"at_ns"`
}

// NewPhases starts the clock.
func NewPhases() *Phases { return &Phases{start: time.Now()} }

// phasesSince has the zero that another process has chosen.
func phasesSince(t time.Time) *Phases {
	if t.IsZero() {
		return NewPhases()
	}
	return &Phases{start: t}
}

// merged is two lists of the same zero in one, in order of time.
func merged(a, b []Phase) []Phase {
	all := append(append([]Phase(nil), a...), b...)
	slices.SortStableFunc(all, func(a, b Phase) int { return cmp.Compare(a.At, b.At) })
	return all
}

// Start is the zero of the phases.
func (p *Phases) Start() time.Time { return p.start }

func (p *Phases) mark(name string) { p.markAt(name, time.Now()) }

func (p *Phases) markAt(name string, t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list = append(p.list, Phase{name, t.Sub(p.start)})
}

// List returns the phases so far.
func (p *Phases) List() []Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Phase(nil), p.list...)
}
