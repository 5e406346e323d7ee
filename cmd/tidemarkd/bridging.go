package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// bridgeWriter writes what comes of a group's disks to its journal, while the group is brought over a gap. Blocks come once each: what
// is gathered is not read before it is written.
type bridgeWriter struct {
	g     *journal.Group
	ops   []journal.Op
	bytes int
}

const (
	// What is gathered takes one LSN, of which a gap may have few, and memory. Where there are no more than fewLSNs, more is gathered for one.
	bridgeBytes, bridgeOps = 4 << 20, 4096
	fewLSNs                = 1024
	// The last one that is added may be of replica/link's dataBytes.
	maxBridge, maxOps = journal.MaxBridgeBytes - 2<<20, 4 * bridgeOps
)

func (b *bridgeWriter) add(op journal.Op) error {
	b.ops = append(b.ops, op)
	b.bytes += len(op.Data)
	most, ops := bridgeBytes, bridgeOps
	if b.g.BridgeRoom() <= fewLSNs {
		most, ops = maxBridge, maxOps
	}
	if b.bytes < most && len(b.ops) < ops {
		return nil
	}
	return b.flush()
}

func (b *bridgeWriter) flush() error {
	err := b.g.Bridge(b.ops)
	b.ops, b.bytes = nil, 0
	return err
}

// bridgeDisk is a disk of the group. Its methods are link.Backing's.
type bridgeDisk struct {
	b *bridgeWriter
	d *disk.Disk
}

func (d bridgeDisk) ReadAt(p []byte, off int64) (int, error) {
	return len(p), d.d.ReadAt(p, off, false)
}

func (d bridgeDisk) WriteAt(p []byte, off int64) (int, error) {
	return len(p), d.b.add(journal.Op{Kind: record.KindWrite, Disk: d.d, Ext: record.Extent{Off: off, Len: int64(len(p))}, Data: bytes.Clone(p)})
}

func (d bridgeDisk) Zero(off, n int64) error {
	return d.b.add(journal.Op{Kind: record.KindTrim, Disk: d.d, Ext: record.Extent{Off: off, Len: n}})
}

func (d bridgeDisk) Data(off, n int64, fn func(int64, bool)) error {
	return d.d.Extents(record.Extent{Off: off, Len: n}, func(n int64, zero bool) { fn(n, !zero) })
}

// Bridge begins to bring the group over a gap: nothing of what is here is lost.
func (x *receiving) Bridge(b record.Beginning) error {
	one := x.one
	one.changing.Lock()
	defer one.changing.Unlock()
	if err := one.still(x.g); err != nil {
		return err
	}
	if x.g.Head() >= b.At {
		// One to elsewhere was begun, or a crash came right before the end of this one.
		var err error
		if x.g, err = one.beforeGap(x.g); err != nil {
			return err
		}
	}
	if err := x.g.BeginBridge(b); errors.Is(err, journal.ErrDetached) {
		return fmt.Errorf("%w: %s", err, one.seededAgain())
	} else if err != nil {
		return err
	}
	x.begins, x.bridge = &b, &bridgeWriter{g: x.g}
	return x.openComing(func(d record.Disk) bool {
		return !slices.ContainsFunc(x.g.Disks(), func(o *disk.Disk) bool { return o.ID == d.ID })
	})
}

// endBridge ends it. one.changing is held.
func (x *receiving) endBridge() error {
	came := map[string]config.Disk{}
	var backings []journal.DiskConfig
	for _, d := range x.begins.Disks {
		if x.opened[d.ID] != nil {
			came[d.Name] = config.Disk{Backing: x.backing(d.Name)}
			backings = append(backings, journal.DiskConfig{Name: d.Name, Backing: x.backing(d.Name)})
		}
	}
	if err := x.syncBackings(); err != nil {
		return err
	}
	if err := x.one.r.reloader.adoptDisks(x.one.name, came, func() error { return x.g.EndBridge(x.bridge.ops, backings) }); err != nil {
		return err
	}
	x.bridge = nil
	x.received.Store(uint64(x.g.Head()))
	return nil
}

// seededAgain is how what is here of the group is given up.
func (one *replicated) seededAgain() string {
	if !one.r.reloader.configured()[one.name].Received {
		return one.byHand()
	}
	return fmt.Sprintf("tidemark replica accept --anew %s drops what is here, and has it seeded again", one.name)
}

// setStuck notes that the record behind what is here could not be taken: the writer is to bring the group over it.
func (one *replicated) setStuck(at place) {
	one.mu.Lock()
	defer one.mu.Unlock()
	one.stuck = at
}

func (one *replicated) isStuck(at place) bool {
	one.mu.Lock()
	defer one.mu.Unlock()
	return one.stuck == at
}

// beforeGap takes the group back to before the gap that it is being brought over, if it is, and returns it as it is then. one.changing is held.
func (one *replicated) beforeGap(g *journal.Group) (*journal.Group, error) {
	after, open := g.Bridging()
	if !open {
		return g, nil
	}
	one.log.Warn("the group goes back to before the gap that it was being brought over", zap.Uint64("to", uint64(after)))
	if err := one.goBack(after, nil); err != nil {
		return g, fmt.Errorf("go back to LSN %d, before a gap: %w", after, err)
	}
	if now := one.journal(); now != nil {
		return now, nil
	}
	return nil, fmt.Errorf("group %s went back to LSN %d, and could not be opened again: see the log, and start the daemon again", one.name, after)
}

// beforeGapIfNeedless takes the group back to before the gap that it was being brought over for another writer's sake, if the one that offers it has all
// records from there on. If it can not go back, it is brought over it. The group's other streams have ended.
func (one *replicated) beforeGapIfNeedless(offer *wire.Offer) {
	one.changing.Lock()
	defer one.changing.Unlock()
	g := one.journal()
	if g == nil {
		return
	}
	after, open := g.Bridging()
	reigns := g.Reigns()
	if !open || after < offer.Horizon || one.isStuck(place{after, reigns[len(reigns)-1]}) {
		return
	}
	if common, err := reigns.Common(after, offer.Reigns, offer.Head); err != nil || common < after {
		return
	}
	if _, err := one.beforeGap(g); err != nil {
		one.log.Warn("the group is brought over a gap that it need not be", zap.Error(err))
	}
}

// goBack rewinds the group, with its exports and scratch exports closed meanwhile. keep is called first, and may be nil. one.changing is held.
func (one *replicated) goBack(to record.LSN, keep func() error) error {
	x := one.r.exports
	if err := x.seal(one.name, "it is being rewound", true); err != nil {
		return err
	}
	defer x.unseal(one.name)
	if keep != nil {
		if err := keep(); err != nil {
			return err
		}
	}
	resume, err := x.scratches.suspend(one.name)
	if err != nil {
		return err
	}
	defer resume()
	// Only what could not be rewound, once what is to be kept was, may be given up instead.
	one.unrewound = true
	if err := one.r.reloader.rewind(one.name, to); err != nil {
		return err
	}
	one.unrewound = false
	return nil
}
