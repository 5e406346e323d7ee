package record

import (
	"errors"
	"fmt"
	"slices"
)

// Reign is a run of a group's records that one daemon wrote. It goes on until the first record of the next.
type Reign struct {
	Epoch uint64   // higher than that of every reign before it
	First LSN      // of its records
	ID    [16]byte // drawn when it began: two daemons that took one epoch are told apart
}

// Reigns are all that a group's records were written under, the oldest first. The last is that of the present.
type Reigns []Reign

// MaxReigns is how many reigns a group can have had.
const MaxReigns = 1024

// ErrUnrelated says that two journals are not of one history.
var ErrUnrelated = errors.New("the journals have no history in common")

// Epoch is that of the present reign.
func (r Reigns) Epoch() uint64 {
	if len(r) == 0 {
		return 0
	}
	return r[len(r)-1].Epoch
}

// MaxEpoch is the highest epoch: there is always another one behind what a peer can claim.
const MaxEpoch = 1 << 48

// Check is an error if no journal can have had these reigns.
func (r Reigns) Check() error {
	if len(r) == 0 || len(r) > MaxReigns {
		return fmt.Errorf("%w: %d reigns, 1 to %d are possible", ErrCorrupt, len(r), MaxReigns)
	}
	for i := range r {
		if r[i].Epoch == 0 || r[i].Epoch > MaxEpoch || r[i].First == 0 || r[i].ID == [16]byte{} || i > 0 && (r[i].Epoch <= r[i-1].Epoch || r[i].First < r[i-1].First) {
			return fmt.Errorf("%w: reign %d of epoch %d, id %x, begins at LSN %d", ErrCorrupt, i, r[i].Epoch, r[i].ID, r[i].First)
		}
	}
	return nil
}

// With is the reigns with one more.
func (r Reigns) With(next Reign) Reigns { return append(slices.Clip(slices.Clone(r)), next) }

// Common is the newest LSN up to which two journals hold the same records: one of the reigns r that ends at head, and one of
// the reigns o that ends at other. ErrUnrelated if they are not of one history.
//
// A reign has one writer, so that of two journals that have records of it, one's are a prefix of the other's.
func (r Reigns) Common(head LSN, o Reigns, other LSN) (LSN, error) {
	n := 0
	for n < len(r) && n < len(o) && r[n] == o[n] {
		n++
	}
	if n == 0 {
		return 0, ErrUnrelated
	}
	return min(r.end(n-1, head), o.end(n-1, other)), nil
}

// end is the last LSN of reign i in a journal that ends at head.
func (r Reigns) end(i int, head LSN) LSN {
	if i+1 < len(r) {
		return min(head, r[i+1].First-1)
	}
	return head
}
