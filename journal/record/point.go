package record

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Form is the way in which a point names its LSN.
type Form uint8

// The forms of a point.
const (
	FormLatest Form = iota + 1 // the head, or the newest marker of at least a consistency
	FormLSN                    // lsn:N
	FormTime                   // an instant
	FormAgo                    // a time before now
	FormLabel                  // a marker's label
)

// Point is anything that names an LSN of a group.
type Point struct {
	Form        Form
	LSN         LSN           // FormLSN
	Time        time.Time     // FormTime
	Ago         time.Duration // FormAgo, positive
	Label       string        // FormLabel
	Consistency Consistency   // FormLatest; 0 for the head itself
}

// ParsePoint reads a point:
//
//	latest                     the head
//	latest:application         the newest marker of that consistency or a stricter one
//	lsn:4711                   that record
//	2026-11-21T10:00:00Z       the last record at or before that time (RFC 3339)
//	-15m, -1h30m               that long before now
//	before-upgrade             the marker with that label
//
// It is an error for text that cannot be any of these, so that a mistyped
// time is not looked up as a label.
func ParsePoint(s string) (Point, error) {
	switch {
	case s == "":
		return Point{}, fmt.Errorf("empty point: name a label, a time, lsn:N, -15m or latest")
	case s == "latest":
		return Point{Form: FormLatest}, nil
	case strings.HasPrefix(s, "latest:"):
		c, err := ParseConsistency(s[len("latest:"):])
		if err != nil {
			return Point{}, fmt.Errorf("point %q: %w", s, err)
		}
		return Point{Form: FormLatest, Consistency: c}, nil
	case strings.HasPrefix(s, "lsn:"):
		n, err := strconv.ParseUint(s[len("lsn:"):], 10, 64)
		if err != nil {
			return Point{}, fmt.Errorf("point %q: lsn: takes a decimal number", s)
		}
		return Point{Form: FormLSN, LSN: LSN(n)}, nil
	case s[0] == '-':
		d, err := parseAgo(s[1:])
		if err != nil {
			return Point{}, fmt.Errorf("point %q: expected a duration such as -15m, -1h30m or -2d", s)
		}
		return Point{Form: FormAgo, Ago: d}, nil
	case looksLikeDate(s):
		t, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return Point{}, fmt.Errorf("point %q: expected a time such as 2026-11-21T10:00:00Z or 2026-11-21T10:00:00+01:00", s)
		}
		return Point{Form: FormTime, Time: t}, nil
	}
	if len(s) > maxLabel {
		return Point{}, fmt.Errorf("point of %d bytes: a label has at most %d", len(s), maxLabel)
	}
	return Point{Form: FormLabel, Label: s}, nil
}

// parseAgo is time.ParseDuration with whole days in front.
func parseAgo(s string) (time.Duration, error) {
	var days time.Duration
	if head, rest, ok := strings.Cut(s, "d"); ok {
		n, err := strconv.ParseUint(head, 10, 16)
		if err != nil {
			return 0, fmt.Errorf("bad days %q", head)
		}
		days = time.Duration(n) * 24 * time.Hour
		if s = rest; s == "" {
			return days, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || s[0] == '+' || s[0] == '-' || d+days < d {
		return 0, fmt.Errorf("bad duration %q", s)
	}
	return d + days, nil
}

// looksLikeDate reports whether s starts as 2026-11-21 does, alone or with more behind a 'T'.
func looksLikeDate(s string) bool {
	const shape = "0000-00-00"
	if len(s) < len(shape) {
		return false
	}
	for i := range len(shape) {
		digit := s[i] >= '0' && s[i] <= '9'
		if shape[i] == '0' && !digit || shape[i] == '-' && s[i] != '-' {
			return false
		}
	}
	return len(s) == len(shape) || s[len(shape)] == 'T' || s[len(shape)] == 't'
}

func (p Point) String() string {
	switch p.Form {
	case FormLatest:
		if p.Consistency != 0 {
			return "latest:" + p.Consistency.String()
		}
		return "latest"
	case FormLSN:
		return "lsn:" + strconv.FormatUint(uint64(p.LSN), 10)
	case FormTime:
		return p.Time.Format(time.RFC3339Nano)
	case FormAgo:
		return "-" + p.Ago.String()
	}
	return p.Label
}
