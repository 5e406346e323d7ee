package journal

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// TestRepair: a damaged record, be it its payload or its header, is again what it was, with what the other daemon has of it; nothing else
// is taken.
func TestRepair(t *testing.T) {
	p := newPair(t)
	for i := range 6 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	whole := p.run()
	require.EqualValues(t, 6, whole.Last)
	p.ship()
	require.NoError(t, p.to.g.Sync())
	require.NoError(t, p.to.g.Index())
	mended, err := p.to.g.Repair(whole)
	require.NoError(t, err)
	require.Zero(t, mended, "nothing is damaged")

	f := p.to.g.set.Files(segment.Log)[0]
	var at []int64
	_, err = f.Scan(f.Start(), func(off int64, _ record.Header) error {
		at = append(at, off)
		return nil
	})
	require.NoError(t, err)
	path := f.Path
	for name, damage := range map[string][]int64{
		"a payload": {at[2] + 80}, "a header": {at[3] + 10}, "both of one": {at[3] + 10, at[3] + 200}, "two in a row": {at[1] + 9, at[2] + 9}, "the last": {at[5] + 12},
	} {
		t.Run(name, func(t *testing.T) {
			for _, off := range damage {
				p.to.damage(path, off)
			}
			findings := 0
			_, err := p.to.g.Verify(t.Context(), VerifyOptions{}, func(Finding) { findings++ })
			require.NoError(t, err)
			require.Positive(t, findings)
			mended, err := p.to.g.Repair(whole)
			require.NoError(t, err)
			require.Positive(t, mended)
			_, err = p.to.g.Verify(t.Context(), VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
			require.NoError(t, err)
			for i := range 6 {
				b, err := p.to.at(6, int64(i))
				require.NoError(t, err)
				require.EqualValues(t, i+1, b)
			}
		})
	}
	other := whole
	other.Reigns = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{9}}}
	_, err = p.to.g.Repair(other)
	require.ErrorIs(t, err, ErrDiverged)
	p.to.damage(path, at[2]+80)
	other = whole
	h := record.Header{}
	n := 0
	require.NoError(t, record.Each(whole.Bytes, func(x record.Header, _ []byte) error {
		if n++; n == 3 {
			h = x
		}
		return nil
	}))
	h.Time++
	payload := bytes.Repeat([]byte{7}, h.Payload)
	h.Sums = record.AppendSums(nil, payload)
	other.First, other.Last, other.Bytes = 3, 3, append(h.Append(nil), payload...)
	other.Bytes = append(other.Bytes, make([]byte, int(h.Size())-len(other.Bytes))...)
	_, err = p.to.g.Repair(other)
	require.ErrorIs(t, err, ErrDiverged, "another record is not written over a header that is whole")
}
