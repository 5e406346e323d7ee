package journal

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Compact makes every file compact that is closed, and whose records are in the backings durably: see [segment.Compact]. What any view shows stays the same. It returns
// how many bytes came free. Files that are no smaller so, or damaged, stay plain, as do all while there is no room.
func (g *Group) Compact() (saved int64, err error) {
	for {
		f := g.toCompact(0)
		if f == nil {
			return saved, nil
		}
		n, err := g.compact(f, func(int64) error { return nil })
		if saved += n; err != nil {
			return saved, err
		}
	}
}

// toCompact is the newest file that is to become compact, and was closed a time ago; nil: none. Those that are older go sooner.
func (g *Group) toCompact(age time.Duration) *segment.File {
	g.compacting.Lock()
	defer g.compacting.Unlock()
	var found *segment.File
	closedBy := g.o.Now().Add(-age).UnixNano()
	there := map[uint32]bool{}
	for _, kind := range []segment.Kind{segment.Log, segment.Originals} {
		files := g.set.Files(kind)
		for i, f := range files {
			there[f.Number] = true
			if i+1 == len(files) || age > 0 && files[i+1].Created > closedBy || g.compacting.plain[f.Number] || f.Compact() {
				continue
			}
			if kind == segment.Log && files[i+1].First-1 > record.LSN(g.checkpointed.Load()) {
				continue
			}
			if found == nil || f.Number > found.Number {
				found = f
			}
		}
	}
	maps.DeleteFunc(g.compacting.plain, func(n uint32, _ bool) bool { return !there[n] })
	return found
}

// compact makes a file compact, or notes that it stays plain.
func (g *Group) compact(f *segment.File, pause func(int64) error) (saved int64, err error) {
	g.compacting.Lock()
	defer g.compacting.Unlock()
	f, err = g.set.Acquire(f.Number)
	if errors.Is(err, segment.ErrGone) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Release()
	saved, err = g.set.Compact(f, g.o.keepLog(), pause)
	switch {
	case errors.Is(err, segment.ErrGone):
		return 0, nil
	case errors.Is(err, segment.ErrFull):
		return 0, fmt.Errorf("make a segment compact: %w", err)
	case errors.Is(err, record.ErrCorrupt):
		// What a crash tore off at a file's end is no damage; what is, a verification finds.
		g.log.Info("a segment is not made compact, as it has more than whole records", zap.Error(err))
		err = nil
	case err != nil:
		return 0, fmt.Errorf("make a segment compact: %w", err)
	}
	if !f.Compact() {
		g.compacting.plain[f.Number] = true
	}
	return saved, err
}

// compactDue makes one file compact at the store's pace, if one is due and no other group is at it. It reports whether there may be more.
func (g *Group) compactDue(ctx context.Context) (more bool, err error) {
	if g.o.CompactPace == nil {
		return false, nil
	}
	f := g.toCompact(g.o.CompactAfter)
	if f == nil {
		return false, nil
	}
	select {
	case g.store.compacting <- struct{}{}:
		defer func() { <-g.store.compacting }()
	default:
		return false, nil
	}
	began := time.Now()
	saved, err := g.compact(f, func(bytes int64) error {
		if err := g.o.CompactPace(ctx, bytes); err != nil {
			return err
		}
		return g.cleanPause(ctx, 0) // for a guest that writes much
	})
	if saved > 0 {
		g.log.Info("made a segment compact", zap.String("segment", f.Path), zap.Int64("bytes_saved", saved), zap.Duration("took", time.Since(began)))
	}
	return err == nil, err
}

// saved is how many bytes the group's compact files take less than they would as plain ones.
func (g *Group) saved() (bytes int64) {
	files := slices.Concat(g.set.Files(segment.Log), g.set.Files(segment.Originals))
	for _, f := range files {
		bytes += f.Saved()
	}
	return bytes
}
