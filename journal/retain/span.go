package retain

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Span is a length of time; in text it may have days, weeks and years (of 365 days), as 1d12h.
type Span time.Duration

// spanUnits are those that time.ParseDuration does not know.
var spanUnits = []struct {
	unit string
	of   time.Duration
}{{"y", 365 * 24 * time.Hour}, {"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}}

// ParseSpan reads a length of time: 90s, 24h, 2d, 1y.
func ParseSpan(text string) (Span, error) {
	var sum time.Duration
	rest := text
	for _, u := range spanUnits {
		num, behind, ok := strings.Cut(rest, u.unit)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(num, 10, 64)
		if err != nil || n < 0 || n > int64((math.MaxInt64-sum)/u.of) {
			return 0, fmt.Errorf("time %q: expected a number with s, m, h, d, w or y, as 24h or 1y", text)
		}
		sum, rest = sum+time.Duration(n)*u.of, behind
	}
	if rest != "" || text == "" {
		d, err := time.ParseDuration(rest)
		if err != nil || d < 0 || d > math.MaxInt64-sum {
			return 0, fmt.Errorf("time %q: expected a number with s, m, h, d, w or y, as 24h or 1y", text)
		}
		sum += d
	}
	return Span(sum), nil
}

// String is the shortest text with days and years.
func (s Span) String() string {
	d := time.Duration(s)
	var b strings.Builder
	for _, u := range spanUnits {
		if n := d / u.of; n > 0 && u.unit != "w" {
			fmt.Fprintf(&b, "%d%s", n, u.unit)
			d -= n * u.of
		}
	}
	for _, u := range []struct {
		unit string
		of   time.Duration
	}{{"h", time.Hour}, {"m", time.Minute}} {
		if n := d / u.of; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.unit)
			d -= n * u.of
		}
	}
	if d > 0 || b.Len() == 0 {
		b.WriteString(d.String())
	}
	return b.String()
}
