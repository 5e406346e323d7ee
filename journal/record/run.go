package record

import "fmt"

// Run is records that follow each other.
type Run struct {
	First, Last LSN
	Bytes       []byte // the records as they stand in a log, see [Each]
	// Disks is every disk that the group had had when First was appended, and Reigns are its reigns until then.
	Disks  []Disk
	Reigns Reigns
}

// Each calls fn with the records that stand in b one after the other, as a log has them: whole, each padded to
// Alignment. Headers, tables and payloads are verified before fn sees them; what it is given are views of b.
// The error wraps ErrCorrupt if b is anything else, or is fn's.
func Each(b []byte, fn func(h Header, payload []byte) error) error {
	for at := 0; at < len(b); {
		h, err := Decode(b[at:])
		if err != nil {
			return fmt.Errorf("%w: at %d of %d bytes of records: %w", ErrCorrupt, at, len(b), err)
		}
		if h.Size() > int64(len(b)-at) {
			return fmt.Errorf("%w: LSN %d takes %d bytes of records, and %d are left", ErrCorrupt, h.LSN, h.Size(), len(b)-at)
		}
		payload := b[at+h.EncodedSize():][:h.Payload]
		if err := h.Sums.Verify(payload); err != nil {
			return fmt.Errorf("LSN %d: %w", h.LSN, err)
		}
		if err := fn(h, payload); err != nil {
			return err
		}
		at += int(h.Size())
	}
	return nil
}
