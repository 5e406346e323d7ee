// Package fuzz feeds hostile bytes to what reads bytes from outside: the NBD
// handshake and transmission, records, segments and saved overlays, points and names. The
// configuration's target is with the configuration, which is internal to the programs. It has no code but its targets; make fuzz runs each for a while.
package fuzz
