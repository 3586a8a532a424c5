package backstore

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/zfile"
)

// decoded keeps decoded blocks of remote layers, for all images of a cache: a
// block of 16 or 64 KiB would otherwise be decoded anew for every 4 KiB of it
// that are read. It is safe for concurrent use.
//
// Blocks lie in frames of memory outside of the Go heap, those of one frame
// having the same size. A frame is filled, is kept while its blocks are read
// (CLOCK, with the frame as the unit), and is emptied whole. It is not emptied
// while it is held: by those who read a block in it or write one to it. So a
// cache of n bytes never has more than n, whatever goes on; who finds no room
// goes without.
//
// A block that is wanted by several at once is decoded by the first, see claim.
type decoded struct {
	shards []decodedShard
	epoch  atomic.Uint32 // counts sweeps
}

const (
	frameData = 64 << 10
	// frameBytes has room for zfile.Slack behind each of a frame's blocks.
	frameBytes = frameData + 4096
	// minKept is the smallest block that is kept: those of 4 KiB hold no more
	// than a read.
	minKept  = 8 << 10
	maxSlots = frameData / minKept
	// slotSpace is what a block takes more than its size. It keeps blocks
	// aligned to cache lines.
	slotSpace = 64

	maxShards = 16
	// idleSweeps is how many sweeps a frame stays that nobody has read.
	idleSweeps = 10
)

// decodedShard has a part of the blocks and of the frames.
type decodedShard struct {
	max int // frames

	mu     sync.Mutex // guards the fields below
	done   sync.Cond  // a block is not being decoded any more
	index  map[blockKey]*slot
	frames []*frame
	hand   int          // of the clock
	filled []*frame     // the one of each block size that takes new blocks
	stats  DecodedStats // without Bytes
}

// blockKey names a block of a blob that is open.
type blockKey struct {
	blob  uint64 // Blob.number
	block int
}

// frame holds blocks of one size.
type frame struct {
	mem   []byte
	size  int          // of a block
	slots []slot       // as many as fit
	used  int          // slots given out since it was emptied
	held  atomic.Int32 // rises under the shard's lock only
	hot   bool         // read since the clock's hand was here
	epoch uint32       // of the last use
}

// slot is the place of a block.
type slot struct {
	f     *frame
	mem   []byte // the block and zfile.Slack
	key   blockKey
	ready bool
}

// release ends the use of a slot that was found or claimed.
func (s *slot) release() { s.f.held.Add(-1) }

// newDecoded returns a cache of at most max bytes, nil where these hold nothing.
func newDecoded(maxBytes int64) *decoded {
	frames := int(max(maxBytes, 0) / frameBytes)
	if frames == 0 {
		return nil
	}
	shards := 1
	for shards < maxShards && frames/(2*shards) >= maxSlots {
		shards *= 2
	}
	d := &decoded{shards: make([]decodedShard, shards)}
	for i := range d.shards {
		sh := &d.shards[i]
		sh.max = frames / shards
		sh.done.L = &sh.mu
		sh.index = map[blockKey]*slot{}
	}
	return d
}

func (d *decoded) shard(k blockKey) *decodedShard {
	h := (k.blob<<32 ^ uint64(k.block)) * 0x9e3779b97f4a7c15
	return &d.shards[h>>32&uint64(len(d.shards)-1)]
}

// find returns a block that is there, held, or nil.
func (d *decoded) find(k blockKey) *slot {
	sh := d.shard(k)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s := sh.index[k]
	if s == nil || !s.ready {
		return nil
	}
	sh.stats.Hits++
	return sh.hold(s, d.epoch.Load())
}

// claim returns a block that is there, after waiting for one who decodes it, or
// a place for it, both held. Into a place, which is not ready, the caller is to
// decode the block and then call settle. It returns nil where there is no room.
// Who claims several blocks of a blob does it in their order.
func (d *decoded) claim(k blockKey, size int) *slot {
	sh := d.shard(k)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for {
		s := sh.index[k]
		if s == nil {
			break
		}
		if s.ready {
			sh.stats.Hits++
			return sh.hold(s, d.epoch.Load())
		}
		sh.done.Wait()
	}
	sh.stats.Misses++
	f := sh.room(size)
	if f == nil {
		return nil
	}
	s := &f.slots[f.used]
	f.used++
	s.key, s.ready = k, false
	sh.index[k] = s
	return sh.hold(s, d.epoch.Load())
}

// settle says whether the block of a claimed place has been decoded. The slot
// stays held; its memory is not to be used if it has not.
func (d *decoded) settle(s *slot, ok bool) {
	sh := d.shard(s.key)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if s.ready = ok; !ok {
		if sh.index[s.key] == s { // it may have been dropped
			delete(sh.index, s.key)
		}
		if f := s.f; s == &f.slots[f.used-1] {
			f.used--
		}
	}
	sh.done.Broadcast()
}

// hold keeps the frame of a slot. sh.mu is held.
func (sh *decodedShard) hold(s *slot, epoch uint32) *slot {
	s.f.held.Add(1)
	s.f.epoch = epoch
	if s.ready {
		s.f.hot = true
	}
	return s
}

// room returns a frame that has room for a block, or nil. sh.mu is held.
func (sh *decodedShard) room(size int) *frame {
	for i, f := range sh.filled {
		if f.size != size {
			continue
		}
		if f.used < len(f.slots) {
			return f
		}
		sh.filled = append(sh.filled[:i], sh.filled[i+1:]...)
		break
	}
	f := sh.empty()
	if f != nil {
		f.format(size)
		sh.filled = append(sh.filled, f)
	}
	return f
}

// empty returns a frame without blocks: a new one while there may be more, else
// the first that the clock's hand meets that is neither hot nor held.
func (sh *decodedShard) empty() *frame {
	if len(sh.frames) < sh.max {
		mem, err := unix.Mmap(-1, 0, frameBytes, unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
		if err != nil {
			return nil
		}
		f := &frame{mem: mem}
		sh.frames = append(sh.frames, f)
		return f
	}
	for range 2 * len(sh.frames) {
		sh.hand = (sh.hand + 1) % len(sh.frames)
		f := sh.frames[sh.hand]
		switch {
		case f.held.Load() > 0:
		case f.hot:
			f.hot = false
		default:
			sh.clear(f)
			return f
		}
	}
	return nil
}

// clear takes the blocks of a frame that is not held out of the shard.
func (sh *decodedShard) clear(f *frame) {
	for i := range f.slots[:f.used] {
		if s := &f.slots[i]; sh.index[s.key] == s {
			delete(sh.index, s.key)
		}
	}
	f.used = 0
	for i, g := range sh.filled {
		if f == g {
			sh.filled = append(sh.filled[:i], sh.filled[i+1:]...)
			break
		}
	}
}

// format divides an empty frame.
func (f *frame) format(size int) {
	f.hot = false
	if f.size == size {
		return
	}
	f.size = size
	f.slots = make([]slot, frameData/size)
	for i := range f.slots {
		at := i * (size + slotSpace)
		f.slots[i] = slot{f: f, mem: f.mem[at : at+size+zfile.Slack : at+size+zfile.Slack]}
	}
}

// drop forgets the blocks of a blob.
func (d *decoded) drop(blob uint64) {
	if d == nil {
		return
	}
	d.prune(func(s *slot) bool { return s.key.blob == blob })
}

// sweep gives memory back that nobody has used for idleSweeps sweeps.
func (d *decoded) sweep() {
	if d == nil {
		return
	}
	now := d.epoch.Add(1)
	d.prune(func(s *slot) bool { return now-s.f.epoch > idleSweeps })
}

// close forgets everything.
func (d *decoded) close() {
	if d == nil {
		return
	}
	d.prune(func(*slot) bool { return true })
}

// prune forgets the blocks of which that is said, and unmaps the frames that
// have no others and are not held. A block that is being decoded may be among
// them: it is not kept then.
func (d *decoded) prune(forget func(*slot) bool) {
	for i := range d.shards {
		sh := &d.shards[i]
		sh.mu.Lock()
		for k, s := range sh.index {
			if forget(s) {
				delete(sh.index, k)
			}
		}
		sh.shrink()
		sh.mu.Unlock()
	}
}

// shrink unmaps the frames without blocks. sh.mu is held.
func (sh *decodedShard) shrink() {
	kept := sh.frames[:0]
	for _, f := range sh.frames {
		if f.held.Load() > 0 || sh.has(f) {
			kept = append(kept, f)
			continue
		}
		sh.clear(f)
		_ = unix.Munmap(f.mem)
	}
	clear(sh.frames[len(kept):])
	sh.frames, sh.hand = kept, 0
}

func (sh *decodedShard) has(f *frame) bool {
	for i := range f.slots[:f.used] {
		if s := &f.slots[i]; sh.index[s.key] == s {
			return true
		}
	}
	return false
}

// DecodedStats tells what a cache of decoded blocks has done.
type DecodedStats struct {
	Hits   int64 `json:"hits"`   // reads of a block that was there
	Misses int64 `json:"misses"` // blocks that were decoded to be kept
	Bytes  int64 `json:"bytes"`  // of memory that it has now
}

// Decoded returns the figures of the decoded blocks that the cache keeps.
func (c *Cache) Decoded() DecodedStats { return c.decoded.figures() }

func (d *decoded) figures() (st DecodedStats) {
	if d == nil {
		return st
	}
	for i := range d.shards {
		sh := &d.shards[i]
		sh.mu.Lock()
		st.Hits += sh.stats.Hits
		st.Misses += sh.stats.Misses
		st.Bytes += int64(len(sh.frames)) * frameBytes
		sh.mu.Unlock()
	}
	return st
}
