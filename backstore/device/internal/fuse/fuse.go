// Package fuse serves one file over /dev/fuse: a root directory (node 1) that
// holds a single regular file (node 2), whose reads and writes go to a
// [request.Server]. It exists to be opened once, by the loop driver.
//
// The nouns: a [Session] is one FUSE connection with its descriptor, its
// detached mount and its workers; a worker is a goroutine with one buffer.
//
// # Concurrency
//
// A worker blocks in read(2) on the shared descriptor, runs the request it got
// to its end in the same goroutine and goes back. Whoever takes a request and
// leaves nobody waiting starts one more worker first, so a backend that blocks
// holds up only its own request, up to Config.Workers of them. Workers that
// find enough others waiting end. A request allocates nothing: it is read into,
// and answered from, the worker's buffer, which is mapped outside the Go heap.
// The descriptor is not cloned: a request belongs to the connection, not to a
// worker, as long as nobody read it.
//
// # Buffers
//
// One buffer serves both directions, laid out so that data is page aligned
// whichever way it goes, and a reply is one write(2) of header and data. All
// its pages are there from the beginning: a process that is killed while the
// kernel copies a request or a reply must not have to fault a page in, which
// fails in a dying process, and fails the request with it.
//
//	         page 0           |  page 1 ...
//	..... write header 80 B   |  data of a WRITE       (request)
//	.....        reply 16 B   |  data of a READ        (reply)
//
// # Adoption
//
// Nothing that the kernel knows of a session is chosen at run time: node ids
// and generations are constants, file handles are, or are kept in [Opens], INIT
// is answered before the first worker starts, and all else that a session lives
// by is in the fields of [Session]. Another process that holds a
// duplicate of the descriptor can therefore go on where this one ended: [Adopt].
// The requests that the ended one had read and not answered are sent once more,
// with a bit set in their number, after FUSE_NOTIFY_RESEND (Linux 6.9). So a
// request may be executed twice; that is harmless, since one that nobody
// answered may be executed at any time.
//
// A file that the kernel reads by itself (Config.Backing) needs no server: it
// belongs to the connection.
//
// FUSE over io_uring (Linux 6.14, off by default) is no way to serve sessions
// that are adopted: FUSE_NOTIFY_RESEND does not reach requests that are in the
// ring of an ended process, and they wait until the connection is aborted.
// (Measured on Linux 6.18: 4 KiB reads at queue depth 32 take 2.3 µs of the
// server's processor time in place of 4.1.)
//
// # Closing
//
// [Session.Close] first sends the waiting workers home, by asking the file
// system for its statistics through the mount descriptor until nobody waits,
// then waits for the busy ones, at most for the time it was given, then puts
// /dev/null in the place of the descriptor. That was the last reference to
// /dev/fuse, so the kernel fails all requests still open; late replies go
// nowhere. A backend call must not wait for I/O on the device it serves.
package fuse

import (
	"errors"
	"os"
	"sync/atomic"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// Node ids and the file handle: constants, see Adoption.
const (
	rootNode = 1
	fileNode = 2
	fileFH   = 1
)

const (
	pageSize = 4096
	// maxIO is the largest READ and WRITE, in bytes. Larger requests of the
	// loop driver arrive as several, which run in parallel. Measured from 64 KiB
	// to 1 MiB: a buffer of this size stays in the processor's L2 cache between
	// the backend's copy and the kernel's, which saves a sixth of the time of a
	// sequential read against 1 MiB, and smaller ones cost more requests.
	maxIO = 256 << 10
	// maxPages is the largest request in pages, for INIT: more than maxIO has,
	// since data that is not page aligned touches one more.
	maxPages = 256
	// maxBackground is how many asynchronous requests the kernel has out at a
	// time; its default of 12 throttles. The loop queue holds 128 requests of
	// up to 1280 KiB.
	maxBackground = 128 * (1280 << 10) / maxIO
	// maxIdle is how many workers wait in read(2) before others end: with one,
	// every request starts and ends a goroutine; with three or more, each
	// request wakes another thread that finds the queue empty.
	maxIdle = 2
)

// Config describes a session. All fields but MinFD, Opens and Backing are required.
type Config struct {
	Name      string // of the file, as `losetup -a` shows it
	BlockSize int    // granularity of a discard, in bytes
	Workers   int    // most requests in the backend at a time
	MinFD     int    // lowest number for the descriptor of /dev/fuse
	Opens     *Opens // if not nil: told of the openings of the file
	// Backing, if not nil, holds the file's bytes, at least as many as the session
	// has: the kernel is asked to read them there, if the session is read-only. It
	// must allow direct I/O in blocks of BlockSize, and is needed by Start only.
	Backing *os.File
}

// Session is a FUSE connection that is being served. Its methods are safe for
// concurrent use.
type Session struct {
	cfg   Config
	srv   *request.Server
	fd    int // /dev/fuse; /dev/null once aborted
	mount int // the detached mount
	// backing is what the kernel calls cfg.Backing, 0 if it does not read it.
	// Constant while there are workers.
	backing uint32
	bufs    request.Buffers

	idle    atomic.Int32 // workers in, or about to enter, read(2)
	workers atomic.Int32 // workers alive; never rises from zero
	closing atomic.Bool

	ended chan struct{} // closed when the last worker has ended
	err   atomic.Pointer[error]
	close closeState
}

var (
	// ErrAborted says that somebody else ended the connection.
	ErrAborted = errors.New("fuse: connection aborted")
	errBusy    = errors.New("fuse: backend requests still running; connection aborted")
)
