package record

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func sample(payload []byte) Header {
	return Header{
		LSN: 7, Time: 1e18, Durable: 5, Extent: Extent{Off: 8192, Len: int64(len(payload))}, Disk: 3,
		Kind: KindWrite, Flags: FlagDiscontinuity, Salt: 0xabcd, Payload: len(payload), Sums: AppendSums(nil, payload),
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, n := range []int{1, 4096, 4097, 5 * 4096} {
		payload := bytes.Repeat([]byte{9}, n)
		h := sample(payload)
		b := h.Append([]byte("before"))[len("before"):]
		require.Len(t, b, h.EncodedSize())
		require.Zero(t, h.Size()%Alignment)
		got, err := Decode(append(b, payload...))
		require.NoError(t, err)
		require.Equal(t, h, got)
		require.NoError(t, got.Sums.Verify(payload))
	}
}

// TestEveryFlippedBitIsNoticed flips each bit of a record in turn.
func TestEveryFlippedBitIsNoticed(t *testing.T) {
	payload := bytes.Repeat([]byte{1, 2, 3}, 2000)
	h := sample(payload)
	b := append(h.Append(nil), payload...)
	for bit := range len(b) * 8 {
		b[bit/8] ^= 1 << (bit % 8)
		got, err := Decode(b)
		if err == nil {
			err = got.Sums.Verify(b[got.EncodedSize():])
		}
		require.Error(t, err, "bit %d", bit)
		b[bit/8] ^= 1 << (bit % 8)
	}
}

func TestDecodeOfPrefixes(t *testing.T) {
	h := sample(make([]byte, 3*4096))
	b := h.Append(nil)
	for n := range len(b) {
		_, err := Decode(b[:n])
		require.ErrorIs(t, err, ErrShort)
	}
}

func TestDecodeRefusesWhatNoEncoderWrites(t *testing.T) {
	for name, change := range map[string]func(*Header){
		"unknown kind":            func(h *Header) { h.Kind = 99 },
		"trim with payload":       func(h *Header) { h.Kind = KindTrim },
		"payload short of extent": func(h *Header) { h.Extent.Len++ },
		"extent out of bounds":    func(h *Header) { h.Extent.Off = MaxDiskSize },
		"negative offset":         func(h *Header) { h.Extent.Off = -4096 },
		"not at a block":          func(h *Header) { h.Extent.Off = 512 },
		"standing with payload":   func(h *Header) { h.Kind, h.Extent = KindStanding, Extent{} },
		"marker with extent":      func(h *Header) { h.Kind = KindMarker },
	} {
		h := sample(make([]byte, 4096))
		change(&h)
		_, err := Decode(h.Append(nil))
		require.ErrorIs(t, err, ErrCorrupt, name)
	}
}

func TestMarkerRoundTrip(t *testing.T) {
	m := Marker{
		LSN: 4, Time: time.Unix(5, 6).UTC(), Label: "before upgrade ü", Description: "und mehr", Asked: Application, Consistency: Crash,
		By: "user:root", Frozen: 7 * time.Millisecond, Note: "the guest did not freeze", Pinned: true, OrCrash: true,
	}
	for _, held := range []time.Time{{}, time.Unix(9, 8).UTC()} {
		m.Held = held
		b := m.Append(nil)
		got, err := DecodeMarker(4, m.Time.UnixNano(), b)
		require.NoError(t, err)
		require.Equal(t, m, got)
		require.Equal(t, !held.IsZero(), got.IsHeld(time.Unix(9, 7)))
		require.False(t, got.IsHeld(time.Unix(9, 8)))
		for n := range b {
			_, err := DecodeMarker(4, 0, b[:n])
			require.ErrorIs(t, err, ErrCorrupt)
		}
		_, err = DecodeMarker(4, 0, append(b, 0))
		require.ErrorIs(t, err, ErrCorrupt)
		b[0] = 4
		_, err = DecodeMarker(4, 0, b)
		require.ErrorContains(t, err, "version 4")
		require.NotErrorIs(t, err, ErrCorrupt)
	}
	old := []byte("\x01\x02\x02\x04m1user")
	got, err := DecodeMarker(4, 5, old)
	require.NoError(t, err)
	require.Equal(t, Marker{LSN: 4, Time: time.Unix(0, 5).UTC(), Label: "m1", Asked: Filesystem, Consistency: Filesystem, By: "user"}, got)
}

func TestTrim(t *testing.T) {
	m := Marker{Label: strings.Repeat("ü", 200), Note: "two\nlines\x1b[31m" + strings.Repeat("ü", 600)}
	m.Trim()
	require.Equal(t, strings.Repeat("ü", 127), m.Label)
	require.True(t, strings.HasPrefix(m.Note, "two lines [31mü"))
	require.LessOrEqual(t, len(m.Note), maxNote)
	require.True(t, utf8.ValidString(m.Note))
	m.Asked, m.Consistency = Crash, Crash
	got, err := DecodeMarker(1, 0, m.Append(nil))
	require.NoError(t, err)
	require.Equal(t, m.Note, got.Note)
}

func TestAmendmentRoundTrip(t *testing.T) {
	m := Marker{LSN: 9, Label: "l", Asked: Crash, Consistency: Crash, By: "user", Description: "d"}
	for _, a := range []Amendment{{Target: 9, Marker: m}, {Target: 9, Deleted: true}} {
		b := a.Append(nil)
		got, err := DecodeAmendment(b)
		require.NoError(t, err)
		require.Equal(t, a, got)
		b[0] = 2
		_, err = DecodeAmendment(b)
		require.ErrorContains(t, err, "version 2")
		_, err = DecodeAmendment(b[:15])
		require.ErrorIs(t, err, ErrCorrupt)
	}
}

func TestDefinitionRoundTrip(t *testing.T) {
	d := Definition{Name: "web01", Since: 7, Time: time.Unix(1, 2).UTC(), Content: []byte("<domain/>")}
	got, err := DecodeDefinition(9, d.Append(nil))
	require.NoError(t, err)
	require.Equal(t, d, got)
	_, err = DecodeDefinition(6, d.Append(nil))
	require.ErrorIs(t, err, ErrCorrupt, "in force after its record")
	d.Since = 0
	got, err = DecodeDefinition(9, d.Append(nil))
	require.NoError(t, err)
	require.EqualValues(t, 9, got.Since)
	for n := range definitionFixed + len(d.Name) {
		_, err = DecodeDefinition(9, d.Append(nil)[:n])
		require.ErrorIs(t, err, ErrCorrupt)
	}
}

func TestParsePoint(t *testing.T) {
	at := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	for text, want := range map[string]Point{
		"latest":               {Form: FormLatest},
		"latest:application":   {Form: FormLatest, Consistency: Application},
		"lsn:4711":             {Form: FormLSN, LSN: 4711},
		"-15m":                 {Form: FormAgo, Ago: 15 * time.Minute},
		"-2d12h":               {Form: FormAgo, Ago: 60 * time.Hour},
		"2026-11-21T10:00:00Z": {Form: FormTime, Time: at},
		"before-upgrade":       {Form: FormLabel, Label: "before-upgrade"},
		"2026-backup":          {Form: FormLabel, Label: "2026-backup"},
		"2026-11-21-nightly":   {Form: FormLabel, Label: "2026-11-21-nightly"},
	} {
		got, err := ParsePoint(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "lsn:", "lsn:-1", "lsn:x", "latest:none", "-", "-x", "--5m", "-+5m", "2026-11-21", "2026-11-21T25:00:00Z", strings.Repeat("x", 300)} {
		_, err := ParsePoint(text)
		require.Error(t, err, text)
	}
}

func TestCheckLabel(t *testing.T) {
	for _, ok := range []string{"a", "before upgrade", "v1.2_3", "ü"} {
		require.NoError(t, CheckLabel(ok))
	}
	for _, bad := range []string{"", " x", "x ", "a/b", "a@b", "latest", "lsn:4", "-5m", "2026-11-21T10:00:00Z", "a\nb", "\xff", strings.Repeat("x", 256)} {
		require.Error(t, CheckLabel(bad), bad)
	}
}

func TestExportNames(t *testing.T) {
	e, err := ParseExportName("web01/vda@lsn:4")
	require.NoError(t, err)
	require.Equal(t, ExportName{Group: "web01", Disk: "vda", Point: Point{Form: FormLSN, LSN: 4}}, e)
	require.Equal(t, "web01/vda@lsn:4", e.String())
	e, err = ParseExportName("web01/vda")
	require.NoError(t, err)
	require.True(t, e.Live)
	for _, bad := range []string{"", "web01", "/vda", "web01/", "../x/vda", "web01/vda@", "web01/vda@lsn:", "a b/c"} {
		_, err := ParseExportName(bad)
		require.Error(t, err, bad)
	}
}

func TestAlign(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		size := 1 + rng.Int64N(1<<20)
		e := Extent{Off: rng.Int64N(size)}
		e.Len = rng.Int64N(size - e.Off + 1)
		a := e.Align(size)
		require.True(t, a.In(size) && a.Off <= e.Off && a.End() >= e.End() && a.Off%BlockSize == 0)
		require.True(t, a.End()%BlockSize == 0 || a.End() == size)
		require.True(t, a.Aligned(size))
	}
}

// TestDigest: it is the same wherever a record stands, and another for any other record.
func TestDigest(t *testing.T) {
	h := Header{LSN: 7, Time: 9, Durable: 3, Extent: Extent{Off: BlockSize, Len: 512}, Disk: 2, Kind: KindWrite, Salt: 5, Payload: 512, Sums: AppendSums(nil, make([]byte, 512))}
	same := h
	same.Durable, same.Salt = 6, 8
	require.Equal(t, h.Digest(), same.Digest())
	for _, change := range []func(*Header){
		func(h *Header) { h.LSN++ }, func(h *Header) { h.Time++ }, func(h *Header) { h.Disk++ }, func(h *Header) { h.Extent.Off += BlockSize },
		func(h *Header) { h.Kind = KindOriginal }, func(h *Header) { h.Flags = 1 }, func(h *Header) { h.Sums = AppendSums(nil, []byte{1}) },
	} {
		other := h
		change(&other)
		require.NotEqual(t, h.Digest(), other.Digest())
	}
}
