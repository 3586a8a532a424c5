package replayer

import (
	"container/heap"
	"time"
)

// simClock is a virtual clock: it runs what is due, in order of time and then
// of asking, and never waits.
type simClock struct {
	now  time.Duration
	turn int
	due  simDues
}

// after runs do so long from now.
func (c *simClock) after(d time.Duration, do func()) {
	c.turn++
	heap.Push(&c.due, simDue{c.now + d, c.turn, do})
}

// run returns when nothing is due any more.
func (c *simClock) run() {
	for len(c.due) > 0 {
		d := heap.Pop(&c.due).(simDue)
		c.now = d.at
		d.do()
	}
}

type simDue struct {
	at   time.Duration
	turn int
	do   func()
}

type simDues []simDue

func (s simDues) Len() int      { return len(s) }
func (s simDues) Swap(i, j int) { s[i], s[j] = s[j], s[i] }
func (s *simDues) Push(v any)   { *s = append(*s, v.(simDue)) }

func (s simDues) Less(i, j int) bool {
	if s[i].at != s[j].at {
		return s[i].at < s[j].at
	}
	return s[i].turn < s[j].turn
}

func (s *simDues) Pop() any {
	last := len(*s) - 1
	d := (*s)[last]
	(*s)[last].do = nil
	*s = (*s)[:last]
	return d
}

// simSet is a set of chunk numbers.
type simSet []uint64

func newSimSet(n int64) simSet { return make(simSet, (n+63)/64) }

func (s simSet) has(i int64) bool { return s[i>>6]&(1<<(i&63)) != 0 }

func (s simSet) add(from, to int64) {
	for ; from < to; from++ {
		s[from>>6] |= 1 << (from & 63)
	}
}

// next returns the first number of [from, to) whose membership is want, or to.
func (s simSet) next(from, to int64, want bool) int64 {
	for from < to {
		if from&63 == 0 && to-from >= 64 {
			if w := s[from>>6]; want && w == 0 || !want && w == ^uint64(0) {
				from += 64
				continue
			}
		}
		if s.has(from) == want {
			return from
		}
		from++
	}
	return to
}

// count is how many of [from, to) are in the set.
func (s simSet) count(from, to int64) (n int64) {
	for ; from < to; from++ {
		if s.has(from) {
			n++
		}
	}
	return n
}
