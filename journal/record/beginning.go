package record

import (
	"fmt"
	"slices"
)

// Beginning is what a group begins with that follows another daemon's, in the middle of its history, beside the
// content of its disks.
type Beginning struct {
	At          LSN   // what its disks' backings hold, durably; its horizon
	Time        int64 // of At, Unix nanoseconds
	Reigns      Reigns
	Disks       []Disk       // every disk that the group had had by then
	Definitions []Definition // in force at At
	Pinned      []LSN        // markers up to At that are pinned, ascending
}

// Check is an error if no group can begin so.
func (b *Beginning) Check() error {
	if err := b.Reigns.Check(); err != nil {
		return err
	}
	if last := b.Reigns[len(b.Reigns)-1]; last.First > b.At+1 {
		return fmt.Errorf("%w: the reign of epoch %d begins at LSN %d, behind LSN %d", ErrCorrupt, last.Epoch, last.First, b.At)
	}
	if b.At > MaxLSN/2 || !slices.IsSorted(b.Pinned) || len(b.Pinned) > 0 && b.Pinned[len(b.Pinned)-1] > b.At {
		return fmt.Errorf("%w: no group has come to LSN %d with pins of LSN %v", ErrCorrupt, b.At, b.Pinned)
	}
	for _, d := range b.Definitions {
		if d.Gone || d.Since == 0 || d.Since > b.At || len(d.Content) > MaxDefinition {
			return fmt.Errorf("%w: definition %q since LSN %d is not in force at LSN %d", ErrCorrupt, d.Name, d.Since, b.At)
		}
		if err := CheckName(d.Name); err != nil {
			return fmt.Errorf("%w: definition: %w", ErrCorrupt, err)
		}
	}
	return CheckDisks(b.Disks, b.At)
}

// CheckDisks is an error if a table can not be that of a group's records up to an LSN.
func CheckDisks(table []Disk, last LSN) error {
	if len(table) > MaxDisks {
		return fmt.Errorf("%w: %d disks, at most %d are possible", ErrCorrupt, len(table), MaxDisks)
	}
	for i, d := range table {
		same := func(o Disk) bool { return o.ID == d.ID || o.Name == d.Name }
		// One that left before the first record has LSN 1, for 0 says that it is there.
		if d.ID == 0 || d.Size < 0 || d.Size > MaxDiskSize || d.Added > last || d.Removed > max(last, 1) || slices.ContainsFunc(table[:i], same) {
			return fmt.Errorf("%w: disk %d, %q of %d bytes, added at LSN %d, removed at LSN %d, in a table of LSN %d", ErrCorrupt, d.ID, d.Name, d.Size, d.Added, d.Removed, last)
		}
		if err := CheckName(d.Name); err != nil {
			return fmt.Errorf("%w: disk %d: %w", ErrCorrupt, d.ID, err)
		}
	}
	return nil
}
