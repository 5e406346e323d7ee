// Package api is the control API between tidemark and tidemarkd: HTTP with
// JSON over a unix socket.
//
// It promises that the types here are what docs/cli.md documents: fields are added, never
// renamed or removed. The client's errors carry the daemon's code, see [Error].
// The caller must bound calls with a context. A Client is safe for concurrent use. Who may open
// the socket may do everything: there is no other access control.
package api

import (
	"errors"
	"time"
)

// ErrorTrailer is the HTTP trailer with the Error, in JSON, of an answer that
// ended early.
const ErrorTrailer = "Tidemark-Error"

// ChangedSince begins the name of an NBD metadata context of a past disk; a point follows. Bit 0 is set in
// runs that may differ from what the disk was then.
const ChangedSince = "tidemark:changed-since:"

// Codes of errors.
const (
	CodeBadRequest = "bad_request"
	CodeNotFound   = "not_found"    // no such group or disk
	CodeNoPoint    = "no_point"     // no such point
	CodeLabelInUse = "label_in_use" // the label names another point
	CodePinned     = "pinned"       // the marker is pinned, or held
	CodeInUse      = "in_use"       // the disk is open
	CodeNotAtRest  = "not_at_rest"  // the guests did not come to rest: there is no marker
	CodeFrozen     = "frozen"       // a guest may still be frozen
	CodeNoSpace    = "no_space"
	CodeFailed     = "failed" // the group takes no writes
	CodeInternal   = "internal"
)

// Error is what the daemon answers when it can not do what it was asked.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// ErrUnreachable is wrapped when no daemon answers on the socket.
var ErrUnreachable = errors.New("tidemarkd does not answer")

// Status is the answer to GET /v1/status.
type Status struct {
	Version    string   `json:"version"`
	Store      string   `json:"store"` // the identity of the state directory
	NBD        []string `json:"nbd"`
	StateDir   string   `json:"state_dir"`
	IndexBytes int64    `json:"index_bytes"`
	Groups     []Group  `json:"groups"`

	Scratches []Scratch `json:"scratches"`

	Attachments []Attachment `json:"attachments"`
}

// Attachment is an export that is a block device of the daemon's host: one of Status, and of the answers to POST and DELETE /v1/attachments.
type Attachment struct {
	Device    string `json:"device"` // its file
	Export    string `json:"export"`
	Asked     string `json:"asked"` // what was asked for
	Size      int64  `json:"size"`
	ReadOnly  bool   `json:"read_only"`
	Connected bool   `json:"connected"` // if not, requests wait, for a while
}

// AttachRequest is the body of POST /v1/attachments.
type AttachRequest struct {
	Exports []string `json:"exports"`
	Asked   string   `json:"asked"` // as the user named them; detach takes it
}

// Scratch is a writable export of a group's disks as they were: an answer to POST /v1/scratches, and one of Status.
type Scratch struct {
	Name      string        `json:"name"`
	Group     string        `json:"group"`
	Point     string        `json:"point"`
	LSN       uint64        `json:"lsn"`
	Created   time.Time     `json:"created"`
	Once      bool          `json:"once"` // goes when its last client is gone
	Clients   int           `json:"clients"`
	Disks     []ScratchDisk `json:"disks"`
	Promotion *Promotion    `json:"promotion,omitempty"`
	Branch    *Branch       `json:"branch,omitempty"`
	Error     string        `json:"error,omitempty"` // why it can not be opened
}

// Branch is what a daemon had written that was not of the history that its group went on with.
type Branch struct {
	Host  string `json:"host"`
	Epoch uint64 `json:"epoch"`
	From  uint64 `json:"from"` // LSN
	To    uint64 `json:"to"`
}

// ScratchDisk is a disk of a scratch export.
type ScratchDisk struct {
	Name    string `json:"name"`
	Export  string `json:"export"` // its NBD name
	Size    int64  `json:"size"`
	Written int64  `json:"written"` // bytes that are not the past's
}

// Promotion is how far a scratch export is on its way to be a group.
type Promotion struct {
	Group  string `json:"group"`
	Filled int64  `json:"filled"` // bytes of the disks
	Done   bool   `json:"done"`
	Error  string `json:"error,omitempty"` // why it broke off
}

// ScratchRequest is the body of POST /v1/scratches.
type ScratchRequest struct {
	Group string `json:"group"`
	Disk  string `json:"disk,omitempty"` // all that the group had then, if empty
	Point string `json:"point"`
	Name  string `json:"name,omitempty"`
	Once  bool   `json:"once,omitempty"`
}

// PromoteRequest is the body of POST /v1/scratches/NAME/promote.
type PromoteRequest struct {
	Group string `json:"group"` // a new one
	Dir   string `json:"dir"`   // where the backings are to be
}

// RollbackRequest is the body of POST /v1/groups/GROUP/rollback.
type RollbackRequest struct {
	Point string `json:"point"`
	Force bool   `json:"force,omitempty"` // cut clients off
}

// RolledBack is the answer to it.
type RolledBack struct {
	Group     string           `json:"group"`
	Point     string           `json:"point"`
	LSN       uint64           `json:"lsn"`
	Before    string           `json:"before"` // label of the state before
	BeforeLSN uint64           `json:"before_lsn"`
	Head      uint64           `json:"head"`
	Disks     []RolledBackDisk `json:"disks"`
	Untouched []string         `json:"untouched"` // disks that came to the group later
}

// RolledBackDisk says how much of a disk differed.
type RolledBackDisk struct {
	Name    string `json:"name"`
	Written int64  `json:"written"` // bytes
}

// Group is a group's state.
type Group struct {
	Name    string `json:"name"`
	State   string `json:"state"` // active, full, failed
	Error   string `json:"error,omitempty"`
	Head    uint64 `json:"head"`
	Durable uint64 `json:"durable"`
	Applied uint64 `json:"applied"`
	Horizon uint64 `json:"horizon"`
	// Since is when the continuous window begins, Promised how long it is to be; 0: as long as there is room.
	Since        time.Time `json:"window_since"`
	Promised     float64   `json:"window_promised_seconds,omitempty"`
	KeptPoints   int       `json:"kept_points"` // beyond it
	JournalBytes int64     `json:"journal_bytes"`
	Unapplied    int64     `json:"unapplied_bytes"`
	Bytes        Bytes     `json:"bytes"`
	Disks        []Disk    `json:"disks"`

	Epoch uint64 `json:"epoch"`
	Role  string `json:"role"` // writes, follows
	// Replicas are those that the group is shipped to, Source whom it comes from.
	Replicas []Replica `json:"replicas,omitempty"`
	Source   *Source   `json:"source,omitempty"`

	Scrub *Scrub `json:"scrub,omitempty"`

	Trusted  bool      `json:"trusted"` // its file systems may meet the host's kernel
	Guests   []Guest   `json:"guests"`
	Schedule *Schedule `json:"schedule,omitempty"`
	Problems []string  `json:"problems"` // what the operator must see to
}

// Bytes is what a group's history takes, in bytes: since the daemon was started, but for what it takes up now.
type Bytes struct {
	Guest     int64 `json:"guest"`     // written to the disks
	Log       int64 `json:"log"`       // what that took as records
	Originals int64 `json:"originals"` // kept, carried over and copied beside
	Segments  int64 `json:"segments"`  // what files of both take up now
	Saved     int64 `json:"saved"`     // how much more that would be if none was compact
	Index     int64 `json:"index"`     // about what the group's part of the index does
}

// Scrub is when a group was verified in the background, and what was found then.
type Scrub struct {
	At      time.Time `json:"at,omitzero"` // when it was begun
	Damaged int64     `json:"damaged"`     // places that could not be mended
	Running bool      `json:"running,omitempty"`
}

// Replica is a daemon that a group is shipped to.
type Replica struct {
	Peer      string   `json:"peer"`
	State     string   `json:"state"`       // not connected, connected, seeding, streaming
	Acked     uint64   `json:"acked"`       // LSN: it has everything up to there, durably
	Lag       float64  `json:"lag_seconds"` // age of what it has
	LagBytes  int64    `json:"lag_bytes"`   // of records that it has not, since the daemon started
	SentBytes int64    `json:"sent_bytes"`  // on this connection
	Build     string   `json:"build,omitempty"`
	Seeding   *Seeding `json:"seeding,omitempty"`
	Error     string   `json:"error,omitempty"` // why it is not connected
}

// Seeding is how far a replica is on its way to a group's content, in bytes.
type Seeding struct {
	Disk     string  `json:"disk"`
	Compared int64   `json:"compared"`
	All      int64   `json:"all"`
	Sent     int64   `json:"sent"`
	Left     float64 `json:"left_seconds"` // at the present pace
}

// Source is the daemon that a group comes from.
type Source struct {
	Peer          string    `json:"peer"`
	State         string    `json:"state"` // not connected, connected
	Head          uint64    `json:"head"`  // what it said last of how far it has come
	At            time.Time `json:"at,omitzero"`
	Behind        uint64    `json:"behind"` // records
	ReceivedBytes int64     `json:"received_bytes"`
	Build         string    `json:"build,omitempty"`
}

// Peer is a daemon that this one trusts.
type Peer struct {
	Name        string    `json:"name"`
	Fingerprint string    `json:"fingerprint,omitempty"`
	Address     string    `json:"address,omitempty"`
	MaySend     []string  `json:"may_send"`
	Since       time.Time `json:"since,omitzero"`
}

// Peers is the answer to GET /v1/peers.
type Peers struct {
	Name        string `json:"name"` // of this daemon
	Fingerprint string `json:"fingerprint"`
	Peers       []Peer `json:"peers"`
}

// InviteRequest is the body of POST /v1/peers/invitations.
type InviteRequest struct {
	Name    string   `json:"name,omitempty"` // of the peer; as it calls itself, if empty
	MaySend []string `json:"may_send,omitempty"`
	Valid   float64  `json:"valid_seconds"`
}

// Invitation is the answer to it.
type Invitation struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
	Listen  string    `json:"listen"` // where this daemon listens; empty: nowhere
}

// JoinRequest is the body of POST /v1/peers.
type JoinRequest struct {
	Address string   `json:"address"`
	Token   string   `json:"token"`
	Name    string   `json:"name,omitempty"`
	MaySend []string `json:"may_send,omitempty"`
}

// AcceptRequest is the body of POST /v1/groups/GROUP/accept.
type AcceptRequest struct {
	Anew bool `json:"anew,omitempty"` // it is dropped here, and seeded, when its writer offers it next
}

// Accepted is the answer to it.
type Accepted struct {
	Group string `json:"group"`
	Anew  bool   `json:"anew,omitempty"`
}

// FailoverRequest is the body of POST /v1/groups/GROUP/failover.
type FailoverRequest struct {
	Point string `json:"point,omitempty"`
}

// FailedOver is the answer to it, and to POST /v1/groups/GROUP/failback: this daemon writes the group.
type FailedOver struct {
	Group      string      `json:"group"`
	Epoch      uint64      `json:"epoch"`
	LSN        uint64      `json:"lsn"` // the last of the writer before
	Seconds    float64     `json:"seconds"`
	RolledBack *RolledBack `json:"rolled_back,omitempty"`
}

// Guest is a guest of a group.
type Guest struct {
	Name    string `json:"name"`
	Reached string `json:"reached"` // agent:PATH or libvirt:DOMAIN; empty: it has a port only
}

// Schedule is what is known of the markers that come by themselves.
type Schedule struct {
	Every       float64   `json:"every_seconds"`
	Consistency string    `json:"consistency"`
	Next        time.Time `json:"next"`
	Last        time.Time `json:"last,omitzero"` // one that was what was asked for
	Missed      uint64    `json:"missed"`        // since the daemon started: not taken, or less than was asked for
	Why         string    `json:"why,omitempty"` // of the last one that was missed
}

// Disk is a disk's state.
type Disk struct {
	Name    string `json:"name"`
	Size    int64  `json:"size"`
	Backing string `json:"backing"`
	Added   uint64 `json:"added"`             // LSN: the disk has no past before
	Removed uint64 `json:"removed,omitempty"` // LSN: the disk left the group
}

// Marker is the answer to POST /v1/groups/GROUP/markers, and one of Points.
type Marker struct {
	Group       string    `json:"group"`
	LSN         uint64    `json:"lsn"`
	Label       string    `json:"label"`
	Time        time.Time `json:"time"`
	Consistency string    `json:"consistency"` // what was reached
	By          string    `json:"by"`
	Asked       string    `json:"asked"`
	Description string    `json:"description,omitempty"`
	Frozen      float64   `json:"frozen_seconds"` // how long guests stood still for it
	Note        string    `json:"note,omitempty"` // why less was reached than was asked for
	Pinned      bool      `json:"pinned"`
	Held        time.Time `json:"held_until,omitzero"` // nobody may let go of its point before
	// Late are the replicas that had not got it in time, or do not get it, as it lies in a gap of what they have.
	Late []string `json:"late,omitempty"`
	// Problems, of a marker just taken, are what the operator must see to.
	Problems []string `json:"problems,omitempty"`
}

// MarkRequest is the body of POST /v1/groups/GROUP/markers.
type MarkRequest struct {
	Label       string `json:"label"`
	Description string `json:"description,omitempty"`
	Consistency string `json:"consistency,omitempty"` // crash by default
	OrCrash     bool   `json:"or_crash,omitempty"`    // a crash-consistent marker rather than none
	Pin         bool   `json:"pin,omitempty"`
	// Held is until when nobody may let go of its point; zero: anybody may.
	Held time.Time `json:"held_until,omitzero"`
	// WaitReplica is how long to wait for the marker to be durable at every replica; 0: not at all.
	WaitReplica float64 `json:"wait_replica_seconds,omitempty"`
}

// Amendment is the body of PATCH /v1/groups/GROUP/markers/LABEL: what is nil stays as it is.
type Amendment struct {
	Description *string `json:"description,omitempty"`
	Pinned      *bool   `json:"pinned,omitempty"`
	// Held is until when nobody may let go of its point: later than it was.
	Held *time.Time `json:"held_until,omitempty"`
}

// Filter says which markers Points lists: all for which everything holds that is not empty.
type Filter struct {
	Since, Until string // times, RFC 3339 or as -15m
	Label        string // a pattern of path.Match
	Consistency  string // at least
	By           string // how it begins: user, user:root, scheduler, guest
	Pinned       bool
}

// Definitions is the answer to GET /v1/groups/GROUP/definitions?point=POINT.
type Definitions struct {
	Group       string       `json:"group"`
	Point       string       `json:"point"`
	LSN         uint64       `json:"lsn"`
	Definitions []Definition `json:"definitions"`
}

// Definition is what a guest was defined as.
type Definition struct {
	Name    string    `json:"name"`
	Since   uint64    `json:"since"` // LSN
	Time    time.Time `json:"time"`  // of since
	Content []byte    `json:"content"`
}

// Thawed is the answer to POST /v1/groups/GROUP/thaw: every guest of the group is thawed.
type Thawed struct {
	Group  string   `json:"group"`
	Guests []string `json:"guests"`
}

// Reloaded is the answer to POST /v1/reload.
type Reloaded struct {
	Changes []string `json:"changes"`
	Restart []string `json:"restart"` // changed settings that take a restart
	Errors  []string `json:"errors"`  // changes that could not be made
}

// Points is the answer to GET /v1/groups/GROUP/points.
type Points struct {
	Group   string    `json:"group"`
	Horizon uint64    `json:"horizon"`
	Durable uint64    `json:"durable"`
	Head    uint64    `json:"head"`
	Since   time.Time `json:"window_since"`      // when the continuous window begins
	Earlier []Range   `json:"earlier,omitempty"` // what can be viewed beyond gaps, before the horizon
	Kept    []Kept    `json:"kept"`              // points beyond all of these
	Markers []Marker  `json:"markers"`
}

// Kept is a point that is kept beyond the continuous window.
type Kept struct {
	LSN   uint64    `json:"lsn"`
	Time  time.Time `json:"time"`
	Until time.Time `json:"until"` // from time up to, and not with, this, the disks were what they are there
	Why   []string  `json:"why"`   // pinned, held, newest markers, each 1h; nothing: an open view needs it
}

// Retention is the answer to GET /v1/groups/GROUP/retention: what is kept. With plan=true, what would go now, too; every_write=24h, tier=1h=30d (several; none: no tier)
// and markers=10 each replace their part of the policy then.
type Retention struct {
	Group      string          `json:"group"`
	EveryWrite float64         `json:"every_write_seconds"` // 0: as long as there is room
	Tiers      []RetentionTier `json:"tiers"`
	Markers    int             `json:"markers"`
	Limit      int64           `json:"limit_bytes"` // 0: none
	Used       int64           `json:"used_bytes"`
	Since      time.Time       `json:"window_since"` // when the continuous window begins
	Short      bool            `json:"window_short"` // it is shorter than promised, for lack of space
	Kept       []Kept          `json:"kept"`
	Would      *RetentionPlan  `json:"would,omitempty"`
}

// RetentionPlan is what would become of a group's history now.
type RetentionPlan struct {
	Horizon uint64 `json:"horizon"`     // up to which it would expire
	Kept    []Kept `json:"kept"`        // points beyond that
	Gone    []Kept `json:"gone"`        // points that are kept now, and would not be
	Frees   int64  `json:"frees_bytes"` // about
}

// RetentionTier keeps a point for each slot of time.
type RetentionTier struct {
	Every float64 `json:"every_seconds"`
	For   float64 `json:"for_seconds"`
}

// Range is the LSNs from First to Last.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// Resolved is the answer to GET /v1/groups/GROUP/resolve?point=POINT.
type Resolved struct {
	Group string `json:"group"`
	Point string `json:"point"`
	LSN   uint64 `json:"lsn"`
}

// Verified is the answer to POST /v1/groups/GROUP/verify.
type Verified struct {
	Group     string    `json:"group"`
	Records   int64     `json:"records"`
	Originals int64     `json:"originals"`
	Bytes     int64     `json:"bytes"`
	Versions  int64     `json:"versions"`
	Blocks    int64     `json:"blocks"` // of backings
	Damaged   int64     `json:"damaged"`
	Findings  []Finding `json:"findings"` // the first thousand

	// Repaired is how many records were written again with what another daemon has of them, and blocks of backings with what the journal has; NotRepaired why no more were.
	Repaired    int64  `json:"repaired,omitempty"`
	NotRepaired string `json:"not_repaired,omitempty"`
}

// VerifiedIndex is the answer to POST /v1/index/verify: whether the files of the index are what was written.
type VerifiedIndex struct {
	Files    int64     `json:"files"`
	Damaged  int64     `json:"damaged"`
	Findings []Finding `json:"findings"` // the first thousand
}

// Comparison is the answer to POST /v1/groups/GROUP/compare?point=POINT&peer=PEER: whether disks are what other daemons have of them.
type Comparison struct {
	Group string         `json:"group"`
	Point string         `json:"point"`
	LSN   uint64         `json:"lsn"`
	Disks []ComparedDisk `json:"disks"`
}

// ComparedDisk is a disk of it.
type ComparedDisk struct {
	Peer      string   `json:"peer"`
	Name      string   `json:"name"`
	Blocks    int64    `json:"blocks"` // compared
	Differ    int64    `json:"differ"` // blocks that differ
	Differing []Extent `json:"differing,omitempty"`
	Error     string   `json:"error,omitempty"` // why it could not be compared
}

// Extent is a run of bytes.
type Extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// Finding is damage.
type Finding struct {
	Where string `json:"where"`
	LSN   uint64 `json:"lsn,omitempty"`
	Last  uint64 `json:"last,omitempty"` // the last record: LSN if it is one
	What  string `json:"what"`
}
