package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/link"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// receiving is a group that comes from a peer. Its methods are link.Target's.
type receiving struct {
	one    *replicated
	peer   string
	conn   *link.Conn
	offer  *wire.Offer
	cancel context.CancelFunc
	done   chan struct{}

	g      *journal.Group // nil: it is not here yet
	begins *record.Beginning
	bridge *bridgeWriter // nil: the group is not brought over a gap on this stream
	coming record.Disk   // that is adopted
	opened map[record.DiskID]*rawBacking
	// elsewhere are other groups' disks, which may hold blocks of those that come.
	elsewhere []*os.File
	planned   config.Group // what the configuration says of it

	received atomic.Uint64 // the LSN of the last record that came

	mu   sync.Mutex // guards what follows
	head record.LSN // the writer's
	at   time.Time  // when it said so, by its clock
	err  error      // why the stream has ended
}

// receive takes the group that a peer offers until the stream ends. One that came before, and whose writer is not of a later
// epoch, ends first.
func (one *replicated) receive(ctx context.Context, c *link.Conn, offer *wire.Offer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x := &receiving{one: one, peer: c.Peer.Name, conn: c, offer: offer, cancel: cancel, done: make(chan struct{}), opened: map[record.DiskID]*rawBacking{}}
	defer close(x.done)
	// Nothing that is under way ends for an offer that comes to nothing.
	if err := one.worthwhile(offer); err != nil {
		r := &wire.Refuse{Reason: wire.ReasonBusy, Text: err.Error()}
		switch {
		case errors.Is(err, replica.ErrUnrelated):
			r.Reason = wire.ReasonUnrelated
		case errors.Is(err, replica.ErrDeposed):
			r.Reason, r.Reigns = wire.ReasonDeposed, one.highest()
		}
		return errors.Join(err, c.Send(r), c.Close())
	}
	one.mu.Lock()
	before, barred := one.comes, one.barred > 0
	if !barred {
		one.comes = x
	}
	one.mu.Unlock()
	if barred {
		err := fmt.Errorf("group %s is being taken over", one.name)
		return errors.Join(err, c.Refuse(wire.ReasonBusy, err), c.Close())
	}
	defer func() {
		one.mu.Lock()
		defer one.mu.Unlock()
		if one.comes == x {
			one.comes = nil
		}
	}()
	if before != nil {
		before.cancel()
		<-before.done
	}
	defer x.closeBackings()
	if err := one.beginAnew(offer); err != nil {
		return errors.Join(err, c.Refuse(wire.ReasonFailed, err), c.Close())
	}
	one.beforeGapIfNeedless(offer)
	one.log.Info("a peer offers the group", zap.String("peer", x.peer), zap.Uint64("head", uint64(offer.Head)), zap.Uint64("epoch", offer.Reigns.Epoch()))
	err := link.Follow(ctx, c, offer, x)
	x.mu.Lock()
	x.err = err
	x.mu.Unlock()
	return err
}

// highest are the reigns of the highest epoch that is known of the group.
func (one *replicated) highest() record.Reigns {
	seen := one.seen()
	if g := one.journal(); g != nil && g.Reigns().Epoch() >= seen.Epoch() {
		return g.Reigns()
	}
	return seen
}

// worthwhile says why an offer comes to nothing.
func (one *replicated) worthwhile(m *wire.Offer) error {
	g := one.journal()
	if g == nil {
		return nil // the state machine decides
	}
	if _, err := g.Reigns().Common(g.Head(), m.Reigns, m.Head); err != nil {
		return fmt.Errorf("group %s: %w", one.name, err)
	}
	if known := one.highest().Epoch(); m.Reigns.Epoch() < known {
		return fmt.Errorf("%w: epoch %d is known here, and the group was offered in epoch %d", replica.ErrDeposed, known, m.Reigns.Epoch())
	}
	return nil
}

// end ends the stream on which the group comes, if there is one, and waits for it.
func (one *replicated) end() {
	one.mu.Lock()
	x := one.comes
	one.mu.Unlock()
	if x != nil {
		x.cancel()
		<-x.done
	}
}

func (x *receiving) Local() (l replica.Local, err error) {
	x.g, l, err = x.one.local()
	if x.g != nil {
		x.received.Store(uint64(l.Head))
	}
	return l, err
}

func (x *receiving) Receive(run record.Run) error {
	if err := x.g.Receive(run); errors.Is(err, journal.ErrDiscontinuity) {
		reigns := x.g.Reigns()
		x.one.setStuck(place{x.g.Head(), reigns[len(reigns)-1]})
		return fmt.Errorf("%w: it is, when the writer offers the group next", err)
	} else if errors.Is(err, journal.ErrDetached) {
		return fmt.Errorf("%w: %s", err, x.one.seededAgain())
	} else if err != nil {
		return err
	}
	x.received.Store(uint64(run.Last))
	return nil
}

// Sync makes what came on this stream durable.
func (x *receiving) Sync() (record.LSN, error) {
	received := record.LSN(x.received.Load())
	err := x.g.Sync()
	return min(received, x.g.Durable()), err
}

// errNoConsent is what a writer is told who would have this daemon drop what it has not written itself.
var errNoConsent = errors.New("that takes the word of who runs this daemon: tidemark replica accept GROUP")

// byHand is how a group that was this daemon's to begin with is given up.
func (one *replicated) byHand() string {
	return fmt.Sprintf("to have it seeded, take it out of the configuration, remove its journal (groups/%s in the state directory), and give it again with received: true", one.name)
}

// beginAnew drops what is here of the group if that was asked for, and who offers it is its writer. The group's other streams
// have ended.
func (one *replicated) beginAnew(offer *wire.Offer) error {
	one.changing.Lock()
	defer one.changing.Unlock()
	if g := one.journal(); one.consented() != consentAnew || g == nil || !g.Follows() {
		return nil
	}
	g, local, err := one.local()
	if err != nil {
		return err
	}
	actions := replica.NewReceiver().Offer(offer, local)
	if _, refused := actions[len(actions)-1].(replica.End); refused {
		return nil // whoever it is, it is not followed
	}
	common, err := g.Reigns().Common(local.Head, offer.Reigns, offer.Head)
	if err != nil || common < local.Head && (one.wrote(g, common) || offer.Reigns.Epoch() > g.Reigns().Epoch()) && !one.unrewound {
		return nil // a rewind keeps apart what this daemon wrote, and nobody else has
	}
	one.log.Warn("the group begins anew, as was asked for: its history here ends")
	return one.giveUp()
}

// giveUp drops what is here of the group, for which who runs this daemon has given its consent. one.changing is held.
func (one *replicated) giveUp() error {
	if err := one.r.reloader.discard(one.name); err != nil {
		return fmt.Errorf("give up what is here of group %s, to begin anew: %w", one.name, err)
	}
	one.consent(consentNone)
	return nil
}

// consent says what may be dropped of the group, from now on.
func (one *replicated) consent(c consent) {
	one.mu.Lock()
	defer one.mu.Unlock()
	one.consents = c
}

func (one *replicated) consented() consent {
	one.mu.Lock()
	defer one.mu.Unlock()
	return one.consents
}

// Begin makes the disks' backings, over what there is of them.
func (x *receiving) Begin(b record.Beginning) error {
	one := x.one
	one.changing.Lock()
	defer one.changing.Unlock()
	if err := one.still(x.g); err != nil {
		return err
	}
	x.begins = &b
	return x.openComing(func(record.Disk) bool { return true })
}

// openComing opens the backings of those disks of a beginning that come.
func (x *receiving) openComing(comes func(record.Disk) bool) (err error) {
	if x.planned, err = x.one.r.reloader.planned(x.one.name); err != nil {
		return err
	}
	for _, d := range x.begins.Disks {
		if d.Removed != 0 || !comes(d) {
			continue
		}
		if err := x.open(d); err != nil {
			return err
		}
	}
	return nil
}

// syncBackings makes what came durable, and closes it.
func (x *receiving) syncBackings() error {
	for _, b := range x.opened {
		if err := errors.Join(b.f.Sync(), syncDir(filepath.Dir(b.f.Name()))); err != nil {
			return err
		}
	}
	x.closeBackings()
	return nil
}

// backing is where a disk that comes is, or is to be: as the configuration says, or in a directory of the group's.
func (x *receiving) backing(disk string) string {
	if d, ok := x.planned.Disks[disk]; ok {
		return d.Backing
	}
	return x.one.backing(disk)
}

// open opens a disk's backing, which is made if there is none.
func (x *receiving) open(d record.Disk) error {
	// Nothing is made where the configuration says that something is.
	path, flags := x.backing(d.Name), os.O_RDWR
	if path == x.one.backing(d.Name) {
		if err := mkdirDurable(filepath.Dir(path)); err != nil {
			return err
		}
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return fmt.Errorf("backing %s of disk %s, which comes: %w", path, d.Name, err)
	}
	release, err := x.one.r.store.Claim(path, "seed of "+x.one.name+"/"+d.Name)
	if err != nil {
		return errors.Join(fmt.Errorf("backing %s: %w", path, err), f.Close())
	}
	b := &rawBacking{f, release}
	if err := b.fit(d.Size); err != nil {
		return errors.Join(fmt.Errorf("backing %s: %w", path, err), b.Close())
	}
	x.opened[d.ID] = b
	return nil
}

func (x *receiving) closeBackings() {
	for id, b := range x.opened {
		_ = b.Close() // what counts was synced
		delete(x.opened, id)
	}
	for _, f := range x.elsewhere {
		_ = f.Close()
	}
	x.elsewhere = nil
}

func (x *receiving) Adopt(d record.Disk) error {
	var err error
	if x.planned, err = x.one.r.reloader.planned(x.one.name); err != nil {
		return err
	}
	x.coming = d
	return x.open(d)
}

func (x *receiving) Backing(id record.DiskID) (link.Backing, error) {
	if x.bridge != nil && x.opened[id] == nil {
		for _, d := range x.g.Disks() {
			if d.ID == id {
				return bridgeDisk{x.bridge, d}, nil
			}
		}
	}
	b := x.opened[id]
	if b == nil {
		return nil, fmt.Errorf("disk %d does not come", id)
	}
	return b, nil
}

// Elsewhere are disks of other groups that the peer has anyway, as they came from it: it learns which of its blocks are here. What
// guests wrote last, and is not applied, is not seen.
func (x *receiving) Elsewhere(record.DiskID) (all []io.ReaderAt) {
	if x.elsewhere == nil {
		x.elsewhere = x.openElsewhere()
	}
	for _, f := range x.elsewhere {
		all = append(all, f)
	}
	return all
}

func (x *receiving) openElsewhere() []*os.File {
	all := []*os.File{}
	for _, g := range x.one.r.store.Groups() {
		// What was written here may not have got to the peer, whatever came from it since.
		if n := x.one.r.group(g.Name()).known(); g.Name() == x.one.name || !n.isFrom(x.conn.Peer) || len(n.Own) > 0 {
			continue
		}
		for _, d := range g.Disks() {
			if len(all) == maxElsewhere {
				return all
			}
			if f, err := os.Open(d.Path()); err == nil { // it is a shortcut only
				all = append(all, f)
			}
		}
	}
	return all
}

// maxElsewhere bounds how many disks are looked through for blocks of those that come.
const maxElsewhere = 16

func (x *receiving) Finish(id record.DiskID) error {
	x.one.changing.Lock()
	defer x.one.changing.Unlock()
	if err := x.one.still(x.g); err != nil {
		return err
	}
	if x.bridge != nil {
		return x.endBridge()
	}
	if err := x.syncBackings(); err != nil {
		return err
	}
	disk := func(d record.Disk) (string, config.Disk) { return d.Name, config.Disk{Backing: x.backing(d.Name)} }
	if id != 0 {
		name, c := disk(x.coming)
		return x.one.r.reloader.adoptDisks(x.one.name, map[string]config.Disk{name: c}, func() error {
			return x.g.Adopt(journal.DiskConfig{Name: name, Backing: c.Backing}, x.coming)
		})
	}
	conf := config.Group{Received: true, Disks: map[string]config.Disk{}}
	for _, d := range x.begins.Disks {
		if d.Removed == 0 {
			name, c := disk(d)
			conf.Disks[name] = c
		}
	}
	if err := x.one.setNote(func(n *groupNote) {
		n.From, n.FromKey, n.Seen, n.Own, n.Acked, n.Yielded = x.peer, x.conn.Peer.Fingerprint.String(), reignNotes(x.offer.Reigns), nil, nil, ""
	}); err != nil {
		return err
	}
	if err := x.one.r.reloader.begin(x.one.name, conf, x.begins); err != nil {
		return err
	}
	if x.g = x.one.journal(); x.g == nil {
		return fmt.Errorf("group %s was closed again", x.one.name)
	}
	x.received.Store(uint64(x.begins.At))
	return nil
}

func (x *receiving) Note(reigns record.Reigns) error {
	x.one.changing.Lock()
	defer x.one.changing.Unlock()
	if err := x.one.still(x.g); err != nil {
		return err
	}
	return x.one.setSeen(reigns)
}

func (x *receiving) Depose(reigns record.Reigns) error { return x.one.depose(x.g, reigns, x.peer) }

func (x *receiving) Heard(head record.LSN, at time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.head, x.at = head, at
}

// why is why the stream has ended.
func (x *receiving) why() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.err
}

func (x *receiving) status(g *journal.Group) *api.Source {
	x.mu.Lock()
	defer x.mu.Unlock()
	a := &api.Source{Peer: x.peer, State: "connected", Head: uint64(x.head), At: x.at, Build: x.conn.Build}
	a.ReceivedBytes, _ = x.conn.Bytes()
	if x.head > g.Durable() {
		a.Behind = uint64(x.head - g.Durable())
	}
	return a
}

// rawBacking is a raw file that a disk comes to.
type rawBacking struct {
	f       *os.File
	release func()
}

// fit gives an empty file a size. One of another size, or a device, is in the way.
func (b *rawBacking) fit(size int64) error {
	has, err := b.f.Seek(0, io.SeekEnd) // of a device, too
	switch {
	case err != nil:
		return err
	case has == 0:
		return b.f.Truncate(size)
	case has != size:
		return fmt.Errorf("it has %d bytes, and the disk that comes has %d: name, or make, another", has, size)
	}
	return nil
}

// Close closes the file. What was written is not durable by that.
func (b *rawBacking) Close() error {
	defer b.release()
	return b.f.Close()
}

func (b *rawBacking) ReadAt(p []byte, off int64) (int, error)  { return b.f.ReadAt(p, off) }
func (b *rawBacking) WriteAt(p []byte, off int64) (int, error) { return b.f.WriteAt(p, off) }

// Zero makes a hole, or, where there can be none, writes zeroes.
func (b *rawBacking) Zero(off, n int64) error {
	err := unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err == nil {
		return nil
	}
	_, err = b.f.WriteAt(make([]byte, n), off)
	return err
}

// Data tells holes from data.
func (b *rawBacking) Data(off, n int64, fn func(int64, bool)) error {
	for end := off + n; off < end; {
		data, err := b.f.Seek(off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			data, err = end, nil
		case err != nil: // devices, and some file systems, know no holes
			fn(end-off, true)
			return nil
		}
		if data = min(data, end); data > off {
			fn(data-off, false)
			off = data
			continue
		}
		hole, err := b.f.Seek(off, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		hole = min(hole, end)
		fn(hole-off, true)
		off = hole
	}
	return nil
}
