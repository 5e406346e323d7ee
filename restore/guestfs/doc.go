// Package guestfs finds the file systems on a guest's disks, and has them shown as files.
//
// # Promises
//
//   - Read finds partitions (GPT, MBR with logical ones) and linear LVM2 volumes, also such that stand on several disks. What it
//     finds lies within the disks. What is malformed is told, and hides nothing else.
//
// # The caller must
//
//  1. give disks that do not change meanwhile: views.
//
// # Concurrency
//
// Read has no state.
//
// # Format
//
// GPT: UEFI Specification 2.10, chapter 5. LVM2: its sources, lib/format_text.
//
// # Limits
//
// LVM volumes that are striped, mirrored, thin or cached are not put together. Sectors of MBR tables have 512 bytes.
package guestfs
