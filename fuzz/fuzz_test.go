package fuzz

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/guest"
	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// memory is the smallest device that checks what it is asked.
type memory struct {
	t *testing.T
	b []byte
}

func (m memory) Size() int64    { return int64(len(m.b)) }
func (m memory) ReadOnly() bool { return false }
func (m memory) Flush() error   { return nil }
func (m memory) Close() error   { return nil }

func (m memory) ReadAt(p []byte, off int64, _ bool) error {
	copy(p, m.b[off:off+int64(len(p))])
	return nil
}

func (m memory) Change(changes []nbd.Change) error {
	for _, c := range changes {
		if c.Op == nbd.OpWrite && int64(len(c.Buf)) != c.Len {
			m.t.Fatalf("a write of %d bytes with a buffer of %d", c.Len, len(c.Buf))
		}
		copy(m.b[c.Off:c.Off+c.Len], c.Buf)
	}
	return nil
}

func (m memory) Extents(_, n int64, fn func(int64, bool)) error {
	fn(n, false)
	return nil
}

type exports struct{ dev nbd.Device }

func (e exports) List() []string { return []string{"d"} }

func (e exports) Open(name string) (nbd.Device, error) {
	if name != "d" {
		return nil, errors.New("no such export")
	}
	return e.dev, nil
}

// serve gives a connection the client's bytes and waits for its end.
func serve(t *testing.T, in []byte) {
	client, server := net.Pipe()
	s := nbd.Server{Exports: exports{memory{t, make([]byte, 64<<10)}}, Log: zap.NewNop()}
	done := make(chan struct{})
	go func() {
		s.ServeConn(context.Background(), server)
		close(done)
	}()
	go func() {
		buf := make([]byte, 4096)
		for {
			if _, err := client.Read(buf); err != nil {
				return
			}
		}
	}()
	_ = client.SetWriteDeadline(time.Now().Add(5 * time.Second))
	_, _ = client.Write(in) // the server may hang up first
	_ = client.Close()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the connection did not end")
	}
}

var hello = []byte{0, 0, 0, 3}

func option(opt byte, data string) []byte {
	b := append([]byte("IHAVEOPT\x00\x00\x00"), opt, 0, 0, 0, byte(len(data)))
	return append(b, data...)
}

func request(flags, typ byte, n byte, payload string) []byte {
	b := []byte{0x25, 0x60, 0x95, 0x13, 0, flags, 0, typ, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, n}
	return append(b, payload...)
}

func FuzzHandshake(f *testing.F) {
	for _, o := range [][]byte{option(3, ""), option(7, "\x00\x00\x00\x01d\x00\x00"), option(8, ""), option(5, ""), option(1, "d"),
		append(option(8, ""), option(10, "\x00\x00\x00\x01d\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation")...)} {
		f.Add(append(bytes.Clone(hello), o...))
	}
	f.Fuzz(func(t *testing.T, in []byte) { serve(t, in) })
}

func FuzzTransmission(f *testing.F) {
	for _, r := range [][]byte{request(0, 0, 9, ""), request(1, 1, 3, "abc"), request(0, 3, 0, ""), request(0, 6, 8, ""), request(0, 7, 8, ""), request(0, 2, 0, "")} {
		f.Add(true, r)
		f.Add(false, append(bytes.Clone(r), r...))
	}
	f.Fuzz(func(t *testing.T, structured bool, in []byte) {
		b := bytes.Clone(hello)
		if structured {
			b = append(b, option(8, "")...)
			b = append(b, option(10, "\x00\x00\x00\x01d\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation")...)
		}
		serve(t, append(append(b, option(7, "\x00\x00\x00\x01d\x00\x00")...), in...))
	})
}

func FuzzRecord(f *testing.F) {
	payload := bytes.Repeat([]byte{5}, 5000)
	h := record.Header{LSN: 1, Extent: record.Extent{Len: 5000}, Kind: record.KindWrite, Payload: 5000, Sums: record.AppendSums(nil, payload)}
	f.Add(h.Append(nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := record.Decode(b)
		if err != nil {
			return
		}
		if again := h.Append(nil); len(again) > len(b) || !bytes.Equal(again[8:54], b[8:54]) {
			t.Fatal("what was decoded encodes to something else")
		}
		_, _ = record.DecodeMarker(h.LSN, h.Time, b)
	})
}

func FuzzSegment(f *testing.F) {
	f.Add([]byte("TIDESEG\n"), []byte("TMR1"))
	f.Fuzz(func(t *testing.T, head, rest []byte) {
		_, _ = segment.DecodeHeader(append(head, make([]byte, 4096)...))
		fs := vfs.NewMem()
		set, err := segment.OpenSet(fs, "", false)
		if err != nil {
			t.Fatal(err)
		}
		defer set.Close()
		w := segment.NewWriter(set, segment.Log, segment.MinSize, 0)
		if err := w.Roll(segment.Header{First: 1, Name: "g", Reigns: record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}}}, 0); err != nil {
			t.Fatal(err)
		}
		if err := w.Append([][]byte{rest}, int64(len(rest))); err != nil {
			return // longer than the file
		}
		file := set.Files(segment.Log)[0]
		_, err = file.Scan(file.Start(), func(off int64, h record.Header) error {
			_, err := file.VerifyPayload(off, h, nil)
			return err
		})
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			t.Fatal(err)
		}
		if err := file.Resync(file.Start(), func(int64, record.Header) error { return nil }); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzPoint(f *testing.F) {
	for _, s := range []string{"latest", "latest:crash", "lsn:5", "-15m", "-2d", "2026-11-21T10:00:00Z", "label"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := record.ParsePoint(s)
		if err == nil && p.Form != record.FormTime && p.Form != record.FormAgo {
			if again, err := record.ParsePoint(p.String()); err != nil || again != p {
				t.Fatalf("%q reads as %v, which reads as %v, %v", s, p, again, err)
			}
		}
		if record.CheckLabel(s) == nil {
			if e, err := record.ParseExportName("g/d@" + s); err != nil || e.Point.Label != s {
				t.Fatalf("label %q can not be named: %v", s, err)
			}
		}
	})
}

// FuzzNotes reads the payloads of records that change no disk: what is taken is written again as the same.
func FuzzNotes(f *testing.F) {
	m := record.Marker{LSN: 5, Label: "nightly", Asked: record.Application, Consistency: record.Crash, By: "user:root", Note: "why", Pinned: true}
	f.Add(uint8(0), m.Append(nil))
	f.Add(uint8(1), (&record.Amendment{Target: 5, Marker: m}).Append(nil))
	f.Add(uint8(2), (&record.Definition{Name: "vm", Since: 3, Time: time.Unix(1, 2).UTC(), Content: []byte("<domain/>")}).Append(nil))
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		var again []byte
		switch kind % 3 {
		case 0:
			m, err := record.DecodeMarker(5, 6, b)
			if err != nil {
				return
			}
			again = m.Append(nil)
			if m2, err := record.DecodeMarker(5, 6, again); err != nil || len(m.Note) < 1000 && len(m.Label)+len(m.By) < 256 && len(m.Description) < 1000 && m2 != m {
				t.Fatalf("%+v is written and read as %+v, %v", m, m2, err)
			}
		case 1:
			a, err := record.DecodeAmendment(b)
			if err != nil {
				return
			}
			if _, err := record.DecodeAmendment(a.Append(nil)); err != nil {
				t.Fatalf("%+v is written, and then %v", a, err)
			}
		case 2:
			d, err := record.DecodeDefinition(5, b)
			if err != nil {
				return
			}
			d2, err := record.DecodeDefinition(5, d.Append(nil))
			if err != nil || d2.Name != d.Name || d2.Since != d.Since || !bytes.Equal(d2.Content, d.Content) {
				t.Fatalf("%+v is written and read as %+v, %v", d, d2, err)
			}
		}
	})
}

// FuzzIdentity gives hostile XML a new identity.
func FuzzIdentity(f *testing.F) {
	f.Add([]byte("<domain><name>vm</name><devices><disk device='disk'><target dev='vda'/></disk><interface/><channel><source mode='connect'/></channel></devices></domain>"))
	f.Add([]byte("<domain xmlns:q='x'><name/><sysinfo><system><entry name='uuid'/></system></sysinfo></domain>"))
	f.Fuzz(func(t *testing.T, xml []byte) {
		out, _, err := guest.NewIdentity(xml, guest.Identity{Name: "copy", Disks: map[string]string{"vda": "/x"}})
		if err != nil {
			return
		}
		if _, _, err := guest.NewIdentity(out, guest.Identity{Name: "again", Disks: map[string]string{"vda": "/y"}}); err != nil {
			t.Fatalf("what was made can not be read: %v\n%s", err, out)
		}
	})
}

// FuzzSaved reads saved overlays: what is taken is written again as the same places.
func FuzzSaved(f *testing.F) {
	const size = 64 << 20
	save := func(s disk.Saved) []byte {
		d := disk.New(s.ID, "d", size, 0, nil)
		d.Load(s)
		var b bytes.Buffer
		if err := d.Save(&b); err != nil {
			panic(err)
		}
		return b.Bytes()
	}
	le := binary.LittleEndian
	seed := le.AppendUint32(le.AppendUint32(nil, 1), 1)                      // disk 1, a unit
	seed = le.AppendUint32(le.AppendUint32(seed, 2), 1)                      // unit 2
	seed = le.AppendUint16(le.AppendUint64(seed, 7), 1)                      // chunk 7, its first block
	seed = le.AppendUint32(le.AppendUint32(le.AppendUint32(seed, 3), 64), 5) // segment 3
	seed = le.AppendUint64(seed, ^uint64(0))                                 // no more
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		read := func(b []byte) (disk.Saved, error) {
			return disk.ReadSaved(bytes.NewReader(b), func(record.DiskID) int64 { return size }, func(n uint32) bool { return n != 0 })
		}
		s, err := read(b)
		if err != nil {
			return
		}
		first := save(s)
		again, err := read(first)
		if err != nil {
			t.Fatalf("what was saved can not be read: %v", err)
		}
		if !bytes.Equal(first, save(again)) {
			t.Fatalf("saved again, it differs")
		}
	})
}

// FuzzRecords reads records as a peer sends them.
func FuzzRecords(f *testing.F) {
	var b []byte
	for lsn, payload := range [][]byte{nil, []byte("some bytes"), bytes.Repeat([]byte{7}, 5000)} {
		h := record.Header{LSN: record.LSN(lsn + 1), Kind: record.KindTrim, Extent: record.Extent{Len: 4096}}
		if payload != nil {
			h.Kind, h.Extent.Len, h.Payload, h.Sums = record.KindWrite, int64(len(payload)), len(payload), record.AppendSums(nil, payload)
		}
		b = append(h.Append(b), payload...)
		b = append(b, make([]byte, (record.Alignment-len(b)%record.Alignment)%record.Alignment)...)
	}
	f.Add(b)
	f.Add(b[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		var sum int64
		err := record.Each(b, func(h record.Header, payload []byte) error {
			if len(payload) != h.Payload {
				t.Fatalf("LSN %d of %d bytes comes with %d", h.LSN, h.Payload, len(payload))
			}
			sum += h.Size()
			return nil
		})
		if err == nil && sum != int64(len(b)) || err != nil && !errors.Is(err, record.ErrCorrupt) {
			t.Fatalf("%d of %d bytes: %v", sum, len(b), err)
		}
	})
}

// FuzzFrames reads what a replica's peer sends: any two frames.
func FuzzFrames(f *testing.F) {
	for level := range 2 {
		var stream bytes.Buffer
		w, err := wire.NewWriter(&stream, level)
		if err != nil {
			f.Fatal(err)
		}
		reigns := record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}}
		disks := []record.Disk{{ID: 1, Name: "vda", Size: 1 << 20}}
		for _, m := range []wire.Message{
			&wire.Hello{Lowest: 1, Highest: 1, Name: "n"}, &wire.Refuse{Reason: wire.ReasonRights, Text: "no", Reigns: reigns},
			&wire.Offer{Group: "g", Head: 5, Reigns: reigns}, &wire.Position{Known: true, Head: 3, Reigns: reigns},
			&wire.Records{Run: record.Run{First: 1, Last: 1, Disks: disks, Reigns: reigns, Bytes: make([]byte, 600)}, Table: true},
			&wire.Begin{Beginning: record.Beginning{At: 3, Reigns: reigns, Disks: disks}}, &wire.Adopt{Disk: disks[0]},
			&wire.Sums{Disk: 1, Sums: make([]byte, 32)}, &wire.Want{Disk: 1, Bits: []byte{3}}, &wire.Data{Disk: 1, Bytes: make([]byte, 600)},
		} {
			stream.Reset()
			if err := w.Write(m); err != nil {
				f.Fatal(err)
			}
			f.Add(bytes.Clone(stream.Bytes()))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// A fuzzer finds no checksum: it is made to hold.
		if len(b) >= 12 {
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[4:], uint32(len(b)-12))
			sum := crc32.Update(crc32.Checksum(b[:8], castagnoli), castagnoli, b[12:])
			binary.LittleEndian.PutUint32(b[8:], sum)
		}
		r, err := wire.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		r.Trust()
		m, err := r.Next()
		if err != nil {
			return
		}
		var again bytes.Buffer
		w, err := wire.NewWriter(&again, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(m); err != nil {
			t.Fatal(err)
		}
		if b[2] == 0 && b[3] == 0 && !bytes.Equal(b, again.Bytes()) {
			t.Fatalf("%#v is other bytes than it was read from", m)
		}
	})
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
