package record

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"
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

// Marker names a point. Its LSN and time are those of its record; everything else can
// be amended by later records, see [Amendment].
type Marker struct {
	LSN         LSN
	Time        time.Time
	Label       string
	Description string // for people
	Asked       Consistency
	Consistency Consistency   // what was reached
	By          string        // who asked: "user:NAME", "scheduler", "guest:NAME" or "tidemark"
	Frozen      time.Duration // how long guests stood still for it; 0: not at all
	Note        string        // why less was reached than was asked for
	Pinned      bool          // its point is kept
	// Held is until when nobody may let go of its point, whatever records say that come after; zero: anybody may.
	Held time.Time
	// Pending says that the cut is journaled, and not yet known to be what was asked for: guests
	// may be frozen. Such a marker names no point.
	Pending bool
	// OrCrash says what becomes of a pending marker that turns out to be crash-consistent only:
	// it stays as such, or it is deleted.
	OrCrash bool
}

const (
	markerVersion  = 3
	markerFixed    = 12
	maxLabel       = 255
	maxBy          = 255
	maxDescription = 1024
	maxNote        = 1024
)

// CheckLabel says whether a label may name a marker: valid UTF-8 of at most
// 255 bytes, printable (and not U+FFFD, which other programs make of what is no UTF-8), no space at either end, no '@' or '/' (they divide an export's
// name), and nothing that [ParsePoint] reads as another form of a point.
func CheckLabel(label string) error {
	switch {
	case label == "":
		return fmt.Errorf("a label must not be empty")
	case len(label) > maxLabel:
		return fmt.Errorf("label of %d bytes: at most %d are allowed", len(label), maxLabel)
	case !utf8.ValidString(label):
		return fmt.Errorf("label %q is not valid UTF-8", label)
	case label == "." || label == "..":
		return fmt.Errorf("label %q means something else in a path: choose another", label)
	}
	for i, r := range label {
		edge := i == 0 || i+utf8.RuneLen(r) == len(label)
		if r == '@' || r == '/' || r == unicode.ReplacementChar || !unicode.IsPrint(r) || edge && r == ' ' {
			return fmt.Errorf("label %q: %q is not allowed there", label, r)
		}
	}
	if p, err := ParsePoint(label); err != nil || p.Form != FormLabel {
		return fmt.Errorf("label %q reads as another form of a point: choose another", label)
	}
	return nil
}

// CheckDescription says whether a text may describe a marker: valid UTF-8 of at most
// 1024 bytes, printable.
func CheckDescription(text string) error {
	if len(text) > maxDescription {
		return fmt.Errorf("description of %d bytes: at most %d are allowed", len(text), maxDescription)
	}
	if !utf8.ValidString(text) {
		return fmt.Errorf("description %q is not valid UTF-8", text)
	}
	for _, r := range text {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return fmt.Errorf("description %q: %q is not allowed", text, r)
		}
	}
	return nil
}

// Trim cuts the marker's texts to what is journaled of them, and makes a line of its note.
func (m *Marker) Trim() {
	m.Note = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, m.Note)
	for _, t := range []struct {
		text *string
		most int
	}{{&m.Label, maxLabel}, {&m.By, maxBy}, {&m.Description, maxDescription}, {&m.Note, maxNote}} {
		if len(*t.text) > t.most {
			*t.text = strings.ToValidUTF8((*t.text)[:t.most], "")
		}
	}
}

// The flags of a marker. Values are on disk: never renumber.
const (
	markerPinned  = 1 << 0
	markerPending = 1 << 1
	markerOrCrash = 1 << 2
	markerHeld    = 1 << 3
)

// Append encodes the marker's payload to dst:
//
//	offset size field
//	  0     1   version: 3 if it is held, else 2
//	  1     1   consistency reached
//	  2     1   consistency asked for
//	  3     1   flags: 1 pinned, 2 pending, 4 or crash, 8 held
//	  4     8   frozen, nanoseconds
//	 12     …   label, by, description, note: each its length (2) and its bytes
//	  …     8   of a held one: until when, Unix nanoseconds
//
// Integers are little-endian. LSN and time are the record's own. Texts that are too long are cut.
// Version 1 had consistency (1), the lengths of label (1) and by (1), label, by.
func (m *Marker) Append(dst []byte) []byte {
	var flags byte
	for bit, on := range map[byte]bool{markerPinned: m.Pinned, markerPending: m.Pending, markerOrCrash: m.OrCrash, markerHeld: !m.Held.IsZero()} {
		if on {
			flags |= bit
		}
	}
	le := binary.LittleEndian
	version := byte(2)
	if flags&markerHeld != 0 {
		version = markerVersion
	}
	dst = append(dst, version, byte(m.Consistency), byte(m.Asked), flags)
	dst = le.AppendUint64(dst, uint64(m.Frozen))
	for _, t := range []struct {
		text string
		most int
	}{{m.Label, maxLabel}, {m.By, maxBy}, {m.Description, maxDescription}, {m.Note, maxNote}} {
		text := t.text[:min(len(t.text), t.most)]
		dst = le.AppendUint16(dst, uint16(len(text)))
		dst = append(dst, text...)
	}
	if flags&markerHeld != 0 {
		dst = le.AppendUint64(dst, uint64(m.Held.UnixNano()))
	}
	return dst
}

// CheckHeld is an error if a marker can not be held until a time: records have no later one than some day of the year 2262.
func CheckHeld(until time.Time) error {
	if last := time.Unix(0, math.MaxInt64); until.After(last) {
		return fmt.Errorf("%s is too far ahead: %s is the last time that can be noted", until.UTC().Format(time.RFC3339), last.UTC().Format(time.RFC3339))
	}
	return nil
}

// IsHeld reports whether nobody may let go of the marker's point at a time.
func (m *Marker) IsHeld(now time.Time) bool { return m.Held.After(now) }

// DecodeMarker reads a marker from its record's header and payload.
func DecodeMarker(lsn LSN, unixNano int64, b []byte) (m Marker, err error) {
	corrupt := func(what string) (Marker, error) {
		return Marker{}, fmt.Errorf("%w: marker LSN %d of %d bytes: %s", ErrCorrupt, lsn, len(b), what)
	}
	if len(b) < 4 {
		return corrupt("cut short")
	}
	m = Marker{LSN: lsn, Time: time.Unix(0, unixNano).UTC(), Consistency: Consistency(b[1])}
	switch b[0] {
	case 1:
		label, by := int(b[2]), int(b[3])
		if len(b) != 4+label+by {
			return corrupt("lengths do not fit")
		}
		m.Asked, m.Label, m.By = m.Consistency, string(b[4:4+label]), string(b[4+label:])
	case 2, markerVersion:
		if len(b) < markerFixed {
			return corrupt("cut short")
		}
		m.Asked = Consistency(b[2])
		m.Pinned, m.Pending, m.OrCrash = b[3]&markerPinned != 0, b[3]&markerPending != 0, b[3]&markerOrCrash != 0
		m.Frozen = time.Duration(binary.LittleEndian.Uint64(b[4:]))
		rest := b[markerFixed:]
		for _, dst := range []*string{&m.Label, &m.By, &m.Description, &m.Note} {
			if len(rest) < 2 || len(rest) < 2+int(binary.LittleEndian.Uint16(rest)) {
				return corrupt("lengths do not fit")
			}
			n := 2 + int(binary.LittleEndian.Uint16(rest))
			*dst, rest = string(rest[2:n]), rest[n:]
		}
		if b[0] == markerVersion {
			if len(rest) != 8 {
				return corrupt("lengths do not fit")
			}
			m.Held, rest = time.Unix(0, int64(binary.LittleEndian.Uint64(rest))).UTC(), nil
		}
		if len(rest) > 0 {
			return corrupt("more bytes than fields")
		}
	default:
		return Marker{}, fmt.Errorf("marker LSN %d has version %d: this program knows %d; use a newer one", lsn, b[0], markerVersion)
	}
	for _, c := range []Consistency{m.Consistency, m.Asked} {
		if _, ok := consistencyNames[c]; !ok {
			return corrupt(c.String())
		}
	}
	return m, nil
}

// Amendment changes a marker that an earlier record took. It has all of the marker's fields, so
// that the newest amendment alone says what the marker is.
type Amendment struct {
	Target  LSN    // the marker's record
	Deleted bool   // the label names nothing any more; Marker is not used
	Marker  Marker // as it is from now on
}

const (
	amendmentVersion = 1
	amendmentFixed   = 16
)

// Append encodes the amendment's payload to dst:
//
//	offset size field
//	  0     1   version, 1
//	  1     1   1: the marker is deleted
//	  2     6   zero
//	  8     8   LSN of the marker, little-endian
//	 16     …   the marker's payload, see [Marker.Append]; nothing if it is deleted
func (a *Amendment) Append(dst []byte) []byte {
	dst = append(dst, amendmentVersion, 0, 0, 0, 0, 0, 0, 0)
	if a.Deleted {
		dst[len(dst)-7] = 1
	}
	dst = binary.LittleEndian.AppendUint64(dst, uint64(a.Target))
	if a.Deleted {
		return dst
	}
	return a.Marker.Append(dst)
}

// DecodeAmendment reads an amendment from its record's payload. The marker's time is left zero.
func DecodeAmendment(b []byte) (a Amendment, err error) {
	if len(b) < amendmentFixed {
		return a, fmt.Errorf("%w: amendment of %d bytes", ErrCorrupt, len(b))
	}
	if b[0] != amendmentVersion {
		return a, fmt.Errorf("amendment has version %d: this program knows %d; use a newer one", b[0], amendmentVersion)
	}
	a.Target, a.Deleted = LSN(binary.LittleEndian.Uint64(b[8:])), b[1] == 1
	if a.Deleted {
		return a, nil
	}
	a.Marker, err = DecodeMarker(a.Target, 0, b[amendmentFixed:])
	a.Marker.Time = time.Time{}
	return a, err
}
