package journal

import (
	"time"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// appendNoteLocked journals a record that changes no disk, and returns its header. payload is
// asked for once its LSN and time are known. The append lock is held, by way of admittedNote.
func (g *Group) appendNoteLocked(kind record.Kind, flags uint8, disk record.DiskID, payload func(record.LSN, time.Time) []byte) (record.Header, error) {
	a := &g.append
	var h record.Header
	var body []byte
	stamp := func() {
		now := g.nowLocked()
		body = payload(a.next, time.Unix(0, now).UTC())
		h = record.Header{
			LSN: a.next, Time: now, Durable: g.Durable(), Disk: disk, Kind: kind,
			Flags: flags, Payload: len(body), Sums: record.AppendSums(nil, body),
		}
	}
	if stamp(); !a.log.Fits(h.Size()) {
		if err := g.rollLocked(h.Size()); err != nil {
			return h, err
		}
		stamp() // no record is older than its file's head
	}
	h.Salt = a.log.Current().Salt
	a.enc.Reset(h.EncodedSize())
	a.enc.Add(&h, body)
	off := a.log.Tail()
	if err := a.log.Append(a.enc.Vec, a.enc.Bytes); err != nil {
		return h, g.failLocked(err)
	}
	a.pend.times = append(a.pend.times, index.TimeMark{Time: h.Time, LSN: h.LSN, File: a.log.Current().Number, Off: uint32(off)})
	g.newestLocked(h.Time)
	g.advanceLocked(a.next, 1, a.enc.Bytes, 0)
	return h, nil
}
