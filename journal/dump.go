package journal

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Visit is what Dump calls for what it finds, in order.
type Visit struct {
	Segment func(path string, h segment.Header) error
	Record  func(path string, off int64, h record.Header) error
	Version func(e index.Entry) error
	Marker  func(m record.Marker) error

	Definition func(d record.Definition) error
}

// Dump shows the group's files and index as they are. Functions that are nil
// are not called. Damage ends a file's part and is returned at the end.
func (g *Group) Dump(ctx context.Context, v Visit) error {
	defer g.unpinFrom(g.pinAll())
	var damage []error
	for _, k := range []segment.Kind{segment.Log, segment.Originals} {
		if v.Segment == nil {
			break
		}
		bad, err := g.dumpFiles(ctx, k, v)
		if err != nil {
			return err
		}
		damage = append(damage, bad...)
	}
	if v.Version != nil {
		err := g.ix.Versions(func(e index.Entry) (bool, error) { return true, errors.Join(ctx.Err(), v.Version(e)) })
		if err != nil {
			return err
		}
	}
	if v.Marker != nil {
		err := g.ix.Markers(0, func(m record.Marker) (bool, error) { return true, v.Marker(m) })
		if err != nil {
			return err
		}
	}
	if v.Definition != nil {
		if err := g.ix.Definitions(func(d index.Definition) error { return v.Definition(d.Definition) }); err != nil {
			return err
		}
	}
	return errors.Join(damage...)
}

func (g *Group) dumpFiles(ctx context.Context, k segment.Kind, v Visit) (damage []error, err error) {
	files, release := g.set.Hold(k)
	defer release()
	for _, f := range files {
		if err := v.Segment(f.Path, f.Header); err != nil {
			return nil, err
		}
		if v.Record == nil {
			continue
		}
		_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
			return errors.Join(ctx.Err(), v.Record(f.Path, off, h))
		})
		if errors.Is(err, record.ErrCorrupt) {
			damage = append(damage, err)
		} else if err != nil {
			return nil, err
		}
	}
	return damage, nil
}

// GroupNames lists the groups that a state directory holds.
func GroupNames(dir string, o Options) ([]string, error) {
	o = o.withDefaults(1)
	names, err := o.FS.List(o.FS.PathJoin(dir, groupsName))
	if err != nil {
		return nil, fmt.Errorf("%s is no state directory: %w", dir, err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, discarded) }), nil
}
