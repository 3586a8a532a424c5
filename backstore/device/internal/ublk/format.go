package ublk

// From include/uapi/linux/ublk_cmd.h.

const (
	cmdGetDevInfo        = 2<<30 | 32<<16 | 'u'<<8 | 0x02
	cmdAddDev            = 3<<30 | 32<<16 | 'u'<<8 | 0x04
	cmdDelDev            = 3<<30 | 32<<16 | 'u'<<8 | 0x05
	cmdStartDev          = 3<<30 | 32<<16 | 'u'<<8 | 0x06
	cmdStopDev           = 3<<30 | 32<<16 | 'u'<<8 | 0x07
	cmdSetParams         = 3<<30 | 32<<16 | 'u'<<8 | 0x08
	cmdStartUserRecovery = 3<<30 | 32<<16 | 'u'<<8 | 0x10
	cmdEndUserRecovery   = 3<<30 | 32<<16 | 'u'<<8 | 0x11
	cmdDelDevAsync       = 2<<30 | 32<<16 | 'u'<<8 | 0x14 // Linux 6.9

	ioFetch          = 3<<30 | 16<<16 | 'u'<<8 | 0x20
	ioCommitAndFetch = 3<<30 | 16<<16 | 'u'<<8 | 0x21
	ioNeedGetData    = 3<<30 | 16<<16 | 'u'<<8 | 0x22
)

// What the completion of a fetch says.
const (
	resOK          = 0
	resNeedGetData = 1
	// resAbort is -ENODEV: there will be no more requests.
)

const (
	flagNeedGetData         = 1 << 2
	flagUserRecovery        = 1 << 3
	flagUserRecoveryReissue = 1 << 4

	wantedFlags = flagNeedGetData | flagUserRecovery | flagUserRecoveryReissue
)

// States of a device.
const (
	stateDead     = 0 // not started, or stopped: it has no block device
	stateLive     = 1
	stateQuiesced = 2
)

const (
	opRead        = 0
	opWrite       = 1
	opFlush       = 2
	opDiscard     = 3
	opWriteZeroes = 5

	opMask  = 0xff
	flagFUA = 1 << 13
)

const (
	maxDepth = 4096 // of a queue
	// descsStride is how far apart the queues' descriptors are in the character
	// device: those of maxDepth requests.
	descsStride = maxDepth * descSize
)

const (
	sectorShift = 9

	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3

	paramBasic   = 1 << 0
	paramDiscard = 1 << 1
)

// ctrlCmd is struct ublksrv_ctrl_cmd, the payload of a control command.
type ctrlCmd struct {
	devID      uint32
	queueID    uint16
	len        uint16 // of the buffer
	addr       uint64 // of the buffer
	data       uint64
	devPathLen uint16
	pad        uint16
	reserved   uint32
}

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	queues, depth  uint16
	state, pad0    uint16
	maxIO          uint32 // bytes
	devID          uint32
	pid            int32 // as given to cmdStartDev or cmdEndUserRecovery
	pad1           uint32
	flags          uint64
	userFlags      uint64 // what the driver only keeps: see cookie
	owner          [2]uint32
	reserved1, re2 uint64
}

// ioCmd is struct ublksrv_io_cmd, the payload of a queue's command.
type ioCmd struct {
	queue, tag uint16
	result     int32
	addr       uint64
}

// desc is struct ublksrv_io_desc: a request.
type desc struct {
	opFlags uint32
	sectors uint32
	start   uint64 // sector
	addr    uint64
}

const descSize = 24

// params is struct ublk_params as far as it is used.
type params struct {
	len, types uint32
	basic      basicParams
	discard    discardParams
}

const paramsSize = 60

type basicParams struct {
	attrs                                           uint32
	logicalShift, physicalShift, optShift, minShift uint8
	maxSectors, chunkSectors                        uint32
	sectors                                         uint64
	virtBoundary                                    uint64
}

type discardParams struct {
	alignment, granularity uint32 // bytes
	maxDiscard, maxZeroes  uint32 // sectors
	maxSegments, reserved  uint16
}
