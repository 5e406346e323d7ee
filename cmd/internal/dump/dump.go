// Package dump prints a group's segments and index for people, or as JSON
// lines; the daemon does it for a running group, the client for one at rest.
//
// It promises to change nothing. Its text is for people and may change; its
// JSON lines have group, kind and a value under the kind's name. The caller must
// give an open group. It keeps no state and is safe for concurrent use.
package dump

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Options say what to print.
type Options struct {
	Segments bool // the segments' headers
	Records  bool // those and their records
	Index    bool // versions and markers
	JSON     bool // one object a line
}

// Group prints a group to w.
func Group(ctx context.Context, w io.Writer, g *journal.Group, o Options) error {
	return g.Dump(ctx, visit(printer(w, g.Name(), o.JSON), o))
}

// printer prints a line for people, or the value as JSON.
func printer(out io.Writer, group string, asJSON bool) func(kind, text string, v any) error {
	return func(kind, text string, v any) error {
		if asJSON {
			return json.NewEncoder(out).Encode(map[string]any{"group": group, "kind": kind, kind: v})
		}
		_, err := fmt.Fprintf(out, "%s %s %s\n", group, kind, text)
		return err
	}
}

func visit(print func(kind, text string, v any) error, f Options) journal.Visit {
	var v journal.Visit
	if f.Segments || f.Records {
		v.Segment = func(path string, h segment.Header) error {
			return print("segment", fmt.Sprintf("%s: %v number %d, first LSN %d, horizon %d, applied %d, begun %s, disks %v",
				path, h.Kind, h.Number, h.First, h.Horizon, h.Applied, when(h.Created), h.Disks), h)
		}
	}
	if f.Records {
		v.Record = func(_ string, off int64, h record.Header) error {
			return print("record", fmt.Sprintf("at %d: LSN %d %s %v disk %d %v, %d bytes", off, h.LSN, when(h.Time), h.Kind, h.Disk, h.Extent, h.Payload), h)
		}
	}
	if f.Index {
		v.Version = func(e index.Entry) error {
			return print("version", fmt.Sprintf("disk %d class %d unit %d LSN %d: file %d at %d, zero %v",
				e.Disk, e.Unit.Class, e.Unit.Index, e.LSN, e.File, e.Payload, e.Zero), e)
		}
		v.Marker = func(m record.Marker) error {
			return print("marker", fmt.Sprintf("LSN %d %s %v %q by %s", m.LSN, when(m.Time.UnixNano()), m.Consistency, m.Label, m.By), m)
		}
	}
	return v
}

func when(unixNano int64) string { return time.Unix(0, unixNano).UTC().Format(time.RFC3339Nano) }
