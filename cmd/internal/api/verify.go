package api

import (
	"context"
	"errors"

	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// MaxFindings bounds the findings that are listed; all are counted in Damaged.
const MaxFindings = 1000

// VerifyGroup verifies an open group, in the daemon or at rest. each, if there is one, is called with every finding, listed or not.
func VerifyGroup(ctx context.Context, g *journal.Group, o journal.VerifyOptions, each func(journal.Finding)) (Verified, error) {
	v := Verified{Group: g.Name(), Findings: []Finding{}}
	done, err := g.Verify(ctx, o, func(f journal.Finding) {
		if each != nil {
			each(f)
		}
		if len(v.Findings) < MaxFindings {
			v.Findings = append(v.Findings, Finding{Where: f.Where, LSN: uint64(f.LSN), Last: uint64(f.Last), What: f.What})
		}
	})
	v.Records, v.Originals, v.Bytes, v.Versions, v.Damaged = done.Records, done.Originals, done.Bytes, done.Versions, done.Findings
	v.Blocks = done.Blocks
	// What stopped the group may be damage that only a recovery sees.
	if state, why := g.State(); state == "failed" && errors.Is(why, record.ErrCorrupt) {
		v.Damaged++
		v.Findings = append(v.Findings, Finding{Where: "group " + g.Name(), What: why.Error()})
	}
	return v, err
}

// VerifyIndex verifies the files of the index, in the daemon or at rest.
func VerifyIndex(ctx context.Context, s *journal.Store) (v VerifiedIndex, err error) {
	v.Findings = []Finding{}
	v.Files, err = s.VerifyIndex(func(int64) error { return ctx.Err() }, func(f journal.Finding) {
		if v.Damaged++; len(v.Findings) < MaxFindings {
			v.Findings = append(v.Findings, Finding{Where: f.Where, What: f.What})
		}
	})
	return v, err
}
