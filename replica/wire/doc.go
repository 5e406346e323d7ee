// Package wire is what two daemons say to each other about a group that one of them writes and the other follows:
// messages, and their bytes in a stream that is authenticated and encrypted beneath. It does no I/O of its own, and
// knows no order of messages.
//
// # Promises
//
//   - Decoding never panics, and allocates no more than the length that a frame's head gives, which is bounded
//     ([MaxPayload], and less until the caller says so), and what that inflates to, which is too.
//   - A frame that is not what was sent, or of an unknown version or type of message, is an error that wraps record.ErrCorrupt, and names it.
//   - What decodes can be encoded, and decodes to the same again.
//
// # The caller must
//
//  1. let one goroutine use a [Reader] or a [Writer] at a time;
//  2. copy what it keeps of a message: its slices are the Reader's again from the call after the next one on.
//
// # Format
//
// A stream is frames, their head specified above [Writer.Append]; the messages' payloads are specified at their types. Integers are
// little-endian. A text or a list is preceded by its length; the last field of some messages takes up the rest of the
// payload instead.
//
//	reigns:       number (2); for each: epoch (8), first LSN (8), id (16)
//	disks:        number (2); for each: id (4), size (8), added LSN (8), removed LSN (8), name
//	definitions:  number (2); for each: length (4), the payload of a definition's record, see record.Definition
//	text, name:   length (2), UTF-8
//
// # Limits
//
// Version 1 is the only one.
package wire
