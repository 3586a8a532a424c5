package backstore

import (
	"math/bits"
	"sync/atomic"
)

// bitset is a set of chunk numbers, read and written without a lock.
type bitset []atomic.Uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

func (s bitset) has(i int64) bool { return s[i>>6].Load()&(1<<(i&63)) != 0 }

// hasAll reports whether all of [from, to) is in the set.
func (s bitset) hasAll(from, to int64) bool {
	for from < to {
		mask, next := wordMask(from, to)
		if s[from>>6].Load()&mask != mask {
			return false
		}
		from = next
	}
	return true
}

// addAll puts [from, to) into the set and returns how many were new.
func (s bitset) addAll(from, to int64) (added int64) {
	for from < to {
		mask, next := wordMask(from, to)
		old := s[from>>6].Load()
		if old&mask != mask {
			old = s[from>>6].Or(mask)
			added += int64(bits.OnesCount64(mask &^ old))
		}
		from = next
	}
	return added
}

// removeAll takes [from, to) out of the set and returns how many were there.
func (s bitset) removeAll(from, to int64) (removed int64) {
	for from < to {
		mask, next := wordMask(from, to)
		old := s[from>>6].And(^mask)
		removed += int64(bits.OnesCount64(old & mask))
		from = next
	}
	return removed
}

// next returns the first number in [from, to) whose membership is want, or to.
func (s bitset) next(from, to int64, want bool) int64 {
	for from < to {
		mask, after := wordMask(from, to)
		w := s[from>>6].Load()
		if !want {
			w = ^w
		}
		if w &= mask; w != 0 {
			return from&^63 + int64(bits.TrailingZeros64(w))
		}
		from = after
	}
	return to
}

func (s bitset) count() (n int64) {
	for i := range s {
		n += int64(bits.OnesCount64(s[i].Load()))
	}
	return n
}

// wordMask gives the bits of [from, to) that lie in from's word, and the first
// number of the next word.
func wordMask(from, to int64) (mask uint64, next int64) {
	next = (from | 63) + 1
	mask = ^uint64(0) << (from & 63)
	if next > to {
		mask &= ^uint64(0) >> (next - to)
		next = to
	}
	return mask, next
}
