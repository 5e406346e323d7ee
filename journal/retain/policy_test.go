package retain

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

const day = 24 * time.Hour

func TestKeep(t *testing.T) {
	p := Policy{EveryWrite: time.Hour, Tiers: []Tier{{time.Minute, 2 * time.Hour}, {time.Hour, day}}, Markers: 1}
	require.NoError(t, p.Validate())
	now := int64(10 * day)
	ago := func(d time.Duration) int64 { return now - int64(d) }
	points := []Point{
		{LSN: 1, Time: ago(26 * time.Hour)}, // its slot has ended too long ago
		{LSN: 2, Time: ago(26 * time.Hour), Held: now + 1},
		{LSN: 3, Time: ago(26 * time.Hour), Consistency: record.Crash, Held: now},
		{LSN: 4, Time: ago(26 * time.Hour), Consistency: record.Crash, Pinned: true},
		{LSN: 5, Time: ago(10*time.Hour - time.Minute), Consistency: record.Application},
		{LSN: 6, Time: ago(10*time.Hour - 2*time.Minute), Consistency: record.Crash},
		{LSN: 7, Time: ago(10*time.Hour - 3*time.Minute)},
		{LSN: 8, Time: ago(9*time.Hour - time.Minute), Consistency: record.Filesystem},
		{LSN: 9, Time: ago(9*time.Hour - time.Minute), Consistency: record.Filesystem},
		{LSN: 10, Time: ago(100 * time.Minute)},
		{LSN: 11, Time: ago(100 * time.Minute)},
		{LSN: 12, Time: ago(99 * time.Minute)},
	}
	hour, minute := Reason{Tier: time.Hour}, Reason{Tier: time.Minute}
	why := p.Keep(now, points)
	require.Equal(t, []Reason{{}, {Held: true}, {}, {Pinned: true}, hour, {}, {}, {}, {Marker: true, Tier: time.Hour}, {}, minute, hour}, why)
	require.Equal(t, []int{10, 4, 11, 8}, Sacrifice(points, why))
}

func TestValidate(t *testing.T) {
	for _, c := range []struct {
		p    Policy
		want string
	}{
		{Policy{}, ""},
		{Policy{EveryWrite: day, Tiers: []Tier{{time.Minute, 2 * day}, {time.Hour, 30 * day}, {day, 365 * day}}, Markers: 10}, ""},
		{Policy{Tiers: []Tier{{time.Hour, day}}}, ""},
		{Policy{EveryWrite: -1}, "must not be negative"},
		{Policy{Markers: -1}, "can be kept"},
		{Policy{Tiers: []Tier{{0, day}}}, "takes a second at least"},
		{Policy{Tiers: []Tier{{day, time.Hour}}}, "gone before the next"},
		{Policy{EveryWrite: day, Tiers: []Tier{{time.Hour, day}}}, "keeps nothing"},
		{Policy{Tiers: []Tier{{time.Hour, day}, {time.Minute, 2 * day}}}, "finest first"},
		{Policy{Tiers: []Tier{{time.Minute, 2 * day}, {time.Hour, day}}}, "keeps nothing that the other"},
		{Policy{Tiers: []Tier{{time.Second, 365 * day}}}, "points: 65536 are allowed"},
	} {
		if err := c.p.Validate(); c.want == "" {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, c.want)
		}
	}
}

// history is a random one: records with the times, and markers among them.
func history(rng *rand.Rand) (points []Point) {
	at := rng.Int64N(int64(day))
	for lsn := record.LSN(1); lsn < 200; lsn++ {
		at += int64(rng.ExpFloat64() * float64(20*time.Minute))
		p := Point{LSN: lsn, Time: at}
		if rng.IntN(10) == 0 {
			p.Consistency = record.Crash + record.Consistency(rng.IntN(3))
			p.Pinned = rng.IntN(8) == 0
		}
		points = append(points, p)
	}
	return points
}

// TestPassesDoNotMatter: whatever was forgotten before, what is kept is what would have been kept of everything, and a second
// pass changes nothing.
func TestPassesDoNotMatter(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 7))
		p := Policy{Tiers: []Tier{{time.Hour, time.Duration(1+rng.IntN(40)) * time.Hour}}, Markers: rng.IntN(4)}
		if rng.IntN(2) == 0 {
			p.Tiers = append(p.Tiers, Tier{day, time.Duration(2+rng.IntN(5)) * day})
		}
		all := history(rng)
		var have []Point // what passes at random have left
		next, now := 0, int64(0)
		for next < len(all) {
			n := min(next+1+rng.IntN(30), len(all))
			have = append(have, candidates(p, all, next, n)...)
			next = n
			now = max(now, all[next-1].Time+rng.Int64N(int64(time.Hour)))
			once := kept(p, now, have)
			require.Equal(t, once, kept(p, now, once), "seed %d", seed)
			require.Equal(t, kept(p, now, candidates(p, all, 0, next)), once, "seed %d", seed)
			require.Subset(t, all, once)
			have = once
		}
	}
}

// candidates are the markers, and the last ones of their slots, from one record up to another.
func candidates(p Policy, all []Point, from, to int) (some []Point) {
	for i := from; i < to; i++ {
		if all[i].Consistency != 0 || i+1 == len(all) || p.Ends(all[i].Time, all[i+1].Time) {
			some = append(some, all[i])
		}
	}
	return some
}

func kept(p Policy, now int64, points []Point) (some []Point) {
	for i, why := range p.Keep(now, points) {
		if why.Kept() {
			some = append(some, points[i])
		}
	}
	return some
}

// TestEachSlotHasItsPoint: in each slot that lasts and has records, there is a kept point, and no marker of the slot promises more.
func TestEachSlotHasItsPoint(t *testing.T) {
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 8))
		p := Policy{Tiers: []Tier{{time.Hour, 2 * day}}}
		all := history(rng)
		now := all[len(all)-1].Time
		got := kept(p, now, candidates(p, all, 0, len(all)))
		for _, at := range all {
			slot := at.Time / int64(time.Hour)
			if (slot+1)*int64(time.Hour)+int64(2*day) <= now {
				continue
			}
			i := slices.IndexFunc(got, func(k Point) bool { return k.Time/int64(time.Hour) == slot && k.Consistency >= at.Consistency })
			require.GreaterOrEqual(t, i, 0, "seed %d: LSN %d", seed, at.LSN)
		}
	}
}

func TestPassed(t *testing.T) {
	files := []File{{Last: 7, Time: 1}, {Last: 20, Time: 5}, {Last: 30, Time: 9}}
	require.EqualValues(t, 20, Policy{EveryWrite: 4}.Passed(10, files))
	require.EqualValues(t, 0, Policy{EveryWrite: 100}.Passed(10, files))
	require.EqualValues(t, 0, Policy{}.Passed(10, files))
}

func TestLives(t *testing.T) {
	kept := []record.LSN{3, 7}
	for _, c := range []struct {
		from, until record.LSN
		want        bool
	}{{0, 3, false}, {0, 4, true}, {3, 4, true}, {4, 7, false}, {7, 8, true}, {8, record.MaxLSN, false}} {
		require.Equal(t, c.want, Lives(kept, c.from, c.until), "%+v", c)
	}
}

// TestATierOfManyYears is kept.
func TestATierOfManyYears(t *testing.T) {
	p := Policy{Tiers: []Tier{{365 * day, 250 * 365 * day}}}
	require.NoError(t, p.Validate())
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano()
	require.True(t, p.Keep(now, []Point{{LSN: 1, Time: now - int64(time.Hour)}})[0].Kept())
}

func TestFaultsAreToldAsTheyAreGiven(t *testing.T) {
	day := 24 * time.Hour
	err := Policy{EveryWrite: 60 * day, Tiers: []Tier{{Every: time.Hour, For: 30 * day}}}.Validate()
	require.ErrorContains(t, err, "a point each 1h for 30d: every write is kept for 60d")
}
