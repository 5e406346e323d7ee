package nbd

import (
	"errors"
	"syscall"

	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

// Sizes in bytes.
const (
	// MaxRequest is the longest READ or WRITE that is served.
	MaxRequest = 32 << 20
	// preferredBlock is what clients are told to align to where they can.
	preferredBlock = 4096

	maxString    = 4096  // the protocol's bound of names and strings
	maxOptionLen = 65536 // of an option's payload: names, queries
	maxContexts  = 8     // metadata contexts of a connection
)

// errnoOf is the protocol's error for what a device answered.
func errnoOf(err error) uint32 {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		switch errno {
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return proto.ErrENOSPC
		case syscall.EPERM, syscall.EACCES, syscall.EROFS:
			return proto.ErrEPERM
		case syscall.EINVAL:
			return proto.ErrEINVAL
		case syscall.ENOMEM:
			return proto.ErrENOMEM
		case syscall.ESHUTDOWN:
			return proto.ErrESHUTDOWN
		}
	}
	return proto.ErrEIO
}
