package replayer

import (
	"fmt"

	"github.com/reprise-project/reprise/backstore"
)

// What makes a replay a wrong one: wrongReads demand misses outside of the
// plan, of more bytes than demand reads of what the plan brings meanwhile, and
// wrongBytes that lie unused. It is held then, until demand meets the plan again,
// and given up when that takes giveUp misses or has happened maxHolds times with
// less than goodBytes found in between; from the second time on half as many
// misses will do. Before demand begins there is no evidence, so that a replay
// may run far ahead of a container that is slow to start.
const (
	wrongReads = 4
	wrongBytes = 512 << 10
	giveUp     = 16
	maxHolds   = 4
	goodBytes  = 256 << 10
)

// What makes a replay a late one: lateReads demand misses in a row were of
// ranges that it had not come to, and lateBytes lie between where it is and the
// first of them. These are left to demand; it is given up when that is
// half of the plan.
const (
	lateReads = 16
	lateBytes = 1 << 20
)

// What a plan on trial gives out: trialBytes more than demand has met of it,
// until that is provenBytes, and demand is not mostly elsewhere. The start of a
// shell or of Python is the same in many workloads, and proves nothing.
const (
	trialBytes  = 1 << 20
	provenBytes = 2 << 20
)

// doubtReads demand misses outside of the plan, of more than half the bytes that
// it has brought of use, make it doubtful.
const doubtReads = 2

// meeting is how demand has met a plan.
type meeting struct {
	OutReads int   // misses outside of the plan
	OutBytes int64 // of them

	InReads int              // misses of ranges that the replay had not come to
	InBytes int64            // of them
	turns   [lateReads]int32 // of the last of them, a ring

	Used    int64 // bytes brought that were read, as far as is known
	Brought int64 // bytes brought
}

func (m *meeting) outside(n int64) {
	m.OutReads++
	m.OutBytes += n
}

// met is how many bytes of the plan demand has read, as far as is known.
func (m *meeting) met() int64 { return m.Used + m.InBytes }

// doubtful tells whether demand is mostly elsewhere. p.mu is held.
func (p *Plan) doubtful() bool {
	return p.seen.OutReads >= doubtReads && p.seen.OutBytes > p.seen.met()/2
}

// untried tells whether a plan on trial has given out enough. p.mu is held.
func (p *Plan) untried() bool {
	if p.trial && p.seen.met() >= provenBytes && !p.doubtful() {
		p.trial = false
	}
	return p.trial && p.given >= trialBytes+p.seen.met()
}

// meet notes a miss that touches atoms. p.mu is held.
func (p *Plan) meet(atoms []*atom, w backstore.Want) {
	var n int64
	turn := int32(-1)
	for _, a := range atoms {
		if a.piece == 0 {
			n += min(a.end, w.Off+w.Len) - max(a.off, w.Off)
			turn = max(turn, a.turn)
		}
	}
	if turn < 0 {
		return // asked for already, and on its way to be sent
	}
	p.seen.turns[p.seen.InReads%lateReads] = turn
	p.seen.InReads++
	p.seen.InBytes += n
}

// A verdict is what becomes of a replay.
type verdict int

const (
	goOn     verdict = iota
	hold             // until demand meets the plan
	skip             // what demand has passed
	endWrong         // for good
	endLate
)

func (v verdict) String() string {
	return [...]string{"go on", "hold", "skip what demand has passed", "end: wrong", "end: late"}[v]
}

// A judge looks at a replay from time to time.
type judge struct {
	held  bool
	holds int     // of late
	good  int64   // bytes used when it was last held
	last  meeting // when demand last met the plan, or the replay was held
	late  meeting // when lateness was last looked at
}

// look gives the verdict. passed are the bytes of the plan that demand has
// overtaken if it is late, skipped those that were left to it before, of all.
func (j *judge) look(m meeting, passed, skipped, all int64) verdict {
	found := m.Used - j.last.Used + m.InBytes - j.last.InBytes
	missed, reads := m.OutBytes-j.last.OutBytes, m.OutReads-j.last.OutReads
	switch {
	case found > 0 && found >= missed:
		j.last, j.held = m, false
		if m.Used-j.good >= goodBytes {
			j.holds = 0
		}
	case j.held && reads >= giveUp:
		return endWrong
	case j.held || m.Brought-m.Used < wrongBytes:
		// It goes on to be, or there is little to lose.
	case reads >= wrongReads, reads >= wrongReads/2 && j.holds > 0:
		if j.holds == maxHolds {
			return endWrong
		}
		j.last, j.good, j.held = m, m.Used, true
		j.holds++
	}
	if j.held {
		return hold
	}
	return j.lateness(m, passed, skipped, all)
}

func (j *judge) lateness(m meeting, passed, skipped, all int64) verdict {
	if m.InReads-j.late.InReads < lateReads {
		return goOn
	}
	overtakes := m.InBytes-j.late.InBytes > m.Used-j.late.Used
	j.late = m
	switch {
	case !overtakes || passed < lateBytes:
		return goOn
	case skipped+passed > all/2:
		return endLate
	}
	return skip
}

// passed finds the ranges that nobody has fetched and that the last demand
// misses were all ahead of; with drop, they are left to demand. p.mu is held.
func (p *Plan) passed(drop bool) (n int64) {
	if p.seen.InReads < lateReads {
		return 0
	}
	first := p.seen.turns[0]
	for _, t := range p.seen.turns {
		first = min(first, t)
	}
	for i := p.next; i < int(first); i++ {
		a := &p.atoms[i]
		if a.piece != 0 {
			continue
		}
		n += a.end - a.off
		if drop {
			p.tag(a)
		}
	}
	if drop {
		p.skipped += n
	}
	return n
}

// judge looks at the replay, with what the backstore knows, and does what the
// verdict says.
func (p *Plan) judge(j *judge, used, brought int64) verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen.Used, p.seen.Brought = used, brought
	v := j.look(p.seen, p.passed(false), p.skipped, p.Bytes)
	if v == skip {
		p.passed(true)
	}
	p.held = v == hold || v == endWrong || v == endLate || p.untried()
	return v
}

// why says in what a verdict lies.
func (m meeting) why(v verdict, skipped, all int64) string {
	switch v {
	case endWrong:
		return fmt.Sprintf("stopped: demand reads other parts than the trace says (%d reads of %s outside of it, %s of %s fetched were read); it is of another workload, record again",
			m.OutReads, mib(m.OutBytes), mib(m.Used), mib(m.Brought))
	case endLate:
		return fmt.Sprintf("stopped: demand was faster (%d reads of %s before the replay came to them, %s of %s passed)",
			m.InReads, mib(m.InBytes), mib(skipped), mib(all))
	}
	return ""
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
