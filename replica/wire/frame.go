package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

const (
	frameMagic = 0x31 // of frames of version 1
	headSize   = 12
	// MaxPayload bounds a message's payload, in bytes: the longest record, with a table.
	MaxPayload = record.MaxHeaderSize + record.MaxPayload + 1<<20
	// MaxFirst bounds the payloads that a Reader takes before Trust, in bytes.
	MaxFirst = 4 << 10

	flagZstd = 1 << 0
	// minCompressed is the shortest payload that is compressed, in bytes.
	minCompressed = 512
)

// Writer frames messages.
type Writer struct {
	w     io.Writer
	level int
	zstd  [MaxLevel + 1]*zstd.Encoder // by level, made when it is asked for first; none of level 0
	buf   []byte                      // Write's frame
	// deflated is scratch.
	deflated []byte
	// Raw and Sent count the bytes of payloads, and those of their frames.
	Raw, Sent int64
}

// MaxLevel is the highest level of compression.
const MaxLevel = int(zstd.SpeedBestCompression)

// NewWriter makes a Writer; w may be nil if only Append is used. Level is zstd's, 1 to MaxLevel as the library has them; 0 compresses nothing.
func NewWriter(w io.Writer, level int) (*Writer, error) {
	fw := &Writer{w: w}
	return fw, fw.SetLevel(level)
}

// Level is the present level.
func (w *Writer) Level() int { return w.level }

// SetLevel has it compress at another level from now on.
func (w *Writer) SetLevel(level int) error {
	if level < 0 || level > MaxLevel {
		return fmt.Errorf("zstd level %d: 0 to %d are possible", level, MaxLevel)
	}
	if level > 0 && w.zstd[level] == nil {
		var err error
		w.zstd[level], err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevel(level)), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
		if err != nil {
			return fmt.Errorf("zstd level %d: %w", level, err)
		}
	}
	w.level = level
	return nil
}

// Write writes a message in a frame, with one call.
func (w *Writer) Write(m Message) (err error) {
	if w.buf, err = w.Append(w.buf[:0], m); err != nil {
		return err
	}
	if _, err := w.w.Write(w.buf); err != nil {
		return fmt.Errorf("send %v: %w", m.Type(), err)
	}
	return nil
}

// Append appends a message in a frame to dst, and writes nothing:
//
//	offset size field
//	  0     1   0x31: a frame of version 1
//	  1     1   the message's type
//	  2     1   flags: 1, the payload is its inflated length (4) and a zstd frame
//	  3     1   zero
//	  4     4   payload's length, bytes
//	  8     4   CRC-32C of bytes 0 to 7 and the payload
//	 12     …   payload
func (w *Writer) Append(dst []byte, m Message) ([]byte, error) {
	le, start := binary.LittleEndian, len(dst)
	dst = append(dst, frameMagic, byte(m.Type()), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	dst = m.append(dst)
	raw := len(dst) - start - headSize
	if raw > MaxPayload {
		return dst[:start], fmt.Errorf("%v of %d bytes: at most %d can be sent", m.Type(), raw, MaxPayload)
	}
	if w.level > 0 && raw >= minCompressed {
		dst = w.deflate(dst, start)
	}
	frame := dst[start:]
	le.PutUint32(frame[4:], uint32(len(frame)-headSize))
	le.PutUint32(frame[8:], sum(frame))
	w.Raw, w.Sent = w.Raw+int64(raw), w.Sent+int64(len(frame))
	return dst, nil
}

// deflate compresses the payload of the frame that begins at start, if that makes it shorter.
func (w *Writer) deflate(dst []byte, start int) []byte {
	payload := dst[start+headSize:]
	w.deflated = binary.LittleEndian.AppendUint32(w.deflated[:0], uint32(len(payload)))
	w.deflated = w.zstd[w.level].EncodeAll(payload, w.deflated)
	if len(w.deflated) >= len(payload) {
		return dst
	}
	dst[start+2] |= flagZstd
	return append(dst[:start+headSize], w.deflated...)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum is the checksum of a frame.
func sum(frame []byte) uint32 {
	return crc32.Update(crc32.Checksum(frame[:8], castagnoli), castagnoli, frame[headSize:])
}

// Reader reads framed messages.
type Reader struct {
	r    io.Reader
	zstd *zstd.Decoder
	most int
	// Two messages stand apart: while one is used, the next can be read.
	bufs, raws [2][]byte
	turn       int
}

// NewReader makes a Reader that takes messages of MaxFirst bytes.
func NewReader(r io.Reader) (*Reader, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxPayload), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, err
	}
	return &Reader{r: r, zstd: d, most: MaxFirst}, nil
}

// Trust has it take messages of MaxPayload bytes: the peer is who it should be.
func (r *Reader) Trust() { r.most = MaxPayload }

// Close gives memory back.
func (r *Reader) Close() { r.zstd.Close() }

// Next reads a message, whose slices are the Reader's from the call after the next one on. io.EOF says that the stream ended between two.
func (r *Reader) Next() (Message, error) {
	r.turn = 1 - r.turn
	var head [headSize]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	t, n := Type(head[1]), int64(le.Uint32(head[4:]))
	switch {
	case head[0] != frameMagic:
		return nil, fmt.Errorf("%w: a frame begins with %#02x, one of version 1 with %#02x: is the peer a Tidemark of another version?", record.ErrCorrupt, head[0], frameMagic)
	case n > int64(r.most):
		return nil, fmt.Errorf("%w: %v of %d bytes, at most %d are taken", record.ErrCorrupt, t, n, r.most)
	case head[2]&^flagZstd != 0 || head[3] != 0:
		return nil, fmt.Errorf("%w: %v with unknown flags %#02x", record.ErrCorrupt, t, head[2])
	}
	if int64(cap(r.bufs[r.turn])) < headSize+n {
		r.bufs[r.turn] = make([]byte, headSize+n)
	}
	buf := append(r.bufs[r.turn][:0], head[:]...)[:headSize+n]
	if _, err := io.ReadFull(r.r, buf[headSize:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%v of %d bytes: %w", t, n, err)
	}
	if got, want := sum(buf), le.Uint32(head[8:]); got != want {
		return nil, fmt.Errorf("%w: %v of %d bytes has checksum %08x, sent was %08x", record.ErrCorrupt, t, n, got, want)
	}
	payload := buf[headSize:]
	if head[2]&flagZstd != 0 {
		var err error
		if payload, err = r.inflate(payload); err != nil {
			return nil, fmt.Errorf("%w: %v of %d bytes: %w", record.ErrCorrupt, t, n, err)
		}
	}
	return decode(t, payload)
}

func (r *Reader) inflate(b []byte) ([]byte, error) {
	if len(b) < 4 {
		return nil, errors.New("cut short")
	}
	n := int64(binary.LittleEndian.Uint32(b))
	if n > int64(r.most) {
		return nil, fmt.Errorf("it inflates to %d bytes, at most %d are taken", n, r.most)
	}
	if int64(cap(r.raws[r.turn])) < n {
		r.raws[r.turn] = make([]byte, 0, n)
	}
	raw, err := r.zstd.DecodeAll(b[4:], r.raws[r.turn][:0:n])
	if err != nil {
		return nil, err
	}
	if r.raws[r.turn] = raw; int64(len(raw)) != n {
		return nil, fmt.Errorf("it inflates to %d bytes, and says %d", len(raw), n)
	}
	return raw, nil
}
