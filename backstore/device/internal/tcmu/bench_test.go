package tcmu

import (
	"encoding/binary"
	"testing"
)

// rawEntry is the size of the entries that putRaw makes: a divisor of the
// ring's.
const rawEntry = 128

// putRaw puts a command with the CDB and 4 KiB of data into the ring.
func putRaw(mem []byte, at uint32, cdb ...byte) {
	ring := binary.NativeEndian.Uint32(mem[mailboxRing:])
	entry := mem[mailboxSize+at : mailboxSize+at+rawEntry]
	clear(entry)
	binary.NativeEndian.PutUint32(entry, rawEntry|opCmd)
	binary.NativeEndian.PutUint32(entry[entryIovCnt:], 1)
	binary.NativeEndian.PutUint64(entry[entryIov:], uint64(mailboxSize+ring))
	binary.NativeEndian.PutUint64(entry[entryIov+8:], 4096)
	binary.NativeEndian.PutUint64(entry[entryCDBOff:], uint64(mailboxSize+at+rawEntry-16))
	copy(entry[rawEntry-16:], cdb)
	binary.NativeEndian.PutUint32(mem[mailboxHead:], (at+rawEntry)%ring)
}

// oneRead has a worker, whose session is not started, read 4 KiB at a time.
func oneRead(t testing.TB) func() {
	mem := newMemory()
	r, err := newRing(mem)
	if err != nil {
		t.Fatal(err)
	}
	disk := &memory{data: make([]byte, 1<<20)}
	w := newWorker(&session{unit: testUnit(testUnitServer(disk), 512), ring: r})
	cdb := rw16(opRead16, 0, 8)
	return func() {
		putRaw(mem, r.next, cdb...)
		if ok, err := r.take(&w.cmd); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if w.execute(); w.answer.status != 0 {
			t.Fatal(w.answer)
		}
		if err := r.answer(w.cmd.id, &w.answer); err != nil {
			t.Fatal(err)
		}
	}
}

// BenchmarkCommand is what a 4 KiB read costs without the kernel, wake-ups and
// the backend: take it out of the ring, execute it, answer it.
func BenchmarkCommand(b *testing.B) {
	read := oneRead(b)
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		read()
	}
}

func TestCommandAllocatesNothing(t *testing.T) {
	read := oneRead(t)
	read() // the first time a list grows
	if n := testing.AllocsPerRun(100, read); n > 0 {
		t.Errorf("%v allocations a command", n)
	}
}
