package nbd

import "errors"

// ErrWouldBlock is what Device.ReadAt answers if it was asked not to wait and would have to.
var ErrWouldBlock = errors.New("read would wait")

// Op is what a Change does.
type Op uint8

// The changes.
const (
	OpWrite Op = iota + 1
	OpZero     // the range reads as zeroes and keeps its space
	OpTrim     // the range reads as zeroes, its space may be freed
)

// Change is a change to a device.
type Change struct {
	Op  Op
	Off int64  // bytes
	Len int64  // bytes
	Buf []byte // of OpWrite, Len bytes; valid until Change returns
}

// Device is what an export serves. Offsets and lengths are in bytes, of any
// alignment, and have been checked against Size. Errors that wrap a syscall.Errno are
// passed on where the protocol has the like; others are EIO. Methods may be called from
// many goroutines; Close comes last.
type Device interface {
	// Size does not change while the device is open.
	Size() int64
	ReadOnly() bool
	// ReadAt fills p. With nowait it may answer ErrWouldBlock, and is then
	// called again from a goroutine that can wait.
	ReadAt(p []byte, off int64, nowait bool) error
	// Change does the changes in their order. When it returns, all later
	// reads see them; they are durable after a Flush. On an error, a prefix may
	// have been done.
	Change(changes []Change) error
	// Flush makes every change durable that returned before.
	Flush() error
	// Extents calls fn with runs that together fill the range, and whether
	// each is known to be a hole that reads as zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
	// Close is called once, when the client is gone.
	Close() error
}

// Mapper is what a Device implements that tells more of its runs than holes, by the metadata
// contexts that it knows.
type Mapper interface {
	// Map opens a metadata context by its name; nil if the device knows no such. Its error is
	// told to the client.
	Map(context string) (Map, error)
}

// Map tells the runs of one metadata context. It is closed before its device is.
type Map interface {
	// Extents calls fn with runs that together fill the range, and their flags.
	Extents(off, n int64, fn func(n int64, flags uint32)) error
	Close() error
}

// Exports finds devices by export name.
type Exports interface {
	// Open returns the device of a name. Its error is told to the client.
	Open(name string) (Device, error)
	// List names the exports that clients are shown.
	List() []string
}
