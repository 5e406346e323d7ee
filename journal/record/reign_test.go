package record

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReigns(t *testing.T) {
	a, b, c := Reign{Epoch: 1, First: 1, ID: [16]byte{1}}, Reign{Epoch: 2, First: 11, ID: [16]byte{2}}, Reign{Epoch: 2, First: 8, ID: [16]byte{3}}
	common := func(r Reigns, head LSN, o Reigns, other LSN) LSN {
		got, err := r.Common(head, o, other)
		require.NoError(t, err)
		back, err := o.Common(other, r, head)
		require.NoError(t, err)
		require.Equal(t, got, back)
		return got
	}
	require.EqualValues(t, 5, common(Reigns{a}, 9, Reigns{a}, 5), "one is behind")
	require.EqualValues(t, 10, common(Reigns{a}, 15, Reigns{a, b}, 12), "its writer went on after the failover")
	require.EqualValues(t, 7, common(Reigns{a}, 7, Reigns{a, b}, 12))
	require.EqualValues(t, 7, common(Reigns{a, c}, 20, Reigns{a, b}, 12), "two took one epoch")
	_, err := Reigns{a}.Common(3, Reigns{{Epoch: 1, First: 1, ID: [16]byte{9}}}, 3)
	require.ErrorIs(t, err, ErrUnrelated)
	_, err = Reigns(nil).Common(3, Reigns{a}, 3)
	require.ErrorIs(t, err, ErrUnrelated)
	require.NoError(t, Reigns{a, b}.Check())
	for _, bad := range []Reigns{nil, {b, a}, {a, a}, {{Epoch: 0, First: 1}}, {{Epoch: 1}}, make(Reigns, MaxReigns+1)} {
		require.ErrorIs(t, bad.Check(), ErrCorrupt)
	}
	r := make(Reigns, 1, 4)
	require.NotSame(t, &r[0], &r.With(b)[0])
}

// TestCommonOfScriptedHistories lets writers come and go, and compares with the records themselves.
func TestCommonOfScriptedHistories(t *testing.T) {
	type node struct {
		reigns  Reigns
		records []int // who wrote it: unique
	}
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 9))
		first := Reign{Epoch: 1, First: 1, ID: [16]byte{0xff}}
		nodes := make([]node, 3)
		for i := range nodes {
			nodes[i].reigns = Reigns{first}
		}
		leads, writes := []bool{true, false, false}, 0
		for range 60 {
			i, j := rng.IntN(3), rng.IntN(3)
			n, o := &nodes[i], &nodes[j]
			switch rng.IntN(6) {
			case 0: // fails over
				n.reigns = n.reigns.With(Reign{Epoch: n.reigns.Epoch() + 1, First: LSN(len(n.records) + 1), ID: [16]byte{byte(i) + 1, byte(writes), byte(writes >> 8)}})
				leads[i], writes = true, writes+1
			case 1, 2, 3:
				if leads[i] {
					writes++
					n.records = append(n.records, writes)
				}
			default: // follows, from what both have on
				if i == j || !leads[j] || n.reigns.Epoch() > o.reigns.Epoch() || n.reigns.Epoch() == o.reigns.Epoch() && leads[i] {
					continue
				}
				at, err := n.reigns.Common(LSN(len(n.records)), o.reigns, LSN(len(o.records)))
				require.NoError(t, err)
				to := int(at) + rng.IntN(len(o.records)-int(at)+1)
				n.records = append(n.records[:at:at], o.records[at:to]...)
				n.reigns, leads[i] = nil, false
				for _, r := range o.reigns {
					if len(n.reigns) == 0 || int(r.First) <= to+1 {
						n.reigns = n.reigns.With(r)
					}
				}
			}
			a, b := nodes[rng.IntN(3)], nodes[rng.IntN(3)]
			got, err := a.reigns.Common(LSN(len(a.records)), b.reigns, LSN(len(b.records)))
			require.NoError(t, err)
			want := 0
			for want < len(a.records) && want < len(b.records) && a.records[want] == b.records[want] {
				want++
			}
			require.EqualValues(t, want, got, "seed %d: %v of %d, %v of %d", seed, a.reigns, len(a.records), b.reigns, len(b.records))
			require.NoError(t, a.reigns.Check())
		}
	}
}
