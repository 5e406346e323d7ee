package nbd

import (
	"errors"
	"syscall"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Values of the protocol that go-nbd does not have.
const (
	magicStructuredReply = uint32(0x668e33ef)

	handshakeNoZeroes = uint16(1 << 1)

	optExportName      = uint32(1)
	optStartTLS        = uint32(5)
	optStructuredReply = uint32(8)
	optListMeta        = uint32(9)
	optSetMeta         = uint32(10)

	repMetaContext = uint32(4)
	repErrBase     = uint32(1 << 31)
	repErrPolicy   = repErrBase | 2
	repErrInvalid  = repErrBase | 3
	repErrTLSReqd  = repErrBase | 5
	repErrTooBig   = repErrBase | 9

	flagHasFlags    = uint16(1 << 0)
	flagReadOnly    = uint16(1 << 1)
	flagSendFlush   = uint16(1 << 2)
	flagSendFUA     = uint16(1 << 3)
	flagSendTrim    = uint16(1 << 5)
	flagSendZeroes  = uint16(1 << 6)
	flagSendDF      = uint16(1 << 7)
	flagMultiConn   = uint16(1 << 8)
	flagSendCache   = uint16(1 << 10)
	flagFastZero    = uint16(1 << 11)
	cmdRead         = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite        = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc         = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush        = uint16(3)
	cmdTrim         = uint16(4)
	cmdCache        = uint16(5)
	cmdWriteZeroes  = uint16(6)
	cmdBlockStatus  = uint16(7)
	cmdFlagFUA      = uint16(1 << 0)
	cmdFlagNoHole   = uint16(1 << 1)
	cmdFlagDF       = uint16(1 << 2)
	cmdFlagReqOne   = uint16(1 << 3)
	cmdFlagFastZero = uint16(1 << 4)

	replyFlagDone    = uint16(1 << 0)
	replyNone        = uint16(0)
	replyOffsetData  = uint16(1)
	replyOffsetHole  = uint16(2)
	replyBlockStatus = uint16(5)
	replyError       = uint16(1<<15 | 1)

	stateHole = uint32(1 << 0)
	stateZero = uint32(1 << 1)

	errEPERM  = protocol.TRANSMISSION_ERROR_EPERM
	errEIO    = uint32(5)
	errENOMEM = uint32(12)
	errEINVAL = protocol.TRANSMISSION_ERROR_EINVAL
	errENOSPC = uint32(28)
)

// Sizes in bytes.
const (
	// MaxRequest is the longest READ or WRITE that is served.
	MaxRequest = 32 << 20
	// preferredBlock is what clients are told to align to where they can.
	preferredBlock = 4096

	requestSize    = 28
	simpleSize     = 16
	structuredSize = 20

	maxString    = 4096  // the protocol's bound of names and strings
	maxOptionLen = 65536 // of an option's payload: names, queries
)

// metaAllocation is the metadata context base:allocation, and its number here.
const (
	metaAllocation   = "base:allocation"
	metaAllocationID = uint32(1)
)

// errnoOf is the protocol's error for what a device answered.
func errnoOf(err error) uint32 {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		switch errno {
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return errENOSPC
		case syscall.EPERM, syscall.EACCES, syscall.EROFS:
			return errEPERM
		case syscall.EINVAL:
			return errEINVAL
		case syscall.ENOMEM:
			return errENOMEM
		}
	}
	return errEIO
}
