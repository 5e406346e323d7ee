package journal

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
)

// The errors that callers tell apart.
var (
	// ErrFailed is wrapped by what a group answers after a failed sync, a
	// failed write or damage: nothing more is taken until it is opened again.
	ErrFailed = errors.New("group has failed")
	// ErrLabelInUse is wrapped when a marker's label is taken.
	ErrLabelInUse = errors.New("label is in use")
	// ErrInUse is wrapped when a disk that is open would leave its group.
	ErrInUse = errors.New("disk is in use")
	// ErrDetached is wrapped by what needs a disk that was removed from its group.
	ErrDetached = disk.ErrDetached
	// ErrFollows is wrapped by what would write a group that follows another daemon's.
	ErrFollows = errors.New("the group's records are another daemon's: write it there, or fail over first")
	// ErrNotBegun is wrapped if a group whose journal comes from another daemon has none yet.
	ErrNotBegun = errors.New("nothing of the group's journal has come yet")
	// ErrDiverged is wrapped when records are received that are not of the group's history.
	ErrDiverged = errors.New("the journals have diverged")
	// ErrDiscontinuity is wrapped when records are received of a backing that was changed outside of Tidemark.
	ErrDiscontinuity = errors.New("the backing was changed outside of Tidemark, and what else differs there is not known")
	// ErrPinned is wrapped when a marker is pinned that would be deleted.
	ErrPinned = errors.New("marker is pinned")
	// ErrHeld is wrapped when a marker is held that would be deleted, or whose hold would end earlier.
	ErrHeld = errors.New("marker is held")
	// ErrNoPoint is wrapped when a point names nothing that can be viewed.
	ErrNoPoint = errors.New("no such point")
	// ErrNotFound is wrapped when a group or disk is not known.
	ErrNotFound = errors.New("not found")
	// ErrNoSpace is wrapped when the journal is full and nothing can be
	// expired. It is ENOSPC.
	ErrNoSpace error = syscall.ENOSPC
	// ErrIndex is wrapped by what Run returns when the index can not go on:
	// the store must then be left as it is, not closed.
	ErrIndex = errors.New("the index can not go on")
	// ErrWouldBlock is what a read that must not wait answers if it would have to.
	ErrWouldBlock = osfile.ErrWouldBlock
)

// errNeeded is wrapped when an expiry gives way to a view that was opened, or a marker
// that was pinned, meanwhile.
var errNeeded = errors.New("history that is to expire is needed")

// PointError says why a point can not be viewed, and what can be.
type PointError struct {
	Group    string
	Point    string
	Why      string
	Viewable []Range // of the log
	Kept     int     // points before those
	// Before and After are the kept points around the one that is missing, where that is known; nil: there is none.
	Before, After *KeptPoint
}

func (e *PointError) Error() string {
	var what []string
	for _, r := range e.Viewable {
		what = append(what, fmt.Sprintf("lsn:%d to lsn:%d", r.First, r.Last))
	}
	switch {
	case e.Before != nil && e.After != nil:
		what = append([]string{fmt.Sprintf("the kept points around it, %v and %v", e.Before, e.After)}, what...)
	case e.Before != nil:
		what = append([]string{fmt.Sprintf("the last kept point before it, %v", e.Before)}, what...)
	case e.After != nil:
		what = append([]string{fmt.Sprintf("the first kept point after it, %v", e.After)}, what...)
	case e.Kept > 0:
		what = append([]string{fmt.Sprintf("%d kept points", e.Kept)}, what...)
	}
	return fmt.Sprintf("point %q of group %s: %s (viewable: %s)", e.Point, e.Group, e.Why, strings.Join(what, ", "))
}

// Unwrap makes it an ErrNoPoint.
func (e *PointError) Unwrap() error { return ErrNoPoint }
