package api

import (
	"context"
	"errors"

	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// maxFindings bounds the findings that are listed; all are counted in Damaged.
const maxFindings = 1000

// VerifyGroup verifies an open group, in the daemon or at rest.
func VerifyGroup(ctx context.Context, g *journal.Group) (Verified, error) {
	v := Verified{Group: g.Name(), Findings: []Finding{}}
	done, err := g.Verify(ctx, func(f journal.Finding) {
		if len(v.Findings) < maxFindings {
			v.Findings = append(v.Findings, Finding{Where: f.Where, LSN: uint64(f.LSN), What: f.What})
		}
	})
	v.Records, v.Originals, v.Bytes, v.Versions, v.Damaged = done.Records, done.Originals, done.Bytes, done.Versions, done.Findings
	// What stopped the group may be damage that only a recovery sees.
	if state, why := g.State(); state == "failed" && errors.Is(why, record.ErrCorrupt) && v.Damaged == 0 {
		v.Damaged = 1
		v.Findings = append(v.Findings, Finding{Where: "group " + g.Name(), What: why.Error()})
	}
	return v, err
}
