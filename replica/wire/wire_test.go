package wire

import (
	"bytes"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

var (
	reigns = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}, {Epoch: 3, First: 50, ID: [16]byte{2}}}
	disks  = []record.Disk{{ID: 1, Name: "vda", Size: 1 << 30}, {ID: 3, Name: "vdb", Size: 512, Added: 7, Removed: 60}}
)

// samples are messages of every type.
var samples = []Message{
	&Hello{Lowest: 1, Highest: 2, Role: RoleWaits, Node: [16]byte{7}, Name: "höst", Build: "v1"},
	&Refuse{Reason: ReasonDeposed, Text: "a later writer", Reigns: reigns},
	&Refuse{Reason: ReasonRights, Text: "not yours"},
	&Offer{Group: "web01", Head: 99, Horizon: 4, Reigns: reigns},
	&Position{},
	&Position{Known: true, Head: 80, Digest: [16]byte{9}, Reigns: reigns, Disks: disks},
	&Records{Run: record.Run{First: 5, Last: 6, Bytes: bytes.Repeat([]byte("records "), 1000)}},
	&Records{Run: record.Run{First: 5, Last: 6, Bytes: []byte("incompressible"), Disks: disks, Reigns: reigns}, Table: true},
	&Ack{Durable: 12, Begun: true},
	&Ack{},
	&Beat{Head: 77, Time: time.Unix(5, 6).UTC()},
	&Begin{record.Beginning{At: 90, Time: 5, Reigns: reigns, Disks: disks, Definitions: []record.Definition{
		{Name: "vm", Since: 8, Time: time.Unix(3, 0).UTC(), Content: []byte("<domain/>")}}}},
	&Adopt{At: 60, Disk: disks[1]},
	&Sums{Disk: 1, First: 4096, Key: [32]byte{5}, Sums: make([]byte, 64*SumSize)},
	&Want{Disk: 1, First: 4096, Bits: []byte{1, 2, 3}},
	&Data{Disk: 1, First: 4096, Bytes: bytes.Repeat([]byte{9}, 3*record.BlockSize)},
	&Seeded{Disk: 1},
	&Seeded{},
	&Pair{Secret: [SecretSize]byte{3}, Name: "hosta"},
	&Paired{Name: "hostb"},
	&Handover{Group: "web01"},
	&Ready{Head: 70},
	&Taken{Reigns: reigns},
	&Ask{Group: "web01", Disk: 2, First: 5, Last: 9, Key: [32]byte{1}},
	&AskLost{"web01", record.Lost{Disk: 2, First: 4096, Blocks: record.MaxLostBlocks, From: 5, To: 9}},
	&Content{record.LostContent{At: 7, Reigns: reigns, Bytes: bytes.Repeat([]byte{9}, 3*record.BlockSize)}},
}

func TestEveryTypeHasASample(t *testing.T) {
	seen := map[Type]bool{}
	for _, m := range samples {
		seen[m.Type()] = true
		require.Equal(t, m.Type(), types[m.Type()].make().Type())
	}
	require.Len(t, seen, len(types))
}

func newReader(t *testing.T, r io.Reader) *Reader {
	fr, err := NewReader(r)
	require.NoError(t, err)
	t.Cleanup(fr.Close)
	return fr
}

func TestMessagesComeAsTheyWere(t *testing.T) {
	for level := range 5 {
		var stream bytes.Buffer
		w, err := NewWriter(&stream, level)
		require.NoError(t, err)
		for _, m := range samples {
			require.NoError(t, w.Write(m))
		}
		require.EqualValues(t, stream.Len(), w.Sent)
		require.Equal(t, level > 0, w.Sent < w.Raw, "level %d: %d of %d bytes", level, w.Sent, w.Raw)
		r := newReader(t, &stream)
		r.Trust()
		for _, m := range samples {
			got, err := r.Next()
			require.NoError(t, err)
			require.Equal(t, m, got)
		}
		_, err = r.Next()
		require.Equal(t, io.EOF, err)
	}
	_, err := NewWriter(nil, 9)
	require.Error(t, err)
}

// TestADamagedStream: no bit of it flips and no byte of it goes without an error.
func TestADamagedStream(t *testing.T) {
	for level := range 2 {
		for _, m := range samples {
			var stream bytes.Buffer
			w, err := NewWriter(&stream, level)
			require.NoError(t, err)
			require.NoError(t, w.Write(m))
			b := stream.Bytes()
			for i := 0; i < len(b); i += 1 + len(b)/200 {
				r := newReader(t, bytes.NewReader(b[:i]))
				r.Trust()
				_, err := r.Next()
				require.Error(t, err)
				require.Equal(t, i == 0, err == io.EOF)
				bad := bytes.Clone(b)
				bad[i] ^= 1 << (i % 8)
				r = newReader(t, bytes.NewReader(bad))
				r.Trust()
				_, err = r.Next()
				require.Error(t, err, "%v: byte %d of %d", m.Type(), i, len(b))
			}
		}
	}
}

// frame is a frame whose checksum holds, whatever is in it.
func frame(t Type, flags byte, payload []byte) []byte {
	b := []byte{frameMagic, byte(t), flags, 0}
	b = le.AppendUint32(b, uint32(len(payload)))
	b = append(le.AppendUint32(b, 0), payload...)
	le.PutUint32(b[8:], sum(b))
	return b
}

func TestAPeerThatLies(t *testing.T) {
	w, err := NewWriter(io.Discard, 1)
	require.NoError(t, err)
	huge := w.zstd[w.level].EncodeAll(make([]byte, MaxPayload+1), le.AppendUint32(nil, 100))
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"another protocol":        {[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "another version"},
		"an unknown type":         {frame(99, 0, nil), "message of type 99"},
		"unknown flags":           {frame(TypeAck, 2, make([]byte, 8)), "flags"},
		"a length beyond all":     {append([]byte{frameMagic, byte(TypeData), 0, 0, 255, 255, 255, 255}, make([]byte, 4)...), "at most"},
		"more than it says":       {frame(TypeData, flagZstd, huge), "corrupt"},
		"inflates beyond all":     {frame(TypeData, flagZstd, append(le.AppendUint32(nil, MaxPayload+1), huge[4:]...)), "at most"},
		"no zstd":                 {frame(TypeData, flagZstd, []byte("1234 what is this")), "corrupt"},
		"a flag that is neither":  {frame(TypePosition, 0, append([]byte{2}, make([]byte, 12)...)), "neither"},
		"too long":                {frame(TypeAck, 0, make([]byte, 10)), "behind the last field"},
		"too short":               {frame(TypeAck, 0, make([]byte, 7)), "cut short"},
		"more reigns than bytes":  {frame(TypePosition, 0, append(make([]byte, 26), 255, 255)), "cut short"},
		"more disks than bytes":   {frame(TypeBegin, 0, append(make([]byte, 22), 255, 255)), "cut short"},
		"more pins than bytes":    {frame(TypeBegin, 0, append(make([]byte, 16), 255, 255, 255, 255)), "cut short"},
		"reigns out of order":     {frame(TypePosition, 0, appendReigns(make([]byte, 26), record.Reigns{reigns[1], reigns[0]})), "reign"},
		"a name that is a path":   {frame(TypeOffer, 0, appendReigns(appendText(make([]byte, 16), "../x"), reigns)), "not allowed"},
		"a name that is no UTF-8": {frame(TypeHello, 0, appendText(appendText(make([]byte, 21), "\xff"), "")), "UTF-8"},
		"a beginning of no reign": {frame(TypeBegin, 0, make([]byte, 26)), "reigns"},
		"a block on no disk":      {frame(TypeWant, 0, bytes.Repeat([]byte{255}, 12)), "on no disk"},
		"a part of a sum":         {frame(TypeSums, 0, make([]byte, 4+8+32+SumSize+1)), "sums"},
		"no lost blocks":          {frame(TypeAskLost, 0, (&AskLost{"web01", record.Lost{Disk: 1, From: 1, To: 2}}).append(nil)), "0 blocks"},
		"too many lost blocks":    {frame(TypeAskLost, 0, (&AskLost{"web01", record.Lost{Disk: 1, Blocks: record.MaxLostBlocks + 1, From: 1, To: 2}}).append(nil)), "257 blocks"},
		"too much content":        {frame(TypeContent, 0, (&Content{record.LostContent{Bytes: make([]byte, record.MaxLostBlocks*record.BlockSize+1)}}).append(nil)), "content of"},
		"LSNs out of order":       {frame(TypeAskLost, 0, (&AskLost{"web01", record.Lost{Disk: 1, Blocks: 1, From: 3, To: 2}}).append(nil)), "LSN 3 to 2"},
		"a definition beyond all": {frame(TypeBegin, 0, append(le.AppendUint16(appendDisks(appendReigns(make([]byte, 20), reigns), nil), 1), 255, 255, 255, 255)), "cut short"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReader(t, bytes.NewReader(c.b))
			r.Trust()
			_, err := r.Next()
			require.ErrorIs(t, err, record.ErrCorrupt)
			require.ErrorContains(t, err, c.want)
		})
	}
	r := newReader(t, bytes.NewReader(frame(TypeData, 0, make([]byte, MaxFirst+1))))
	_, err = r.Next()
	require.ErrorContains(t, err, "at most 4096", "a peer that is not known yet")
	require.ErrorContains(t, w.Write(&Data{Bytes: make([]byte, MaxPayload)}), "at most")
}

// TestRandomPayloads: what decodes is the same bytes again.
func TestRandomPayloads(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	decoded := 0
	for range 20000 {
		m := samples[rng.IntN(len(samples))]
		b := m.append(nil)
		for range rng.IntN(3) {
			if len(b) > 0 {
				b[rng.IntN(min(len(b), 120))] = byte(rng.Uint32() >> rng.IntN(8))
			}
		}
		got, err := decode(m.Type(), b)
		if err != nil {
			require.ErrorIs(t, err, record.ErrCorrupt)
			continue
		}
		decoded++
		require.Equal(t, b, got.append(nil))
	}
	require.Greater(t, decoded, 5000)
}

func TestLongTextsAreCut(t *testing.T) {
	m := &Refuse{Reason: ReasonFailed, Text: strings.Repeat("ü", 1000)}
	got, err := decode(TypeRefuse, m.append(nil))
	require.NoError(t, err)
	require.Equal(t, strings.Repeat("ü", 512), got.(*Refuse).Text)
}
