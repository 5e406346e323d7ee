package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/zeebo/blake3"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

const (
	// sumBlocks is how many blocks are compared at once, and unanswered how many such messages are under way: enough for a long round trip,
	// and what a follower takes.
	sumBlocks  = 4096
	unanswered = replica.MaxUnanswered / 2
	// dataBytes bounds a message with content.
	dataBytes = 1 << 20
	// answerWithin is how long a follower may take to compare what it was sent; what was sent before is on its way to it, and a link may
	// be slow.
	answerWithin = 10 * time.Minute
	// tellEvery is how often progress is told.
	tellEvery = 250 * time.Millisecond
)

var zeroes [record.BlockSize]byte

// summer makes the sums of blocks.
type summer struct {
	h   *blake3.Hasher
	sum [32]byte
}

func newSummer(key *[32]byte) (*summer, error) {
	h, err := blake3.NewKeyed(key[:])
	return &summer{h: h}, err
}

// append appends the sum of a block, see wire.SumSize.
func (s *summer) append(dst, block []byte) []byte {
	if bytes.Equal(block, zeroes[:len(block)]) {
		return append(dst, zeroes[:wire.SumSize]...)
	}
	s.h.Reset()
	_, _ = s.h.Write(block) // a hash takes everything
	s.h.Sum(s.sum[:0])
	return append(dst, s.sum[:wire.SumSize]...)
}

// seeding sends disks as of an LSN, one after the other.
type seeding struct {
	x        *shipper
	at       record.LSN
	p        Progress
	told     time.Time
	answers  <-chan *wire.Want
	expected int64 // first block that the next answer is about
	asked    []int64
	sumsBuffer
}

// sumsBuffer is what sums are made with and of; the next ones are made in the same place.
type sumsBuffer struct{ buf, sums []byte }

// seed begins to send disks; the state machine is told at the end.
func (x *shipper) seed(a replica.Seed) {
	answers := make(chan *wire.Want, replica.MaxUnanswered)
	x.answers = answers
	sd := &seeding{x: x, at: a.At, answers: answers}
	for _, d := range a.Disks {
		sd.p.All += d.Size
	}
	x.wg.Go(func() {
		err := sd.all(x.ctx, a.Disks)
		x.post(func() {
			x.answers = nil
			if err != nil {
				x.perform(x.s.Fail(fmt.Errorf("send the disks as of LSN %d: %w", a.At, err)))
				return
			}
			x.perform(x.s.Seeded())
		})
	})
}

// answer passes the follower's answer to the seeder.
func (x *shipper) answer(m *wire.Want) func() []replica.Action {
	own := *m
	own.Bits = bytes.Clone(m.Bits)
	select {
	case x.answers <- &own:
	default:
		x.perform(x.s.Fail(fmt.Errorf("%w: more answers than sums", replica.ErrProtocol)))
	}
	return nil
}

func (sd *seeding) all(ctx context.Context, disks []record.Disk) error {
	for _, d := range disks {
		sd.p.Disk = d.Name
		sd.tell(true)
		if err := sd.disk(ctx, d); err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	sd.p.Done = true
	sd.tell(true)
	return nil
}

func (sd *seeding) tell(now bool) {
	if now || time.Since(sd.told) >= tellEvery {
		sd.told = time.Now()
		sd.x.src.Seeding(sd.p)
	}
}

func (sd *seeding) disk(ctx context.Context, d record.Disk) error {
	v, err := sd.x.src.View(d.ID, sd.at)
	if err != nil {
		return err
	}
	defer v.Close()
	if v.Size() != d.Size {
		return fmt.Errorf("it has %d bytes, and its group's table says %d", v.Size(), d.Size)
	}
	m := &wire.Sums{Disk: d.ID}
	if _, err := rand.Read(m.Key[:]); err != nil {
		return fmt.Errorf("draw a key: %w", err)
	}
	s, err := newSummer(&m.Key)
	if err != nil {
		return err
	}
	blocks := int64(record.Blocks(d.Size))
	sd.expected, sd.asked = 0, nil
	for first := int64(0); first < blocks || len(sd.asked) > 0; {
		if first < blocks && len(sd.asked) < unanswered && len(sd.answers) == 0 {
			n := min(sumBlocks, blocks-first)
			if m.Sums, err = sd.sumsOf(v, s, first, n); err != nil {
				return err
			}
			m.First = first
			if err := sd.put(ctx, m); err != nil {
				return err
			}
			first, sd.asked = first+n, append(sd.asked, n)
			continue
		}
		select {
		case want := <-sd.answers:
			if err := sd.content(ctx, v, d.ID, want); err != nil {
				return err
			}
		case <-time.After(answerWithin):
			return fmt.Errorf("the follower has not answered for %v", answerWithin)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return sd.put(ctx, &wire.Seeded{Disk: d.ID})
}

// put sends a message when there is room for it.
func (sd *seeding) put(ctx context.Context, m wire.Message) error {
	if err := sd.x.q.wait(ctx); err != nil {
		return err
	}
	return sd.x.q.put(m)
}

// sumsOf are the sums of n blocks from first on. What is known to be zeroes is not read.
func (sd *sumsBuffer) sumsOf(v View, s *summer, first, n int64) ([]byte, error) {
	off := first * record.BlockSize
	end := min(off+n*record.BlockSize, v.Size())
	type run struct {
		n    int64
		zero bool
	}
	var runs []run
	if err := v.Extents(off, end-off, func(n int64, zero bool) { runs = append(runs, run{n, zero}) }); err != nil {
		return nil, err
	}
	if sd.buf == nil {
		sd.buf = make([]byte, sumBlocks*record.BlockSize)
	}
	b := sd.buf[:end-off]
	at := int64(0)
	for _, r := range runs {
		if part := b[at : at+r.n]; r.zero {
			clear(part)
		} else if err := v.ReadAt(part, off+at); err != nil {
			return nil, err
		}
		at += r.n
	}
	sd.sums = sd.sums[:0]
	for len(b) > 0 {
		k := min(len(b), record.BlockSize)
		sd.sums, b = s.append(sd.sums, b[:k]), b[k:]
	}
	return sd.sums, nil
}

// content sends the blocks that an answer wants.
func (sd *seeding) content(ctx context.Context, v View, disk record.DiskID, want *wire.Want) error {
	if len(sd.asked) == 0 || want.Disk != disk || want.First != sd.expected || int64(len(want.Bits)) != (sd.asked[0]+7)/8 {
		return fmt.Errorf("%w: an answer about %d blocks from block %d on of disk %d is to no sums", replica.ErrProtocol, 8*len(want.Bits), want.First, want.Disk)
	}
	n := sd.asked[0]
	sd.asked, sd.expected = sd.asked[1:], sd.expected+n
	wanted := func(i int64) bool { return want.Bits[i/8]&(1<<(i%8)) != 0 }
	buf := make([]byte, dataBytes)
	for i := int64(0); i < n; i++ {
		if !wanted(i) {
			continue
		}
		j := i + 1
		for j < n && wanted(j) && (j-i) < dataBytes/record.BlockSize {
			j++
		}
		off := (want.First + i) * record.BlockSize
		b := buf[:min((j-i)*record.BlockSize, v.Size()-off)]
		if err := v.ReadAt(b, off); err != nil {
			return err
		}
		sd.x.adapt(len(b) >= dataBytes/2, sd.x.q.room() != nil)
		if err := sd.put(ctx, &wire.Data{Disk: disk, First: want.First + i, Bytes: b}); err != nil {
			return err
		}
		sd.p.Sent += int64(len(b))
		sd.tell(false)
		i = j - 1
	}
	sd.p.Compared += min(n*record.BlockSize, v.Size()-want.First*record.BlockSize)
	sd.tell(false)
	return nil
}
