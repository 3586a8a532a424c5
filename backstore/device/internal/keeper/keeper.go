// Package keeper lets a process be killed at any moment and be started again
// without losing its open files: another process, the keeper, holds duplicates
// of them and hands them to the next one.
//
// The protocol is systemd's, so that under systemd nothing but the unit's
// FileDescriptorStoreMax= is needed:
//
//	child → keeper   datagrams to $NOTIFY_SOCKET: FDSTORE=1, FDNAME=, FDPOLL=0, with
//	                 descriptors; FDSTOREREMOVE=1; READY=1; STATUS=; STOPPING=1;
//	                 WATCHDOG=1; BARRIER=1, whose descriptor is closed once all
//	                 before it has been dealt with
//	keeper → child   at the next start, from descriptor 3 on: $LISTEN_FDS many,
//	                 their names in $LISTEN_FDNAMES
//
// (sd_notify(3), sd_listen_fds(3), systemd.service(5),
// https://systemd.io/FILE_DESCRIPTOR_STORE). A [Store] is the child's side,
// [Supervise] is a keeper for where there is no systemd.
//
// # What is different under Supervise
//
//   - $LISTEN_PID is not set: its value, the child's process number, is not
//     known before the fork, after which no Go code can run. In its place stands
//     $REPRISE_KEEPER, the keeper's process number and the lifeline's
//     descriptor, "PPID:FD". The descriptors are for the process whose parent
//     that is. Programs that know sd_listen_fds alone do not see them.
//   - The lifeline is one end of a socket pair. It is closed when the child's
//     descriptor table is released, and that is when the next child can start:
//     the old process may not be gone for long, if a thread of it waits for a
//     device that only the next one will serve again (package apart). The child
//     sends one byte to say that it will not close it otherwise.
//   - X_REPRISE_EXEC=PATH names the program to start next time. If that ends
//     before READY=1, or does not send it in time, the old one is started again.
//   - A descriptor that hangs up is kept: FDPOLL=0 always.
//
// # The order of descriptors
//
// A process that dies releases its files from the highest number down. The
// keeper gives each descriptor that it keeps a number below all earlier ones,
// and the child gets them in the same order. So what was stored first, the
// connection to the kernel that all else of a device waits for, goes first.
//
// # Concurrency
//
// A Store is safe for concurrent use. [Supervise] can run in a goroutine of a
// program that does other things: it installs no signal handler, waits for no
// process but its own, and closes all that it opened.
package keeper

// The environment of a child. envKeeper is ours, the rest is systemd's.
const (
	envNotify       = "NOTIFY_SOCKET"
	envListenPID    = "LISTEN_PID"
	envListenPIDFD  = "LISTEN_PIDFDID"
	envListenFDs    = "LISTEN_FDS"
	envListenNames  = "LISTEN_FDNAMES"
	envStoreMax     = "FDSTORE"
	envWatchdog     = "WATCHDOG_USEC"
	envWatchdogPID  = "WATCHDOG_PID"
	envKeeper       = "REPRISE_KEEPER"
	firstListenFD   = 3    // SD_LISTEN_FDS_START
	maxListenFDs    = 8192 // more are not believed
	maxDescriptors  = 253  // SCM_MAX_FD: in one message
	maxMessage      = 4096 // NOTIFY_BUFFER_MAX of systemd
	maxName         = 255  // of a descriptor
	anonymousName   = "stored"
	assignmentExec  = "X_REPRISE_EXEC="
	messageBarrier  = "BARRIER=1"
	messageReady    = "READY=1"
	messageStopping = "STOPPING=1"
	messageWatchdog = "WATCHDOG=1"
)

// ownVariables are the keeper's to set, and nobody else's to inherit.
var ownVariables = []string{
	envNotify, envListenPID, envListenPIDFD, envListenFDs, envListenNames,
	envStoreMax, envWatchdog, envWatchdogPID, envKeeper,
}
