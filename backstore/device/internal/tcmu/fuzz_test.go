package tcmu

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// FuzzRing takes commands out of whatever is in the shared memory, executes
// them and answers them.
func FuzzRing(f *testing.F) {
	const ring = 4 * rawEntry
	seed := bytes.Clone(newMemory()[:mailboxSize+ring+testPage])
	binary.NativeEndian.PutUint32(seed[mailboxRing:], ring)
	f.Add(bytes.Clone(seed))
	for i, op := range []byte{opRead6, opInquiry, opUnmap} {
		putRaw(seed, uint32(i*rawEntry), op)
	}
	f.Add(bytes.Clone(seed))
	binary.NativeEndian.PutUint32(seed[mailboxSize:], rawEntry|opPad)
	f.Add(seed)
	disk := &memory{data: make([]byte, 1<<16)}
	srv := testUnitServer(disk)
	s := &session{unit: testUnit(srv, 512)}
	w := newWorker(s)
	f.Fuzz(func(t *testing.T, content []byte) {
		mem := make([]byte, (len(content)+7)&^7) // aligned
		copy(mem, content)
		r, err := newRing(mem)
		if err != nil {
			return
		}
		for range 2 * len(mem) / entrySize { // a head where no entry ends makes it endless
			ok, err := r.take(&w.cmd)
			if err != nil || !ok {
				return
			}
			w.execute()
			if err := r.answer(w.cmd.id, &w.answer); err != nil {
				t.Fatal(err)
			}
			if r.next >= r.size || r.answers >= r.size {
				t.Fatal("out of the ring")
			}
		}
	})
}

// FuzzCommand executes a command with data in one piece, and once more in two:
// the results must be the same.
func FuzzCommand(f *testing.F) {
	for _, op := range []byte{opInquiry, opModeSense6, opModeSense10, opModeSelect6, opServiceIn16, opMaintenanceIn, opRead6, opRead10, opUnmap} {
		f.Add([]byte{op, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, []byte("data that is there"), false)
	}
	f.Add(rw16(opRead16, 100, 8), make([]byte, 4096), false)
	f.Add(rw16(opWrite16, 127, 1), make([]byte, 512), true)
	f.Add(rw16(opWriteSame16, 3, 5), make([]byte, 512), false)
	pattern := make([]byte, 1<<16)
	for i := range pattern {
		pattern[i] = byte(i >> 8)
	}
	f.Fuzz(func(t *testing.T, cdb, data []byte, readOnly bool) {
		if len(data) > maxTransfer {
			return
		}
		var answers [2]answer
		var disks, results [2]string
		for i := range 2 {
			disk := &memory{data: bytes.Clone(pattern)}
			c := disk.config()
			c.ReadOnly = readOnly
			srv := request.New(disk, c)
			w := newWorker(&session{unit: testUnit(srv, 512)})
			copy(w.cmd.cdb[:], cdb)
			half := len(data) / 2 * i
			a, b := bytes.Clone(data[:half]), bytes.Clone(data[half:])
			w.cmd.data = [][]byte{b}
			if i == 1 {
				w.cmd.data = [][]byte{a, b}
			}
			w.execute()
			w.release()
			answers[i], disks[i], results[i] = w.answer, string(disk.data), string(a)+string(b)
		}
		if answers[0] != answers[1] || disks[0] != disks[1] || results[0] != results[1] {
			t.Errorf("CDB %x: in one piece %+v, in two %+v, or other bytes", cdb, answers[0], answers[1])
		}
		if readOnly && disks[0] != string(pattern) {
			t.Errorf("CDB %x wrote to a read-only disk", cdb)
		}
	})
}
