// Package dump prints a group's segments and index for people, or as JSON
// lines; the daemon does it for a running group, the client for one at rest.
//
// It promises to change nothing. Its text is for people and may change; its
// JSON lines, of which docs/cli.md is the contract, have group, kind and a value under the kind's name. The caller must
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
			return print("segment", fmt.Sprintf("%s: %v number %d, first LSN %d, horizon %d, applied %d, begun %s, disks %v%s",
				path, h.Kind, h.Number, h.First, h.Horizon, h.Applied, when(h.Created), h.Disks, gapsOf(h)), segmentOf(path, h))
		}
	}
	if f.Records {
		v.Record = func(path string, off int64, h record.Header) error {
			return print("record", fmt.Sprintf("at %d: LSN %d %s %v disk %d %v, %d bytes", off, h.LSN, when(h.Time), h.Kind, h.Disk, h.Extent, h.Payload), recordOf(path, off, h))
		}
	}
	if f.Index {
		v.Version = func(e index.Entry) error {
			return print("version", fmt.Sprintf("disk %d class %d unit %d LSN %d: file %d at %d, zero %v",
				e.Disk, e.Unit.Class, e.Unit.Index, e.LSN, e.File, e.Payload, e.Zero), versionOf(e))
		}
		v.Marker = func(m record.Marker) error {
			return print("marker", fmt.Sprintf("LSN %d %s %v %q by %s", m.LSN, when(m.Time.UnixNano()), m.Consistency, m.Label, m.By),
				marker{m.LSN, m.Label, m.Time.UTC(), m.Consistency.String(), m.By, m.Asked.String(), m.Description, m.Note, m.Pinned, m.Held, m.Pending})
		}
		v.Definition = func(d record.Definition) error {
			return print("definition", fmt.Sprintf("%s since LSN %d %s: %d bytes, gone %v", d.Name, d.Since, when(d.Time.UnixNano()), len(d.Content), d.Gone),
				definition{d.Name, d.Since, d.Time.UTC(), len(d.Content), d.Gone})
		}
	}
	return v
}

func when(unixNano int64) string { return time.Unix(0, unixNano).UTC().Format(time.RFC3339Nano) }

// What the JSON lines hold.
type (
	file struct {
		Path    string     `json:"path"`
		Kind    string     `json:"kind"`
		Number  uint32     `json:"number"`
		First   record.LSN `json:"first"`
		Epoch   uint64     `json:"epoch"`
		Horizon record.LSN `json:"horizon"`
		Applied record.LSN `json:"applied"`
		Created string     `json:"created"`
		Disks   []fileDisk `json:"disks"`

		BridgeAfter *record.LSN `json:"bridge_after,omitempty"`
		GapAfter    *record.LSN `json:"gap_after,omitempty"`
	}
	fileDisk struct {
		ID   record.DiskID `json:"id"`
		Name string        `json:"name"`
		Size int64         `json:"size"`

		Added   record.LSN `json:"added"`
		Removed record.LSN `json:"removed,omitempty"`
	}
	entry struct {
		Path    string        `json:"path"`
		At      int64         `json:"at"`
		LSN     record.LSN    `json:"lsn"`
		Time    string        `json:"time"`
		Kind    string        `json:"kind"`
		Disk    record.DiskID `json:"disk"`
		Offset  int64         `json:"offset"`
		Length  int64         `json:"length"`
		Payload int           `json:"payload"`
		Durable record.LSN    `json:"durable"`
	}
	version struct {
		Disk   record.DiskID `json:"disk"`
		LSN    record.LSN    `json:"lsn"`
		Offset int64         `json:"offset"`
		Length int64         `json:"length"`
		Zero   bool          `json:"zero"`
		Number uint32        `json:"number,omitempty"`
		At     uint32        `json:"at,omitempty"`
	}
	marker struct {
		LSN         record.LSN `json:"lsn"`
		Label       string     `json:"label"`
		Time        time.Time  `json:"time"`
		Consistency string     `json:"consistency"`
		By          string     `json:"by"`
		Asked       string     `json:"asked"`
		Description string     `json:"description,omitempty"`
		Note        string     `json:"note,omitempty"`
		Pinned      bool       `json:"pinned,omitempty"`
		Held        time.Time  `json:"held_until,omitzero"`
		Pending     bool       `json:"pending,omitempty"` // a cut is under way, or a stop came between
	}
	definition struct {
		Name  string     `json:"name"`
		Since record.LSN `json:"since"`
		Time  time.Time  `json:"time"`
		Bytes int        `json:"bytes"`
		Gone  bool       `json:"gone,omitempty"`
	}
)

// gapsOf is what the head of a file says of gaps.
func gapsOf(h segment.Header) (text string) {
	if h.Bridge {
		text += fmt.Sprintf(", a bridge over a gap after LSN %d", h.BridgeAfter)
	}
	if h.Bridged {
		text += fmt.Sprintf(", the first behind a gap after LSN %d", h.GapAfter)
	}
	return text
}

func segmentOf(path string, h segment.Header) file {
	f := file{
		Path: path, Kind: h.Kind.String(), Number: h.Number, First: h.First, Epoch: h.Reigns.Epoch(),
		Horizon: h.Horizon, Applied: h.Applied, Created: when(h.Created), Disks: []fileDisk{},
	}
	for _, d := range h.Disks {
		f.Disks = append(f.Disks, fileDisk(d))
	}
	if h.Bridge {
		f.BridgeAfter = &h.BridgeAfter
	}
	if h.Bridged {
		f.GapAfter = &h.GapAfter
	}
	return f
}

func recordOf(path string, off int64, h record.Header) entry {
	return entry{
		Path: path, At: off, LSN: h.LSN, Time: when(h.Time), Kind: h.Kind.String(), Disk: h.Disk,
		Offset: h.Extent.Off, Length: h.Extent.Len, Payload: h.Payload, Durable: h.Durable,
	}
}

func versionOf(e index.Entry) version {
	return version{
		Disk: e.Disk, LSN: e.LSN, Offset: e.Unit.First() * record.BlockSize, Length: e.Unit.Blocks() * record.BlockSize,
		Zero: e.Zero, Number: e.File, At: e.Payload,
	}
}
