package recorder

import (
	"sync"

	"github.com/reprise-project/reprise/backstore"
)

// inboxSize is how many reads of some 50 bytes a buffer of an inbox holds. It
// is emptied when it is half full, or after a tenth of a second: a loss takes
// more than a million reads a second. Memory that is never used costs nothing.
const inboxSize = 1 << 17

// An inbox takes reads from many goroutines and gives them to one. While one
// buffer fills the other is being emptied.
type inbox struct {
	mu      sync.Mutex // guards all below but spare
	buf     []backstore.ReadEvent
	closed  bool
	reads   int64
	dropped int64

	spare []backstore.ReadEvent // of the reader
}

func (in *inbox) init() {
	in.buf = make([]backstore.ReadEvent, 0, inboxSize)
	in.spare = make([]backstore.ReadEvent, 0, inboxSize)
}

// put returns true if the inbox should be emptied soon.
func (in *inbox) put(e backstore.ReadEvent) bool {
	in.mu.Lock()
	if in.closed {
		in.mu.Unlock()
		return false
	}
	in.reads++
	if len(in.buf) == inboxSize {
		in.dropped++
		in.mu.Unlock()
		return false
	}
	in.buf = append(in.buf, e)
	n := len(in.buf)
	in.mu.Unlock()
	return n == inboxSize/2
}

// take returns what has come since the last call. It is valid until the next.
func (in *inbox) take() []backstore.ReadEvent {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.buf, in.spare = in.spare[:0], in.buf
	return in.spare
}

// close lets the inbox take no more.
func (in *inbox) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
}

func (in *inbox) counts() (reads, dropped int64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.reads, in.dropped
}
