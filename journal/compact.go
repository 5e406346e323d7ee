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

const (
	// compactEvery is how often it is looked whether any file is to become compact.
	compactEvery = 15 * time.Second
	// compactHold is how long a file waits in all for a guest that writes much: other groups' are looked at then, and it is begun with again later.
	compactHold = time.Minute
)

// errLater says that a file is to become compact when there is less to do, or more room.
var errLater = errors.New("there is no time for it now")

// Compact makes every file compact that is closed, and whose records are in the backings durably: see [segment.Set.Compact]. What any view shows stays the same. It returns
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

// toCompact is the newest file that is to become compact, and was closed a time ago; nil: none. Older ones expire sooner, and the work with them.
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
			if i+1 == len(files) || age > 0 && files[i+1].Created > closedBy || g.compacting.plain[f.Number] || f.IsCompact() {
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

// keepPlain notes that a file stays plain, or may become compact again.
func (g *Group) keepPlain(f *segment.File, plain bool) {
	g.compacting.Lock()
	defer g.compacting.Unlock()
	if plain {
		g.compacting.plain[f.Number] = true
	} else {
		delete(g.compacting.plain, f.Number)
	}
}

// compact makes a file compact, or notes that it stays plain.
func (g *Group) compact(f *segment.File, pause func(int64) error) (saved int64, err error) {
	if err := g.ended(); err != nil {
		return 0, err
	}
	f, err = g.set.Acquire(f.Number)
	if errors.Is(err, segment.ErrGone) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Release()
	saved, err = g.set.Compact(f, g.o.keepCompact(), pause)
	switch {
	case errors.Is(err, segment.ErrGone):
		return 0, nil
	case errors.Is(err, segment.ErrUnsynced):
		return saved, g.fail(err)
	case errors.Is(err, record.ErrCorrupt):
		// What a crash tore off at a file's end is no damage; what is, a verification finds.
		g.log.Info("a segment stays plain: something in it is not a whole record", zap.Error(err))
		err = nil
	case errors.Is(err, segment.ErrFull), errors.Is(err, errLater), errors.Is(err, context.Canceled):
		return 0, fmt.Errorf("make %s compact: %w", f.Path, err)
	case err != nil:
		g.keepPlain(f, true) // or every try would write it anew
		return 0, fmt.Errorf("make %s compact: %w", f.Path, err)
	}
	if !f.IsCompact() {
		g.keepPlain(f, true)
	}
	return saved, err
}

// runCompaction makes files compact at the daemon's pace, one at a time, as each takes a processor, until ctx ends.
func (s *Store) runCompaction(ctx context.Context) {
	t := time.NewTicker(compactEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for again := true; again; {
			again = false
			for _, g := range s.Groups() {
				again = g.compactDue(ctx) || again
			}
		}
	}
}

// compactDue makes a file compact, if one is due. It reports whether it is worth looking for another one at once.
func (g *Group) compactDue(ctx context.Context) bool {
	if ctx.Err() != nil || g.ended() != nil {
		return false
	}
	f := g.toCompact(g.o.CompactAfter)
	if f == nil {
		return false
	}
	began := time.Now()
	hold := compactHold
	saved, err := g.compact(f, func(bytes int64) error {
		if err := g.o.CompactPace(ctx, bytes); err != nil {
			return err
		}
		held := time.Now()
		err := g.cleanPause(ctx, 0) // for a guest that writes much
		if hold -= time.Since(held); err == nil && (hold < 0 || g.hurry.Load() > 0) {
			return errLater
		}
		return err
	})
	switch {
	case saved > 0:
		g.log.Info("made a segment compact", zap.String("segment", f.Path), zap.Int64("bytes_saved", saved), zap.Duration("took", time.Since(began)))
	case errors.Is(err, errLater), errors.Is(err, segment.ErrFull):
		g.log.Debug("a segment stays plain for now", zap.Error(err))
	case err != nil && ctx.Err() == nil && g.alive():
		g.log.Warn("a segment stays plain", zap.Error(err))
	}
	return err == nil
}

// saved is how many bytes the group's compact files take less than they would as plain ones.
func (g *Group) saved() (bytes int64) {
	files := slices.Concat(g.set.Files(segment.Log), g.set.Files(segment.Originals))
	for _, f := range files {
		bytes += f.Saved()
	}
	return bytes
}
