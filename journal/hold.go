package journal

import "github.com/tidemark-cdp/tidemark/journal/record"

// Hold keeps the records from an LSN on from expiring for the group's limit: others have yet to read them. It
// does not keep them when the file system has no room for what guests write. Nothing of it outlives the process.
type Hold struct{ g *Group }

// Hold keeps the records from an LSN on, those that have not expired yet.
func (g *Group) Hold(from record.LSN) *Hold {
	h := &Hold{g}
	h.Move(from)
	return h
}

// Move has it keep the records from another LSN on.
func (h *Hold) Move(from record.LSN) {
	h.g.pins.Lock()
	defer h.g.pins.Unlock()
	h.g.pins.holds[h] = from
}

// Release has it keep nothing more.
func (h *Hold) Release() {
	h.g.pins.Lock()
	defer h.g.pins.Unlock()
	delete(h.g.pins.holds, h)
}

// oldestHold is the newest LSN that no hold keeps the record of.
func (g *Group) oldestHold() record.LSN {
	g.pins.Lock()
	defer g.pins.Unlock()
	free := record.MaxLSN
	for _, from := range g.pins.holds {
		free = min(free, max(from, 1)-1)
	}
	return free
}
