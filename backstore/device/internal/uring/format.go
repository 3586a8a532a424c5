package uring

// From include/uapi/linux/io_uring.h.

const (
	opRead     = 22 // IORING_OP_READ
	opUringCmd = 46 // IORING_OP_URING_CMD

	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	enterGetEvents = 1 << 0
	enterExtArg    = 1 << 3

	featSingleMmap = 1 << 0
	featExtArg     = 1 << 8

	offQueues  = 0
	offEntries = 0x10000000
)

// Offsets in struct io_uring_sqe.
const (
	sqeOpcode = 0
	sqeFD     = 4
	sqeCmdOp  = 8
	sqeAddr   = 16
	sqeLen    = 24
	sqeData   = 32
	sqeCmd    = 48

	entrySize = 64
	wideSize  = 128
)

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries uint32
	flags                uint32
	sqThreadCPU          uint32
	sqThreadIdle         uint32
	features             uint32
	wqFD                 uint32
	resv                 [3]uint32
	sq                   sqOffsets
	cq                   cqOffsets
}

// sqOffsets is struct io_sqring_offsets.
type sqOffsets struct {
	head, tail, ringMask, ringEntries uint32
	flags, dropped, array, resv1      uint32
	resv2                             uint64
}

// cqOffsets is struct io_cqring_offsets.
type cqOffsets struct {
	head, tail, ringMask, ringEntries uint32
	overflow, cqes, flags, resv1      uint32
	resv2                             uint64
}

// completion is struct io_uring_cqe.
type completion struct {
	data   uint64
	result int32
	flags  uint32
}

const completionSize = 16

// waitArg is struct io_uring_getevents_arg.
type waitArg struct {
	sigmask     uint64
	sigmaskSize uint32
	pad         uint32
	time        uint64
}
