package probe

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/bpf"
	"github.com/reprise-project/reprise/tracefmt"
)

// A Listen is a TCP socket that has begun to listen.
type Listen struct {
	At        time.Duration  // since Options.Start
	Addr      netip.AddrPort // port 0: the kernel had not yet chosen one
	Process   string         // name of the process
	Pid       int            // of it, as the host counts
	Container string         // that it is in; empty: none
	MountNS   uint64         // inode of the process's mount namespace
	NetNS     uint64         // inode of the socket's network namespace
}

func (p *Probe) run() {
	defer close(p.done)
	ticker := time.NewTicker(drainEvery)
	defer ticker.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-ticker.C:
		}
		p.mu.Lock()
		p.drain()
		p.mu.Unlock()
	}
}

// drain empties the ring. The caller holds p.mu.
func (p *Probe) drain() {
	if p.ring == nil {
		return
	}
	for p.ring.ReadInto(&p.record) == nil {
		p.take(p.record.RawSample)
	}
	p.inKernel = p.lost()
}

// lost counts what did not get into the ring: for want of room, and because the
// program was already running on its processor.
func (p *Probe) lost() (n int64) {
	var full []uint64
	if err := p.programs.Lost.Lookup(uint32(0), &full); err == nil {
		for _, c := range full {
			n += int64(c)
		}
	}
	for _, prog := range []*ebpf.Program{p.programs.BioQueue, p.programs.SockSetState} {
		if s, err := prog.Stats(); err == nil {
			n += int64(s.RecursionMisses)
		}
	}
	return n
}

// take is given what the programs have sent, which has the layout of their types
// in memory.
func (p *Probe) take(b []byte) {
	if len(b) < 4 {
		return
	}
	switch bpf.ProbeKind(binary.NativeEndian.Uint32(b)) {
	case bpf.ProbeKindREAD:
		if r, ok := as[bpf.ProbeRead](b); ok {
			p.takeRead(&r)
		}
	case bpf.ProbeKindDONE:
		if d, ok := as[bpf.ProbeDone](b); ok {
			p.takeDone(&d)
		}
	case bpf.ProbeKindLISTEN:
		if l, ok := as[bpf.ProbeListen](b); ok {
			p.takeListen(&l)
		}
	}
}

// as copies a T, which has no pointers.
func as[T bpf.ProbeRead | bpf.ProbeDone | bpf.ProbeListen](b []byte) (v T, ok bool) {
	size := int(unsafe.Sizeof(v))
	if len(b) < size {
		return v, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&v)), size), b)
	return v, true
}

// A read is one that the kernel has queued.
type read struct {
	at     uint64           // when
	events []tracefmt.Event // of each device that it is of, at least one
	done   bool             // it has completed, or will never be known to have
}

func (p *Probe) takeRead(r *bpf.ProbeRead) {
	e := tracefmt.Event{At: p.clock.since(r.At), Process: unix.ByteSliceToString(r.Comm[:]), Pid: int(r.Pid)}
	if r.Flags&bpf.ProbeFlagsKERNEL == 0 {
		e.Container = p.names.of(uint64(r.MntNs), e.Pid)
	}
	v := &read{at: r.At}
	for i := range p.devices {
		var ok bool
		if e.Off, e.Len, ok = p.devices[i].clip(r); ok {
			e.Layer = i
			v.events = append(v.events, e)
		}
	}
	if len(v.events) == 0 {
		return
	}
	if len(p.reads) >= maxReads {
		p.stats.Lost++
		return
	}
	p.stats.Reads++
	if r.Flags&bpf.ProbeFlagsKERNEL != 0 {
		p.stats.Kernel++
	}
	if r.Flags&bpf.ProbeFlagsREADAHEAD != 0 {
		p.stats.ReadAhead++
	}
	p.reads = append(p.reads, v)
	p.fly(r.Bio, v)
}

// fly waits for a read to complete. If its bio was that of another, that one has,
// unseen. Beyond what a machine can have under way, those that were not seen to
// complete are forgotten.
func (p *Probe) fly(bio uint64, v *read) {
	if old := p.flying[bio]; old != nil {
		old.done = true
	}
	if len(p.flying) >= maxFlying {
		for _, old := range p.flying {
			old.done = true
		}
		clear(p.flying)
	}
	p.flying[bio] = v
}

func (p *Probe) takeDone(d *bpf.ProbeDone) {
	v := p.flying[d.Bio]
	if v == nil || d.At < v.at {
		return // of before the probe, or of another container's
	}
	delete(p.flying, d.Bio)
	v.done = true
	for i := range v.events {
		v.events[i].Wait = time.Duration(d.At - v.at)
	}
}

func (p *Probe) takeListen(l *bpf.ProbeListen) {
	p.stats.Listens++
	addr := netip.AddrFrom4([4]byte(l.Addr[:4]))
	if l.Family == unix.AF_INET6 {
		addr = netip.AddrFrom16(l.Addr)
	}
	v := Listen{
		At: p.clock.since(l.At), Addr: netip.AddrPortFrom(addr, uint16(l.Port)),
		Process: unix.ByteSliceToString(l.Comm[:]), Pid: int(l.Pid),
		MountNS: uint64(l.MntNs), NetNS: uint64(l.NetNs),
	}
	v.Container = p.names.of(v.MountNS, v.Pid)
	select {
	case p.listens <- v:
	default:
		p.stats.Lost++
	}
}

// A clock turns CLOCK_MONOTONIC, which is the programs' clock, into the time
// since Options.Start.
type clock struct{ zero int64 }

func newClock(start time.Time) clock {
	return clock{monotonic() - int64(time.Since(start))}
}

func monotonic() int64 {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail
	return now.Nano()
}

func (c clock) now() time.Duration { return time.Duration(monotonic() - c.zero) }

func (c clock) since(ns uint64) time.Duration { return time.Duration(int64(ns) - c.zero) }

// mountNamespace returns the inode of the mount namespace of a process.
func mountNamespace(pid int) (uint64, error) {
	var st unix.Stat_t
	path := fmt.Sprintf("/proc/%d/ns/mnt", pid)
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}
