package record

import (
	"fmt"
	"time"
	"unicode"
	"unicode/utf8"
)

// Consistency is what a point promises to the applications in the guest.
type Consistency uint8

// The levels. Values are on disk: never renumber.
const (
	Crash       Consistency = 1 // what a power cut would have left
	Filesystem  Consistency = 2 // the guest's file systems were frozen
	Application Consistency = 3 // and the guest's hooks had run
)

var consistencyNames = map[Consistency]string{Crash: "crash", Filesystem: "filesystem", Application: "application"}

func (c Consistency) String() string {
	if s, ok := consistencyNames[c]; ok {
		return s
	}
	return fmt.Sprintf("consistency(%d)", uint8(c))
}

// ParseConsistency is the inverse of String for the known levels.
func ParseConsistency(s string) (Consistency, error) {
	for c, name := range consistencyNames {
		if s == name {
			return c, nil
		}
	}
	return 0, fmt.Errorf("unknown consistency %q: crash, filesystem or application", s)
}

// Marker names a point. Its LSN and time are those of its record.
type Marker struct {
	LSN         LSN
	Time        time.Time
	Label       string
	Consistency Consistency
	By          string // who asked: "user", "scheduler", "guest"
}

const (
	markerVersion = 1
	maxLabel      = 255
	maxBy         = 255
)

// CheckLabel says whether a label may name a marker: valid UTF-8 of at most
// 255 bytes, printable, no space at either end, no '@' or '/' (they divide an export's
// name), and nothing that [ParsePoint] reads as another form of a point.
func CheckLabel(label string) error {
	switch {
	case label == "":
		return fmt.Errorf("a label must not be empty")
	case len(label) > maxLabel:
		return fmt.Errorf("label of %d bytes: at most %d are allowed", len(label), maxLabel)
	case !utf8.ValidString(label):
		return fmt.Errorf("label %q is not valid UTF-8", label)
	}
	for i, r := range label {
		edge := i == 0 || i+utf8.RuneLen(r) == len(label)
		if r == '@' || r == '/' || !unicode.IsPrint(r) || edge && r == ' ' {
			return fmt.Errorf("label %q: %q is not allowed there", label, r)
		}
	}
	if p, err := ParsePoint(label); err != nil || p.Form != FormLabel {
		return fmt.Errorf("label %q reads as another form of a point: choose another", label)
	}
	return nil
}

// Append encodes the marker's payload to dst:
//
//	offset size field
//	  0     1   version, 1
//	  1     1   consistency
//	  2     1   length of label
//	  3     1   length of by
//	  4     …   label, by
//
// LSN and time are the record's own.
func (m *Marker) Append(dst []byte) []byte {
	label, by := m.Label[:min(len(m.Label), maxLabel)], m.By[:min(len(m.By), maxBy)]
	dst = append(dst, markerVersion, byte(m.Consistency), byte(len(label)), byte(len(by)))
	dst = append(dst, label...)
	return append(dst, by...)
}

// DecodeMarker reads a marker from its record's header and payload.
func DecodeMarker(lsn LSN, unixNano int64, b []byte) (Marker, error) {
	if len(b) < 4 {
		return Marker{}, fmt.Errorf("%w: marker of %d bytes", ErrCorrupt, len(b))
	}
	if b[0] != markerVersion {
		return Marker{}, fmt.Errorf("marker LSN %d has version %d: this program knows %d; use a newer one", lsn, b[0], markerVersion)
	}
	label, by := int(b[2]), int(b[3])
	if len(b) != 4+label+by {
		return Marker{}, fmt.Errorf("%w: marker of %d bytes, expected %d", ErrCorrupt, len(b), 4+label+by)
	}
	m := Marker{
		LSN: lsn, Time: time.Unix(0, unixNano).UTC(), Consistency: Consistency(b[1]),
		Label: string(b[4 : 4+label]), By: string(b[4+label:]),
	}
	if _, ok := consistencyNames[m.Consistency]; !ok {
		return Marker{}, fmt.Errorf("%w: marker LSN %d: %v", ErrCorrupt, lsn, m.Consistency)
	}
	return m, nil
}
