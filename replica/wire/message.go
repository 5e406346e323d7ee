package wire

import (
	"fmt"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Version is what this program speaks.
const Version = 1

// Type tells messages apart. Values are on the wire: never renumber.
type Type uint8

// The types of messages.
const (
	TypeHello    Type = 1
	TypeRefuse   Type = 2
	TypeOffer    Type = 3
	TypePosition Type = 4
	TypeRecords  Type = 5
	TypeAck      Type = 6
	TypeBeat     Type = 7
	TypeBegin    Type = 8
	TypeAdopt    Type = 9
	TypeSums     Type = 10
	TypeWant     Type = 11
	TypeData     Type = 12
	TypeSeeded   Type = 13
	TypePair     Type = 14
	TypePaired   Type = 15
	TypeHandover Type = 16
	TypeReady    Type = 17
	TypeTaken    Type = 18
	TypeAsk      Type = 19
	TypeAskLost  Type = 20
	TypeContent  Type = 21
)

var types = map[Type]struct {
	name string
	make func() Message
}{
	TypeHello:    {"hello", func() Message { return new(Hello) }},
	TypeRefuse:   {"refusal", func() Message { return new(Refuse) }},
	TypeOffer:    {"offer", func() Message { return new(Offer) }},
	TypePosition: {"position", func() Message { return new(Position) }},
	TypeRecords:  {"records", func() Message { return new(Records) }},
	TypeAck:      {"acknowledgement", func() Message { return new(Ack) }},
	TypeBeat:     {"beat", func() Message { return new(Beat) }},
	TypeBegin:    {"beginning", func() Message { return new(Begin) }},
	TypeAdopt:    {"disk that comes", func() Message { return new(Adopt) }},
	TypeSums:     {"sums of blocks", func() Message { return new(Sums) }},
	TypeWant:     {"wanted blocks", func() Message { return new(Want) }},
	TypeData:     {"data", func() Message { return new(Data) }},
	TypeSeeded:   {"end of seeding", func() Message { return new(Seeded) }},
	TypePair:     {"request to pair", func() Message { return new(Pair) }},
	TypePaired:   {"answer to it", func() Message { return new(Paired) }},
	TypeHandover: {"request for the group", func() Message { return new(Handover) }},
	TypeReady:    {"end of a reign", func() Message { return new(Ready) }},
	TypeTaken:    {"new reign", func() Message { return new(Taken) }},
	TypeAsk:      {"question", func() Message { return new(Ask) }},
	TypeAskLost:  {"question for lost blocks", func() Message { return new(AskLost) }},
	TypeContent:  {"content of blocks", func() Message { return new(Content) }},
}

func (t Type) String() string {
	if known, ok := types[t]; ok {
		return known.name
	}
	return fmt.Sprintf("message of type %d", uint8(t))
}

// Message is one of those that follow.
type Message interface {
	Type() Type
	// append encodes the payload.
	append(b []byte) []byte
	// read decodes it, of which it may keep slices.
	read(r *reader)
}

// decode reads a message from its payload.
func decode(t Type, payload []byte) (Message, error) {
	known, ok := types[t]
	if !ok {
		return nil, fmt.Errorf("%w: %v, which version %d has none of", record.ErrCorrupt, t, Version)
	}
	m, r := known.make(), &reader{b: payload}
	m.read(r)
	if r.err == nil && len(r.b) > 0 {
		r.fail(fmt.Sprintf("%d bytes behind the last field", len(r.b)))
	}
	if r.err != nil {
		return nil, fmt.Errorf("%v: %w", t, r.err)
	}
	return m, nil
}

// Role says what a connection is for.
type Role uint8

// The roles. Values are on the wire: never renumber.
const (
	RoleOffers Role = 1 // who dials will make an Offer
	RoleWaits  Role = 2 // who dials waits for one, however long
	RolePairs  Role = 3 // who dials has a token
	RoleAsks   Role = 4 // who dials will send an Ask or an AskLost, once
)

// Hello is the first message of either side, always in a frame of version 1: lowest version (2), highest (2), role (1), node (16), name,
// build (texts). What follows them is of later versions, and passed over.
type Hello struct {
	Lowest, Highest uint16   // versions that it speaks
	Role            Role     // of who dials; the other side has the same
	Node            [16]byte // drawn once for a state directory
	Name, Build     string   // for people

	later []byte
}

// Type implements Message.
func (*Hello) Type() Type { return TypeHello }

func (m *Hello) append(b []byte) []byte {
	b = le.AppendUint16(b, m.Lowest)
	b = le.AppendUint16(b, m.Highest)
	b = append(append(b, byte(m.Role)), m.Node[:]...)
	return append(appendText(appendText(b, cut(m.Name, maxName)), cut(m.Build, maxName)), m.later...)
}

func (m *Hello) read(r *reader) {
	m.Lowest, m.Highest, m.Role, m.Node = r.u16("lowest version"), r.u16("highest version"), Role(r.u8("role")), r.id("node")
	m.Name, m.Build = r.text("name"), r.text("build")
	m.later = append(m.later, r.rest()...)
}

// SecretSize is the length of a token's secret, in bytes.
const SecretSize = 16

// Pair asks to be taken for a peer by one who has given out a token: its secret (16), the name that it is to have (text). It is answered
// by a Paired, or a Refuse.
type Pair struct {
	Secret [SecretSize]byte
	Name   string
}

// Type implements Message.
func (*Pair) Type() Type { return TypePair }

func (m *Pair) append(b []byte) []byte {
	return appendText(append(b, m.Secret[:]...), cut(m.Name, maxName))
}
func (m *Pair) read(r *reader) { m.Secret, m.Name = r.id("secret"), r.text("name") }

// Paired says that the peer is one from now on, durably: name (text) of who says so.
type Paired struct{ Name string }

// Type implements Message.
func (*Paired) Type() Type { return TypePaired }

func (m *Paired) append(b []byte) []byte { return appendText(b, cut(m.Name, maxName)) }
func (m *Paired) read(r *reader)         { m.Name = r.text("name") }

const (
	maxName = 255
	maxText = 1024
)

// cut shortens a text to what is sent of it.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && s[most]&0xc0 == 0x80 {
		most--
	}
	return s[:most]
}

// Reason says what a refusal is about.
type Reason uint16

// The reasons. Values are on the wire: never renumber.
const (
	ReasonVersion   Reason = 1 // no version that both speak
	ReasonRights    Reason = 2 // the group is not the peer's
	ReasonDeposed   Reason = 3 // a writer of a later epoch is known: Reigns has it
	ReasonUnrelated Reason = 4 // the journals are not of one history
	ReasonDiverged  Reason = 5 // the follower has records that the writer has not: it must rewind
	ReasonBusy      Reason = 6 // another connection has the group
	ReasonFailed    Reason = 7 // the group can not go on here
	ReasonForked    Reason = 8 // of one reign, the follower has other records than the writer
)

// Refuse ends a stream: reason (2), text, reigns.
type Refuse struct {
	Reason Reason
	Text   string // for people
	Reigns record.Reigns
}

// Type implements Message.
func (*Refuse) Type() Type { return TypeRefuse }

func (m *Refuse) append(b []byte) []byte {
	return appendReigns(appendText(le.AppendUint16(b, uint16(m.Reason)), cut(m.Text, maxText)), m.Reigns)
}

func (m *Refuse) read(r *reader) {
	m.Reason, m.Text, m.Reigns = Reason(r.u16("reason")), r.text("text"), r.reigns()
}

// Offer is the writer's: the group that the stream is of, and how far it goes. Head (8), horizon (8), name, reigns.
type Offer struct {
	Group         string
	Head, Horizon record.LSN // what is durable, and where the continuous window begins
	Reigns        record.Reigns
}

// Type implements Message.
func (*Offer) Type() Type { return TypeOffer }

func (m *Offer) append(b []byte) []byte {
	b = le.AppendUint64(b, uint64(m.Head))
	b = le.AppendUint64(b, uint64(m.Horizon))
	return appendReigns(appendText(b, m.Group), m.Reigns)
}

func (m *Offer) read(r *reader) {
	m.Head, m.Horizon, m.Group, m.Reigns = r.lsn("head"), r.lsn("horizon"), r.text("group"), r.reigns()
	if r.err == nil && len(m.Reigns) == 0 {
		r.fail("a journal has had reigns, and here is none")
	}
	if err := record.CheckName(m.Group); r.err == nil && err != nil {
		r.fail(err.Error())
	}
}

// Position is the follower's answer: what it has of the group. Known (1), stuck (1), head (8), digest (16), reigns, disks.
type Position struct {
	Known  bool       // it has a journal of the group
	Stuck  bool       // it can not take the records behind Head
	Head   record.LSN // that is durable there
	Digest [16]byte   // of the record at Head, see record.Header.Digest; zeroes: it has none
	Reigns record.Reigns
	Disks  []record.Disk // those whose content it has
}

// Type implements Message.
func (*Position) Type() Type { return TypePosition }

func (m *Position) append(b []byte) []byte {
	b = le.AppendUint64(append(b, flagByte(m.Known), flagByte(m.Stuck)), uint64(m.Head))
	return appendDisks(appendReigns(append(b, m.Digest[:]...), m.Reigns), m.Disks)
}

func flagByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

func (m *Position) read(r *reader) {
	m.Known, m.Stuck, m.Head, m.Digest, m.Reigns, m.Disks = r.flag("known"), r.flag("stuck"), r.lsn("head"), r.id("digest"), r.reigns(), r.disks()
	if m.Known && r.err == nil && len(m.Reigns) == 0 {
		r.fail("a journal has had reigns, and here is none")
	}
}

// Records is a run of the writer's: first LSN (8), last (8), table follows (1); disks and reigns, if they are not those
// of the run before; the records, as they stand in its log, to the payload's end.
type Records struct {
	Run   record.Run
	Table bool // Run.Disks and Run.Reigns are here; else they are the run's before
}

// Type implements Message.
func (*Records) Type() Type { return TypeRecords }

func (m *Records) append(b []byte) []byte {
	b = le.AppendUint64(b, uint64(m.Run.First))
	b = le.AppendUint64(b, uint64(m.Run.Last))
	b = append(b, flagByte(m.Table))
	if m.Table {
		b = appendReigns(appendDisks(b, m.Run.Disks), m.Run.Reigns)
	}
	return append(b, m.Run.Bytes...)
}

func (m *Records) read(r *reader) {
	m.Run.First, m.Run.Last, m.Table = r.lsn("first LSN"), r.lsn("last LSN"), r.flag("table")
	if m.Table {
		m.Run.Disks, m.Run.Reigns = r.disks(), r.reigns()
	}
	m.Run.Bytes = r.rest()
}

// Ack is the follower's: everything up to an LSN (8) is durable there; whether it has the group yet (1), or is still given what it
// begins with.
type Ack struct {
	Durable record.LSN
	Begun   bool
}

// Type implements Message.
func (*Ack) Type() Type { return TypeAck }

func (m *Ack) append(b []byte) []byte {
	return append(le.AppendUint64(b, uint64(m.Durable)), flagByte(m.Begun))
}

func (m *Ack) read(r *reader) { m.Durable, m.Begun = r.lsn("durable LSN"), r.flag("begun") }

// Beat is the writer's, from time to time: its durable head (8) and the time there (8, Unix nanoseconds). It is answered by an Ack.
type Beat struct {
	Head record.LSN
	Time time.Time
}

// Type implements Message.
func (*Beat) Type() Type { return TypeBeat }

func (m *Beat) append(b []byte) []byte {
	return le.AppendUint64(le.AppendUint64(b, uint64(m.Head)), uint64(m.Time.UnixNano()))
}

func (m *Beat) read(r *reader) {
	m.Head, m.Time = r.lsn("head"), time.Unix(0, int64(r.u64("time"))).UTC()
}

// Begin has a follower that has nothing begin with the group, and another one go on with it behind a gap: LSN (8), time (8, Unix nanoseconds), number of pins (4), their LSNs (8 each), reigns, disks, definitions. The
// content of its disks follows, each to its Seeded, and a Seeded of them all.
type Begin struct{ record.Beginning }

// Type implements Message.
func (*Begin) Type() Type { return TypeBegin }

func (m *Begin) append(b []byte) []byte {
	b = le.AppendUint64(b, uint64(m.At))
	b = le.AppendUint64(b, uint64(m.Time))
	b = le.AppendUint32(b, uint32(len(m.Pinned)))
	for _, lsn := range m.Pinned {
		b = le.AppendUint64(b, uint64(lsn))
	}
	b = appendDisks(appendReigns(b, m.Reigns), m.Disks)
	b = le.AppendUint16(b, uint16(len(m.Definitions)))
	for i := range m.Definitions {
		d := m.Definitions[i].Append(nil)
		b = append(le.AppendUint32(b, uint32(len(d))), d...)
	}
	return b
}

func (m *Begin) read(r *reader) {
	m.At, m.Time = r.lsn("LSN"), int64(r.u64("time"))
	for n := r.u32("pins"); n > 0 && r.err == nil; n-- {
		m.Pinned = append(m.Pinned, r.lsn("pin"))
	}
	m.Reigns, m.Disks = r.reigns(), r.disks()
	for n := r.u16("definitions"); n > 0 && r.err == nil; n-- {
		d, err := record.DecodeDefinition(m.At, r.take(int(r.u32("a definition's length")), "a definition"))
		if r.err == nil && err != nil {
			r.fail(err.Error())
		}
		m.Definitions = append(m.Definitions, d)
	}
	if r.err == nil {
		r.err = m.Check()
	}
}

// Adopt has the follower, whose head is at an LSN (8), take a disk that came to the group there. Its content follows, to
// its Seeded.
type Adopt struct {
	At   record.LSN
	Disk record.Disk
}

// Type implements Message.
func (*Adopt) Type() Type { return TypeAdopt }

func (m *Adopt) append(b []byte) []byte { return appendDisk(le.AppendUint64(b, uint64(m.At)), m.Disk) }
func (m *Adopt) read(r *reader)         { m.At, m.Disk = r.lsn("LSN"), r.disk() }

// Handover asks the writer to end its reign, for the follower to begin one: group (text). It is answered by a Ready behind the last
// record, or by a Refuse.
type Handover struct{ Group string }

// Type implements Message.
func (*Handover) Type() Type { return TypeHandover }

func (m *Handover) append(b []byte) []byte { return appendText(b, m.Group) }
func (m *Handover) read(r *reader)         { m.Group = r.text("group") }

// Ready says that the writer takes no more writes, durably, and that the record of an LSN (8) was its last.
type Ready struct{ Head record.LSN }

// Type implements Message.
func (*Ready) Type() Type { return TypeReady }

func (m *Ready) append(b []byte) []byte { return le.AppendUint64(b, uint64(m.Head)) }
func (m *Ready) read(r *reader)         { m.Head = r.lsn("head") }

// Taken says that the follower is the writer now, durably: reigns.
type Taken struct{ Reigns record.Reigns }

// Type implements Message.
func (*Taken) Type() Type { return TypeTaken }

func (m *Taken) append(b []byte) []byte { return appendReigns(b, m.Reigns) }
func (m *Taken) read(r *reader)         { m.Reigns = r.reigns() }

// Ask asks one who has the same group for the sums of a disk's blocks as of an LSN, or, of no disk, for records: group (text), disk (4), first
// LSN (8), last (8), key (32). It is answered by Sums, which begin with block 0 and follow each other, or by Records, each to a Seeded of the disk; or by
// a Refuse. Of a disk, the first LSN counts.
type Ask struct {
	Group       string
	Disk        record.DiskID
	First, Last record.LSN
	Key         [32]byte
}

// Type implements Message.
func (*Ask) Type() Type { return TypeAsk }

func (m *Ask) append(b []byte) []byte {
	b = le.AppendUint32(appendText(b, m.Group), uint32(m.Disk))
	b = le.AppendUint64(le.AppendUint64(b, uint64(m.First)), uint64(m.Last))
	return append(b, m.Key[:]...)
}

func (m *Ask) read(r *reader) {
	m.Group, m.Disk, m.First, m.Last = r.text("group"), record.DiskID(r.u32("disk")), r.lsn("first LSN"), r.lsn("last LSN")
	copy(m.Key[:], r.take(len(m.Key), "key"))
}

// AskLost asks one who has the same group for some blocks of a disk as of any one LSN from one to another, at all of which the disk had the same there: group (text),
// disk (4), first block (8), number of blocks (2, up to record.MaxLostBlocks), first LSN (8), last (8). It is answered by a Content and a Seeded of the disk, or by a Refuse.
type AskLost struct {
	Group string
	record.Lost
}

// Type implements Message.
func (*AskLost) Type() Type { return TypeAskLost }

func (m *AskLost) append(b []byte) []byte {
	b = le.AppendUint64(le.AppendUint32(appendText(b, m.Group), uint32(m.Disk)), uint64(m.First))
	b = le.AppendUint16(b, uint16(m.Blocks))
	return le.AppendUint64(le.AppendUint64(b, uint64(m.From)), uint64(m.To))
}

func (m *AskLost) read(r *reader) {
	m.Group, m.Disk, m.First, m.Blocks = r.text("group"), record.DiskID(r.u32("disk")), r.block("first block"), int(r.u16("blocks"))
	m.From, m.To = r.lsn("first LSN"), r.lsn("last LSN")
	if r.err == nil && (m.Blocks == 0 || m.Blocks > record.MaxLostBlocks || m.From > m.To) {
		r.fail(fmt.Sprintf("%d blocks of LSN %d to %d", m.Blocks, m.From, m.To))
	}
}

// Content is what the blocks hold: LSN (8), reigns of the journal, content to the payload's end. Of a block that the disk ends in there are as many bytes as it has.
type Content struct{ record.LostContent }

// Type implements Message.
func (*Content) Type() Type { return TypeContent }

func (m *Content) append(b []byte) []byte {
	return append(appendReigns(le.AppendUint64(b, uint64(m.At)), m.Reigns), m.Bytes...)
}

func (m *Content) read(r *reader) {
	m.At, m.Reigns, m.Bytes = r.lsn("LSN"), r.reigns(), r.rest()
	if len(m.Bytes) > record.MaxLostBlocks*record.BlockSize {
		r.fail(fmt.Sprintf("content of %d bytes", len(m.Bytes)))
	}
}

// SumSize is the length of a block's sum, in bytes: the first of the BLAKE3 of its content under a key that is drawn for
// each seeding. A guest that does not know the key can not have two blocks of one sum.
const SumSize = 16

// Sums says what blocks of a disk hold that follow each other: disk (4), first block (8), key (32), the sums to the
// payload's end. A sum of zeroes says that the block is of zeroes. It is answered by a Want.
type Sums struct {
	Disk  record.DiskID
	First int64
	Key   [32]byte
	Sums  []byte
}

// Type implements Message.
func (*Sums) Type() Type { return TypeSums }

func (m *Sums) append(b []byte) []byte {
	b = le.AppendUint64(le.AppendUint32(b, uint32(m.Disk)), uint64(m.First))
	return append(append(b, m.Key[:]...), m.Sums...)
}

func (m *Sums) read(r *reader) {
	m.Disk, m.First = record.DiskID(r.u32("disk")), r.block("first block")
	copy(m.Key[:], r.take(len(m.Key), "key"))
	if m.Sums = r.rest(); len(m.Sums)%SumSize != 0 {
		r.fail(fmt.Sprintf("%d bytes of sums", len(m.Sums)))
	}
}

// block is the number of a block on a disk.
func (r *reader) block(what string) int64 {
	b := r.u64(what)
	if b > uint64(record.MaxDiskSize/record.BlockSize) {
		r.fail(what + " is on no disk")
		return 0
	}
	return int64(b)
}

// Want says which of the blocks of a Sums the follower has not: disk (4), first block (8), a bit for each, the lowest first.
type Want struct {
	Disk  record.DiskID
	First int64
	Bits  []byte
}

// Type implements Message.
func (*Want) Type() Type { return TypeWant }

func (m *Want) append(b []byte) []byte {
	return append(le.AppendUint64(le.AppendUint32(b, uint32(m.Disk)), uint64(m.First)), m.Bits...)
}

func (m *Want) read(r *reader) {
	m.Disk, m.First, m.Bits = record.DiskID(r.u32("disk")), r.block("first block"), r.rest()
}

// Data is blocks of a disk that were wanted: disk (4), first block (8), their content to the payload's end.
type Data struct {
	Disk  record.DiskID
	First int64
	Bytes []byte
}

// Type implements Message.
func (*Data) Type() Type { return TypeData }

func (m *Data) append(b []byte) []byte {
	return append(le.AppendUint64(le.AppendUint32(b, uint32(m.Disk)), uint64(m.First)), m.Bytes...)
}

func (m *Data) read(r *reader) {
	m.Disk, m.First, m.Bytes = record.DiskID(r.u32("disk")), r.block("first block"), r.rest()
}

// Seeded says that everything of a disk (4) was sent that was wanted; of all of them if it is 0.
type Seeded struct{ Disk record.DiskID }

// Type implements Message.
func (*Seeded) Type() Type { return TypeSeeded }

func (m *Seeded) append(b []byte) []byte { return le.AppendUint32(b, uint32(m.Disk)) }
func (m *Seeded) read(r *reader)         { m.Disk = record.DiskID(r.u32("disk")) }
