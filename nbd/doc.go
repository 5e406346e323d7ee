// Package nbd serves block devices over the Network Block Device protocol. It
// knows the protocol and nothing of what is behind a [Device].
//
// # Promises
//
//   - Fixed newstyle negotiation with EXPORT_NAME, GO, INFO, LIST, ABORT,
//     STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT and STARTTLS; the
//     commands READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS and
//     DISC. Whatever else a client asks is answered with the protocol's error,
//     its payload drained: the stream stays in step.
//   - A reply to FLUSH, or to a command with FUA, is sent after Device.Flush
//     returned. On a server that is Durable every write is treated so.
//   - Memory is bounded: no length from the wire is allocated before it is
//     checked; a WRITE takes none but its connection's, long READs share two budgets, one of disks and one of views.
//   - Requests of one connection are served side by side and answered in
//     any order; a READ, CACHE or BLOCK_STATUS that must wait for the disk holds
//     up no other. Writes are done in the reader, and so are the flushes of FUA
//     and of a Durable server: what comes behind them on the connection waits.
//
// # The caller must
//
//  1. give Devices whose methods may be called from many goroutines;
//  2. cancel Serve's context to stop: requests in hand are finished first.
//
// # Concurrency
//
// Each connection has one reader. It serves what can be served without waiting
// itself, and hands the rest to goroutines, whose number is bounded and for which the
// connection waits before it closes. Writes that one read of the socket brought
// reach the device some at a time, and are answered before the next of them do.
//
// # Format
//
// The protocol's text is doc/proto.md of github.com/NetworkBlockDevice/nbd. Names
// here are those of the text without their NBD_ prefix.
//
// # Limits
//
// Extended headers (64-bit lengths) are not offered; oldstyle negotiation is
// not known. base:allocation is the only metadata context. A connection whose client never takes
// its replies holds up to 8 MiB of its budget (32 MiB without structured replies): sixteen of them
// hold up the others' READs of more than 128 KiB, of disks or of views.
// A WRITE of more than 1 MiB reaches the device in pieces.
package nbd
