// Package record is the vocabulary of the journal and its bytes: LSNs,
// extents, records, markers and points. It does no I/O and keeps no state.
//
// # Promises
//
//   - Decoding never panics and never allocates more than the input it was
//     given (plus a small constant): every length is checked first.
//   - A flipped bit anywhere in a header, its checksum table or a payload is
//     noticed ([ErrCorrupt]).
//   - An unknown version of a marker's payload is reported as such, never as
//     corruption. Records carry none: the segment that holds them does.
//
// # The caller must
//
//  1. treat slices in decoded values as views of the input, unless stated;
//  2. verify payload blocks with the header's table before using them.
//
// # Format
//
// The record header is specified above [Header.Append], the marker payload
// above [Marker.Append]. All integers are little-endian.
//
// Everything here is safe for concurrent use.
package record
