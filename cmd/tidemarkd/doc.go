// Command tidemarkd is the Tidemark daemon: it serves virtual machine disks over
// NBD, journals every write, and serves each disk as it was after any of them.
//
// This is where the rooms meet: exports.go makes the journal's disks and views
// into devices of package nbd, control.go serves the API, run.go wires
// and stops them. See docs/operating.md.
package main
