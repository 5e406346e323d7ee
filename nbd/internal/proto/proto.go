// Package proto has the numbers of the NBD protocol that server and client
// share, and go-nbd does not have. It promises that they are those of doc/proto.md of
// github.com/NetworkBlockDevice/nbd; it has no state.
package proto

import "github.com/pojntfx/go-nbd/pkg/protocol"

// Values of the protocol.
const (
	MagicStructuredReply = uint32(0x668e33ef)

	HandshakeNoZeroes = uint16(1 << 1)

	OptExportName      = uint32(1)
	OptStartTLS        = uint32(5)
	OptStructuredReply = uint32(8)
	OptListMeta        = uint32(9)
	OptSetMeta         = uint32(10)

	RepMetaContext = uint32(4)
	RepErrBase     = uint32(1 << 31)
	RepErrPolicy   = RepErrBase | 2
	RepErrInvalid  = RepErrBase | 3
	RepErrTLSReqd  = RepErrBase | 5
	RepErrTooBig   = RepErrBase | 9

	FlagHasFlags   = uint16(1 << 0)
	FlagReadOnly   = uint16(1 << 1)
	FlagSendFlush  = uint16(1 << 2)
	FlagSendFUA    = uint16(1 << 3)
	FlagSendTrim   = uint16(1 << 5)
	FlagSendZeroes = uint16(1 << 6)
	FlagSendDF     = uint16(1 << 7)
	FlagMultiConn  = uint16(1 << 8)
	FlagSendCache  = uint16(1 << 10)
	FlagFastZero   = uint16(1 << 11)

	CmdRead         = protocol.TRANSMISSION_TYPE_REQUEST_READ
	CmdWrite        = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	CmdDisc         = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	CmdFlush        = uint16(3)
	CmdTrim         = uint16(4)
	CmdCache        = uint16(5)
	CmdWriteZeroes  = uint16(6)
	CmdBlockStatus  = uint16(7)
	CmdFlagFUA      = uint16(1 << 0)
	CmdFlagNoHole   = uint16(1 << 1)
	CmdFlagDF       = uint16(1 << 2)
	CmdFlagReqOne   = uint16(1 << 3)
	CmdFlagFastZero = uint16(1 << 4)

	ReplyFlagDone    = uint16(1 << 0)
	ReplyNone        = uint16(0)
	ReplyOffsetData  = uint16(1)
	ReplyOffsetHole  = uint16(2)
	ReplyBlockStatus = uint16(5)
	ReplyError       = uint16(1<<15 | 1)
	// ReplyErrorBit is set in the type of every chunk that ends a request with an error.
	ReplyErrorBit = uint16(1 << 15)

	StateHole = uint32(1 << 0)
	StateZero = uint32(1 << 1)

	ErrEPERM  = protocol.TRANSMISSION_ERROR_EPERM
	ErrEIO    = uint32(5)
	ErrENOMEM = uint32(12)
	ErrEINVAL = protocol.TRANSMISSION_ERROR_EINVAL
	ErrENOSPC = uint32(28)

	ErrESHUTDOWN = uint32(108)
)

// Sizes of headers in bytes: of a request, of a simple reply, of a chunk of a structured one.
const (
	RequestSize    = 28
	SimpleSize     = 16
	StructuredSize = 20
)

// MetaAllocation is the metadata context that tells holes.
const MetaAllocation = "base:allocation"
