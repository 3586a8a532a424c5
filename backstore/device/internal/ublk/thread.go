package ublk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/uring"
)

// start starts the thread. When it returns nil the driver can send requests.
func (q *queue) start() error {
	started := make(chan error)
	go q.run(started)
	return <-started
}

// run is the thread.
func (q *queue) run(started chan<- error) {
	runtime.LockOSThread()
	q.tid = unix.Gettid()
	if q.tid == unix.Getpid() { // a process's first thread cannot end
		go q.run(started)
		<-q.done
		runtime.UnlockOSThread()
		return
	}
	// It is never unlocked: the thread ends with its goroutine.
	defer close(q.done)
	err := q.prepare()
	started <- err
	for err == nil && q.live > 0 && !q.quit.Load() {
		err = q.round()
	}
	q.failure = errors.Join(q.failure, err)
	close(q.work)
}

// prepare fetches all slots in one system call: a process that is killed has
// made the device ready, or has done nothing. Only then does it map the
// descriptors: the driver takes no mapping of another process until a ready
// device is recovered.
func (q *queue) prepare() error {
	// Where memory is short the thread must not wait for its own device.
	unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	if q.sink = q.bufs.get(); q.sink == nil || !q.bufs.fill(minSpare) {
		return fmt.Errorf("request buffers: %w", unix.ENOMEM)
	}
	ring, err := uring.New(len(q.slots)+1, uring.Options{MinFD: q.minFD})
	if err != nil {
		return err
	}
	q.ring = ring
	for i := range q.slots {
		q.send(ioFetch, i, 0, 0)
	}
	q.listen()
	if err := withoutAdmin(func() error { return ring.Enter(0, 0) }); err != nil {
		return err
	}
	q.live = len(q.slots)
	if c, ok := ring.Next(); ok {
		return fmt.Errorf("fetch: %w", unix.Errno(-c.Result))
	}
	if n := ring.Queued(); n > 0 {
		return fmt.Errorf("fetch: %d were not taken: %w", n, unix.ENOMEM)
	}
	return q.mapDescs()
}

func (q *queue) mapDescs() error {
	page := unix.Getpagesize()
	n := (q.depth*descSize + page - 1) / page * page
	stride := (descsStride + page - 1) / page * page
	for i := range q.queues {
		mem, err := unix.Mmap(q.char, int64(i*stride), n, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("map the descriptors: %w", err)
		}
		if err := unix.Madvise(mem, unix.MADV_DONTFORK); err != nil { // see apart.Call
			return fmt.Errorf("map the descriptors: %w", err)
		}
		q.descs = append(q.descs, mem)
	}
	return nil
}

// withoutAdmin calls f without CAP_SYS_ADMIN on this thread: the driver has
// the kernel look for partitions on a device only if who serves it is
// privileged. That would read from the device while it is being made, and a
// file system image has none.
func withoutAdmin(f func() error) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var was [2]unix.CapUserData
	if err := unix.Capget(&hdr, &was[0]); err != nil {
		return f()
	}
	less := was
	less[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
	if err := unix.Capset(&hdr, &less[0]); err != nil {
		return f()
	}
	err := f()
	if e := unix.Capset(&hdr, &was[0]); err == nil {
		err = e
	}
	return err
}

// free releases all but the ring and the descriptors, when there are neither
// thread nor workers.
func (q *queue) free() {
	for i := range q.slots {
		if buf := q.slots[i].buf; buf != nil {
			q.bufs.put(buf)
		}
	}
	for _, buf := range append(q.committed, q.sink) {
		if buf != nil {
			q.bufs.put(buf)
		}
	}
	q.bufs.trim(0)
	unix.Close(q.event)
}

// release ends the ring and unmaps the descriptors, when the thread has ended.
// Where the driver still has commands the end of the thread has to cancel them,
// and the end of the ring must come after it: the driver takes a server whose
// thread lives for a living one.
func (q *queue) release() {
	if q.ring != nil {
		if q.live > 0 {
			waitThread(q.tid)
		}
		q.ring.Close()
	}
	for _, mem := range q.descs {
		unix.Munmap(mem)
	}
	q.descs = nil
}

// waitThread waits for the end of a thread whose goroutine has ended.
func waitThread(tid int) {
	task := "/proc/self/task/" + strconv.Itoa(tid)
	for range 1000 {
		if _, err := os.Stat(task); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
