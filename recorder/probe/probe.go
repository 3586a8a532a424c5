// Package probe tells, by eBPF, who reads a block device and when a process
// begins to listen.
//
// A [Probe] watches from Start to Close. What it sees lies in a buffer that it
// shares with the kernel and empties ten times a second; events that find no
// room are lost, and counted in Stats. Nothing here slows down or changes what
// is watched.
//
// A read is told of with the process in whose context the kernel has queued it:
// that is the one that reads, also where the kernel reads ahead for it. Some reads are queued by threads of the kernel instead, those of
// device-mapper's crypt and verity targets for instance; they are told under the
// thread's name (kworker/…) and counted, and belong to no container.
//
// A container is known by its mount namespace, which works with cgroups of
// either version. Its name is its id as container runtimes put it into the name
// of its cgroup, else mnt:[INODE], as /proc/PID/ns/mnt has it; what runs in the
// mount namespace of process 1, or in that of this process, is in no container.
//
// All methods are safe for concurrent use.
package probe

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/reprise-project/reprise/bpf"
	"github.com/reprise-project/reprise/tracefmt"
)

// Options say what to watch.
type Options struct {
	// Devices are the block devices whose reads are watched, whole disks or
	// partitions, as the st_rdev of their nodes. None: no reads, until AddDevice.
	Devices []uint64

	// Listen watches for TCP sockets that begin to listen.
	Listen bool

	// Filter leaves out, in the kernel, what is not done in one of Containers
	// or of AddContainer.
	Filter bool

	// Containers are the inodes of mount namespaces.
	Containers []uint64

	// Start is the zero of all times. Default: now.
	Start time.Time

	// Buffer is the size of the buffer, bytes; it is rounded up to a power of
	// two, and to a page. A read takes 104. Default 4 MiB.
	Buffer int
}

func (o *Options) filled() Options {
	var f Options
	if o != nil {
		f = *o
	}
	if f.Start.IsZero() {
		f.Start = time.Now()
	}
	if f.Buffer <= 0 {
		f.Buffer = 4 << 20
	}
	size := os.Getpagesize()
	for size < f.Buffer && size < math.MaxInt32/2 {
		size *= 2
	}
	f.Buffer = size
	return f
}

const (
	drainEvery = 100 * time.Millisecond
	maxReads   = tracefmt.MaxEvents // that wait for Reads
	maxFlying  = 1 << 16            // that have not completed
	maxListens = 1024               // that wait in Listens
)

// Stats are counts so far.
type Stats struct {
	Reads     int64 // that were seen, Lost not counted
	Kernel    int64 // of them, by threads of the kernel
	ReadAhead int64 // of them, by the kernel's read-ahead: what was asked for may be among it
	Listens   int64 // that were seen
	Lost      int64 // reads and listens that found no room, or no free program
}

// A Probe watches block devices and sockets.
type Probe struct {
	opts     Options
	clock    clock
	names    names
	programs bpf.ProbeObjects
	listens  chan Listen
	stop     chan struct{}
	done     chan struct{} // closed when run has ended

	mu       sync.Mutex // guards the following, and that programs is open
	devices  []target
	links    []link.Link
	ring     *ringbuf.Reader
	record   ringbuf.Record
	reads    []*read          // for Reads
	flying   map[uint64]*read // those that have not completed, by their bio
	stats    Stats            // Lost: those lost on this side of the buffer
	inKernel int64            // lost on the kernel's side, when it was last asked
	closed   bool
	err      error // of Close
}

// Start begins to watch. It returns an *UnsupportedError where the kernel or
// the privileges of this process do not allow it.
func Start(o *Options) (*Probe, error) {
	p := &Probe{opts: o.filled(), flying: make(map[uint64]*read), stop: make(chan struct{}), done: make(chan struct{}), listens: make(chan Listen, maxListens)}
	p.clock = newClock(p.opts.Start)
	p.names = newNames()
	if err := p.start(); err != nil {
		return nil, errors.Join(err, p.release())
	}
	go p.run()
	return p, nil
}

func (p *Probe) start() (err error) {
	var targets []target
	for _, rdev := range p.opts.Devices {
		d, err := findDevice(rdev)
		if err != nil {
			return fmt.Errorf("probe: %w", err)
		}
		targets = append(targets, d)
	}
	if err := p.load(); err != nil {
		return unsupported(err)
	}
	for _, ns := range p.opts.Containers {
		if err := p.allow(ns); err != nil {
			return err
		}
	}
	if p.ring, err = ringbuf.NewReader(p.programs.Ring); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	// Reading never waits then, but looks at what is there: nobody is woken.
	p.ring.SetDeadline(time.Unix(0, 1))
	if p.opts.Listen {
		if err := p.attach(p.programs.SockSetState); err != nil {
			return unsupported(err)
		}
	}
	return p.watch(targets...)
}

func (p *Probe) load() error {
	spec, err := bpf.LoadProbe()
	if err != nil {
		return err
	}
	spec.Maps[bpf.ProbeMapRing].MaxEntries = uint32(p.opts.Buffer)
	if err := spec.Variables[bpf.ProbeVarOnlyContainers].Set(p.opts.Filter); err != nil {
		return err
	}
	return spec.LoadAndAssign(&p.programs, nil)
}

// watch adds devices, and begins to watch reads with the first.
func (p *Probe) watch(targets ...target) error {
	if len(targets) == 0 {
		return nil
	}
	first := len(p.devices) == 0
	p.devices = append(p.devices, targets...)
	for disk, span := range spans(p.devices) {
		if err := p.programs.Disks.Put(disk, span); err != nil {
			return fmt.Errorf("probe: filter of devices: %w", err)
		}
	}
	if !first {
		return nil
	}
	// The end of reads comes first, so that each that is seen to begin is seen to end.
	return unsupported(p.attach(p.programs.RqComplete, p.programs.BioComplete, p.programs.BioQueue))
}

func (p *Probe) attach(programs ...*ebpf.Program) error {
	for _, prog := range programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: prog})
		if err != nil {
			return err
		}
		p.links = append(p.links, l)
	}
	return nil
}

// AddDevice watches the reads of another device, by its st_rdev. Its index follows
// those of Options.Devices. To load the programs takes some 50 ms, to add a device
// almost nothing: a probe can be started before its device is there.
func (p *Probe) AddDevice(rdev uint64) error {
	d, err := findDevice(rdev)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("probe: %w", os.ErrClosed)
	}
	return p.watch(d)
}

// AddContainer lets Options.Filter pass what is done in the mount namespace that
// a process is in now.
func (p *Probe) AddContainer(pid int) error {
	ns, err := mountNamespace(pid)
	if err != nil {
		return fmt.Errorf("probe: process %d: %w", pid, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("probe: %w", os.ErrClosed)
	}
	return p.allow(ns)
}

func (p *Probe) allow(ns uint64) error {
	if ns > math.MaxUint32 {
		return fmt.Errorf("probe: mount namespace %d: not an inode of one", ns)
	}
	if err := p.programs.Containers.Put(uint32(ns), uint8(1)); err != nil {
		return fmt.Errorf("probe: filter of containers: %w", err)
	}
	return nil
}

// completes is how long Reads keeps back a read that has not completed.
const completes = time.Second

// Reads returns the reads that have come since its last call, by time. Their space
// is the device: Layer is its index, in the order they were added. At is when the
// kernel queued a read. Wait is how long it took to complete, and 0 if that is not
// known: because it took more than a second, or was not seen.
//
// A read that has not completed is kept back for up to a second, but for a probe
// that is closed: then Reads returns all that is left.
func (p *Probe) Reads() []tracefmt.Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drain()
	now := p.clock.now()
	var out []tracefmt.Event
	var keep []*read
	for _, r := range p.reads {
		if !r.done && !p.closed && now-r.events[0].At < completes {
			keep = append(keep, r)
			continue
		}
		out = append(out, r.events...)
	}
	p.reads = keep
	slices.SortStableFunc(out, func(a, b tracefmt.Event) int { return cmp.Compare(a.At, b.At) })
	return out
}

// Listens is closed by Close. Beyond some thousand listens that nobody receives
// they are lost.
func (p *Probe) Listens() <-chan Listen { return p.listens }

// Stats may be called at any time.
func (p *Probe) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drain()
	s := p.stats
	s.Lost += p.inKernel
	return s
}

// Close ends the watching. What was seen until then is still in Reads, Listens
// and Stats.
func (p *Probe) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		<-p.done
		return p.err
	}
	p.closed = true
	err := p.detach()
	p.drain()
	p.mu.Unlock()

	close(p.stop)
	<-p.done
	close(p.listens)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = errors.Join(err, p.release())
	return p.err
}

// detach returns when the programs see nothing any more.
func (p *Probe) detach() error {
	var errs []error
	for _, l := range slices.Backward(p.links) {
		errs = append(errs, l.Close())
	}
	p.links = nil
	return errors.Join(errs...)
}

// release gives back what the kernel holds for the probe.
func (p *Probe) release() error {
	errs := []error{p.detach()}
	if p.ring != nil {
		errs = append(errs, p.ring.Close())
		p.ring = nil
	}
	return errors.Join(append(errs, p.programs.Close())...)
}
