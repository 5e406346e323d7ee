package replica

import (
	"errors"
	"fmt"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// Local is what a daemon has of a group.
type Local struct {
	Known   bool       // it has a journal of it
	Leads   bool       // and writes it
	Head    record.LSN // that is durable
	Horizon record.LSN
	Reigns  record.Reigns
	Digest  [16]byte // of the record at Head; zeroes: it has none
	// Seen are those of the highest epoch that it was told of, if that is higher than Reigns'.
	Seen  record.Reigns
	Disks []record.Disk // those whose content it has
	// Stuck says that a follower can not take the records behind Head, or is being brought over a gap there already: it needs a Bridge.
	Stuck bool
}

const (
	// maxStep is how far an epoch may be beyond what is known, and spare how many reigns are left for this daemon: a peer that claims more
	// would leave no epoch, or no reign, to fail over with.
	maxStep = 1 << 20
	spare   = 16
)

// plausible says whether a peer can have come by reigns.
func plausible(r record.Reigns, known uint64) error {
	if r.Epoch() > known+maxStep || len(r) > record.MaxReigns-spare {
		return fmt.Errorf("%w: it claims epoch %d, of %d reigns, and epoch %d is known", ErrProtocol, r.Epoch(), len(r), known)
	}
	return nil
}

func last(r record.Reigns) record.Reign { return r[len(r)-1] }

// newest are the reigns of the highest epoch that is known.
func (l *Local) newest() record.Reigns {
	if l.Seen.Epoch() > l.Reigns.Epoch() {
		return l.Seen
	}
	return l.Reigns
}

// Action is what the caller of a Sender or a Receiver must do.
type Action interface{ action() }

type (
	// Send a message. Its slices are not changed before the next call.
	Send struct{ wire.Message }
	// Note has reigns of a later epoch than is known here be Local's Seen from now on, durably.
	Note struct{ Reigns record.Reigns }
	// Depose is a Note that has the group follow, durably, too: a writer of a later epoch is known. An End follows.
	Depose struct{ Reigns record.Reigns }
	// End closes the stream when what was sent before is on its way. Err is why, for people, and for errors.Is.
	End struct{ Err error }
)

func (Send) action()   {}
func (Note) action()   {}
func (Depose) action() {}
func (End) action()    {}

// Why a stream has ended.
var (
	// ErrProtocol is wrapped if the peer spoke out of turn, or of what can not be.
	ErrProtocol = errors.New("the peer does not keep to the protocol")
	// ErrDeposed is wrapped if a writer of a later epoch is known, here or there.
	ErrDeposed = errors.New("another daemon writes the group in a later epoch")
	// ErrDiverged is wrapped if the follower has records that the writer has not.
	ErrDiverged = errors.New("the journals have diverged: the follower must rewind")
	// ErrForked is wrapped if the follower has other records of a reign than the writer: one of the two lost what it had said was durable, or
	// was restored from a copy.
	ErrForked = errors.New("the follower has other records of the same writer's reign")
	// ErrUnrelated is wrapped if the two journals are not of one history.
	ErrUnrelated = record.ErrUnrelated
	// ErrHandedOver is why a stream ends whose follower has taken the group over, as it had asked for.
	ErrHandedOver = errors.New("the follower has taken the group over")
	// ErrRefused is wrapped if the peer refused for another reason.
	ErrRefused = errors.New("the peer refused")
)

// ends reports whether the stream is over with actions.
func ends(actions []Action) bool {
	return slices.ContainsFunc(actions, func(a Action) bool { _, ok := a.(End); return ok })
}

// refuse tells the peer why the stream ends, and the caller.
func refuse(reason wire.Reason, reigns record.Reigns, err error) []Action {
	return []Action{Send{&wire.Refuse{Reason: reason, Text: err.Error(), Reigns: reigns}}, End{err}}
}

// outOfTurn ends a stream whose peer can not be believed.
func outOfTurn(format string, args ...any) []Action {
	err := fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
	return refuse(wire.ReasonFailed, nil, err)
}

// refused is what a peer's refusal comes to.
func refused(m *wire.Refuse) error {
	cause := ErrRefused
	switch m.Reason {
	case wire.ReasonDeposed:
		cause = ErrDeposed
	case wire.ReasonDiverged:
		cause = ErrDiverged
	case wire.ReasonUnrelated:
		cause = ErrUnrelated
	case wire.ReasonForked:
		cause = ErrForked
	}
	return fmt.Errorf("%w: the peer says: %q", cause, m.Text)
}
