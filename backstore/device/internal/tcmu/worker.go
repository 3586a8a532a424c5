package tcmu

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// A worker executes one command at a time.
type worker struct {
	s      *session
	unit   *unit
	req    *request.Worker
	wake   chan struct{} // there is a command in cmd; closed at the end
	cmd    command
	answer answer
	bounce []byte // maxTransfer bytes, once needed
	reply  [replySize]byte

	pending bool // cmd has no answer; guarded by s.mu
}

// replySize is the longest data that the device itself makes up.
const replySize = 512

func newWorker(s *session) *worker {
	return &worker{s: s, unit: s.unit, req: s.unit.srv.Worker(), wake: make(chan struct{}, 1)}
}

func (w *worker) run() {
	defer w.release()
	for range w.wake {
		for more := true; more; {
			w.execute()
			more = w.s.finished(w)
			w.s.send()
		}
	}
}

func (w *worker) release() {
	w.req.Release()
	if w.bounce != nil {
		unix.Munmap(w.bounce)
	}
}

// execute makes the answer to the command.
func (w *worker) execute() {
	w.answer = answer{}
	if s := w.do(); s != (sense{}) {
		w.answer.status, w.answer.sense = statusCheck, s
	}
}

// do executes the command; its zero result is success.
func (w *worker) do() sense {
	c := &w.cmd.cdb
	switch op := c[0]; op {
	case opRead6, opRead10, opRead12, opRead16:
		return w.transfer(false)
	case opWrite6, opWrite10, opWrite12, opWrite16:
		return w.transfer(true)
	case opSyncCache10, opSyncCache16:
		return w.sync()
	case opUnmap:
		return w.unmap()
	case opWriteSame10, opWriteSame16:
		return w.writeSame()
	case opVerify10, opVerify12, opVerify16:
		return w.verify()
	case opTestUnitReady, opStartStop:
		return sense{}
	case opModeSelect6, opModeSelect10:
		return w.modeSelect()
	}
	n, s := w.unit.inquire(&w.reply, c)
	if s == (sense{}) {
		w.put(w.reply[:n], allocation(c))
	}
	return s
}

// put gives the initiator what fits of p, and zeros for the rest.
func (w *worker) put(p []byte, allocated int) {
	p = p[:min(len(p), allocated)]
	if n := w.cmd.size(); len(p) < n {
		w.answer.read = uint32(len(p))
	}
	for _, d := range w.cmd.data {
		n := copy(d, p)
		clear(d[n:])
		p = p[n:]
	}
}

// transfer reads or writes.
func (w *worker) transfer(write bool) sense {
	off, n, fua, bad := w.unit.extent(&w.cmd.cdb)
	switch {
	case bad != sense{}:
		return bad
	case n > maxTransfer, n > int64(w.cmd.size()):
		return senseField
	case n == 0:
		return sense{}
	case w.s.refuse.Load():
		return senseFailed
	}
	p, err := w.buffer(int(n))
	if err != nil {
		return senseFailed
	}
	direct := len(w.cmd.data) == 1
	if !write {
		e := w.req.Read(p, off)
		if !direct && e == 0 {
			w.scatter(p)
		}
		return senseOf(e)
	}
	if !direct {
		w.gather(p)
	}
	e := w.req.Write(p, off)
	if e == 0 && fua {
		return w.sync()
	}
	return senseOf(e)
}

// buffer is the command's own memory, if that is in one piece.
func (w *worker) buffer(n int) ([]byte, error) {
	if len(w.cmd.data) == 1 {
		return w.cmd.data[0][:n], nil
	}
	if w.bounce == nil {
		b, err := request.Map(maxTransfer)
		if err != nil {
			return nil, err
		}
		w.bounce = b
	}
	return w.bounce[:n], nil
}

func (w *worker) scatter(p []byte) {
	for _, d := range w.cmd.data {
		p = p[copy(d, p):]
	}
}

// gather copies the command's data to p, and reports how much there was.
func (w *worker) gather(p []byte) (n int) {
	for _, d := range w.cmd.data {
		n += copy(p[n:], d)
	}
	return n
}

func (w *worker) sync() sense {
	if w.s.refuse.Load() {
		return senseFailed
	}
	if e := w.req.Sync(); e != 0 && e != unix.ENOSYS { // a backend that needs no sync
		return senseOf(e)
	}
	return sense{}
}

// verify looks at nothing: blocks have their own checksums, and an error shows
// when they are read.
func (w *worker) verify() sense {
	const byteCheck = 6
	if w.cmd.cdb[1]&byteCheck != 0 {
		return senseField
	}
	_, _, _, bad := w.unit.extent(&w.cmd.cdb)
	return bad
}

// unmap discards a list of ranges.
func (w *worker) unmap() sense {
	if !w.unit.discards() {
		return senseOpcode
	}
	n := w.gather(w.reply[:])
	const header, descriptor = 8, 16
	if n < header {
		return sense{} // an empty list
	}
	list := w.reply[header:n]
	if size := int(binary.BigEndian.Uint16(w.reply[2:])); size < len(list) {
		list = list[:size]
	}
	if len(list) > maxUnmaps*descriptor {
		return senseParameter
	}
	for ; len(list) >= descriptor; list = list[descriptor:] {
		lba, blocks := binary.BigEndian.Uint64(list), binary.BigEndian.Uint32(list[8:])
		off, n, bad := w.unit.bytes(lba, uint64(blocks))
		if bad == (sense{}) {
			bad = w.discard(off, n)
		}
		if bad != (sense{}) {
			return bad
		}
	}
	return sense{}
}

func (w *worker) discard(off, n int64) sense {
	switch {
	case w.s.refuse.Load():
		return senseFailed
	case n == 0:
		return sense{}
	}
	return senseOf(w.req.Discard(off, n))
}

// writeSame fills a range with one block. Only zeros are supported, which is
// all that the block layer asks for: a range that was discarded reads as such.
func (w *worker) writeSame() sense {
	const anchor, noData = 1 << 4, 1 << 0
	c := &w.cmd.cdb
	if !w.unit.discards() {
		return senseOpcode
	}
	off, n, _, bad := w.unit.extent(c)
	if bad != (sense{}) {
		return bad
	}
	if c[1]&anchor != 0 || n == 0 {
		return senseField
	}
	if c[0] != opWriteSame16 || c[1]&noData == 0 {
		if w.cmd.size() < w.unit.sector {
			return senseField
		}
		for _, d := range w.cmd.data {
			if !zero(d) {
				return senseField
			}
		}
	}
	return w.discard(off, n)
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// modeSelect accepts what is already so.
func (w *worker) modeSelect() sense {
	p := w.reply[:w.gather(w.reply[:])]
	header := 4
	if w.cmd.cdb[0] == opModeSelect10 {
		header = 8
	}
	if len(p) == 0 {
		return sense{}
	}
	if len(p) < header {
		return senseLength
	}
	blockDescriptors := int(p[3])
	if header == 8 {
		blockDescriptors = int(binary.BigEndian.Uint16(p[6:]))
	}
	if blockDescriptors > len(p)-header {
		return senseLength
	}
	return w.unit.accept(p[header+blockDescriptors:])
}
