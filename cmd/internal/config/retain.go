package config

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/retain"
)

// Retain says which points of a group are kept, and how much space they may take.
type Retain struct {
	EveryWrite Span            `yaml:"every_write"` // how long every write is kept; 0: as long as there is room
	Tiers      map[string]Span `yaml:"tiers"`       // for how long, by how often a point is kept
	Markers    int             `yaml:"markers"`     // how many of the newest markers are kept, however old they are
	Limit      Size            `yaml:"limit"`       // of the group's journal; 0: the daemon's
}

// Policy is what the journal goes by.
func (r Retain) Policy() (retain.Policy, error) {
	p := retain.Policy{EveryWrite: time.Duration(r.EveryWrite), Markers: r.Markers}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(r.Tiers)) {
		every, err := ParseSpan(key)
		errs = append(errs, err)
		p.Tiers = append(p.Tiers, retain.Tier{Every: time.Duration(every), For: time.Duration(r.Tiers[key])})
	}
	slices.SortFunc(p.Tiers, func(a, b retain.Tier) int { return cmp.Compare(a.Every, b.Every) })
	if err := errors.Join(errs...); err != nil {
		return p, err
	}
	return p, p.Validate()
}

// Span is a length of time; in text it may have days, weeks and years (of 365 days), as 1d12h.
type Span time.Duration

// ParseSpan reads a length of time: 90s, 24h, 2d, 1y.
func ParseSpan(text string) (Span, error) {
	d, err := retain.ParseSpan(text)
	return Span(d), err
}

// UnmarshalYAML reads a length of time.
func (s *Span) UnmarshalYAML(b []byte) error {
	v, err := ParseSpan(strings.Trim(strings.TrimSpace(string(b)), `"'`))
	*s = v
	return err
}

// MarshalYAML writes what UnmarshalYAML reads.
func (s Span) MarshalYAML() ([]byte, error) { return []byte(`"` + s.String() + `"`), nil }

func (s Span) String() string { return retain.Span(s).String() }
