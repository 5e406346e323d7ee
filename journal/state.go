package journal

import (
	"encoding/binary"
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Names of a group's state in the index. An LSN is 8 bytes, little-endian.
const (
	stateApplied  = "applied"  // LSN: the backings hold every record up to it, durably
	stateHorizon  = "horizon"  // LSN up to which history has expired
	stateKept     = "kept"     // list of the points that are kept beyond the horizon, see appendKept; never set: there never were any
	stateEaten    = "eaten"    // time of the newest record that expired though the policy promised it still, Unix nanoseconds
	stateVerified = "verified" // when the group was verified last (Unix nanoseconds), and how many places were damaged, 8 bytes each
	stateRebuild  = "rebuild"  // not empty while the index is made again from the segments
)

// stateBacking is the backing's fingerprint at the last stop in order.
func stateBacking(d record.DiskID) string { return fmt.Sprintf("backing/%d", d) }

// stateKnown is the LSN of the disk's last discontinuity.
func stateKnown(d record.DiskID) string { return fmt.Sprintf("known-since/%d", d) }

// stateChanged is not empty while a discontinuity of the disk is being journaled.
func stateChanged(d record.DiskID) string { return fmt.Sprintf("changed/%d", d) }

// stateLSN reads a state that is an LSN; 0 if it was never set.
func (g *Group) stateLSN(name string) (record.LSN, error) {
	b, err := g.ix.State(name)
	switch {
	case err != nil:
		return 0, err
	case len(b) == 0:
		return 0, nil
	case len(b) != 8:
		return 0, fmt.Errorf("%w: state %q of group %s has %d bytes, an LSN has 8", record.ErrCorrupt, name, g.name, len(b))
	}
	return record.LSN(binary.LittleEndian.Uint64(b)), nil
}

func setStateLSN(b *index.Batch, name string, lsn record.LSN) error {
	return b.SetState(name, binary.LittleEndian.AppendUint64(nil, uint64(lsn)))
}
