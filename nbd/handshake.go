package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"github.com/pojntfx/go-nbd/pkg/protocol"

	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

// errAbort says that the client ended the negotiation as the protocol wants it.
var errAbort = errors.New("client aborted")

// session is what the negotiation agreed on.
type session struct {
	name       string
	dev        Device
	structured bool
	maps       []chosenMap
}

// chosenMap is a metadata context that was chosen for a session's export.
type chosenMap struct {
	id uint32
	Map
}

// close closes what the session has open.
func (s *session) close() error {
	var errs []error
	for _, m := range s.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(append(errs, s.dev.Close())...)
}

// allocation is base:allocation, which every device has.
type allocation struct{ Device }

func (a allocation) Extents(off, n int64, fn func(int64, uint32)) error {
	return a.Device.Extents(off, n, func(n int64, zero bool) {
		if zero {
			fn(n, proto.StateHole|proto.StateZero)
		} else {
			fn(n, 0)
		}
	})
}

func (a allocation) Close() error { return nil }

// openMap opens a metadata context of a device; nil if it knows no such.
func openMap(dev Device, name string) (Map, error) {
	if name == proto.MetaAllocation {
		return allocation{dev}, nil
	}
	if m, ok := dev.(Mapper); ok {
		return m.Map(name)
	}
	return nil, nil
}

type handshake struct {
	s *Server
	c net.Conn

	tls        bool
	noZeroes   bool
	structured bool
	metaOf     string   // export that metadata contexts were chosen for
	meta       []string // and which; the number of each is its place, from 1 on
}

// run negotiates. On success the session's device is open.
func (h *handshake) run(ctx context.Context) (*session, error) {
	be := binary.BigEndian
	hello := be.AppendUint64(nil, protocol.NEGOTIATION_MAGIC_OLDSTYLE)
	hello = be.AppendUint64(hello, protocol.NEGOTIATION_MAGIC_OPTION)
	hello = be.AppendUint16(hello, protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE|proto.HandshakeNoZeroes)
	if _, err := h.c.Write(hello); err != nil {
		return nil, err
	}
	var b [16]byte
	if _, err := io.ReadFull(h.c, b[:4]); err != nil {
		return nil, err
	}
	flags := be.Uint32(b[:])
	if known := uint32(protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE | proto.HandshakeNoZeroes); flags&^known != 0 {
		return nil, fmt.Errorf("client sent unknown handshake flags %#x", flags)
	}
	h.noZeroes = flags&uint32(proto.HandshakeNoZeroes) != 0
	for ctx.Err() == nil {
		if _, err := io.ReadFull(h.c, b[:]); err != nil {
			return nil, err
		}
		if m := be.Uint64(b[:]); m != protocol.NEGOTIATION_MAGIC_OPTION {
			return nil, fmt.Errorf("client sent option magic %#x", m)
		}
		sess, err := h.option(ctx, be.Uint32(b[8:]), be.Uint32(b[12:]))
		if sess != nil || err != nil {
			return sess, err
		}
	}
	return nil, ctx.Err()
}

// option answers one option. A session ends the negotiation.
func (h *handshake) option(ctx context.Context, opt, n uint32) (*session, error) {
	if n > maxOptionLen {
		if _, err := io.CopyN(io.Discard, h.c, int64(n)); err != nil {
			return nil, err
		}
		if opt == proto.OptExportName {
			return nil, fmt.Errorf("export name of %d bytes", n)
		}
		return nil, h.refuse(opt, proto.RepErrTooBig, fmt.Sprintf("option of %d bytes: at most %d are taken", n, maxOptionLen))
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(h.c, data); err != nil {
		return nil, err
	}
	if h.s.TLS != nil && !h.tls {
		switch opt {
		case protocol.NEGOTIATION_ID_OPTION_ABORT, proto.OptStartTLS:
		case proto.OptExportName:
			return nil, errors.New("client chose an export without TLS, which is required")
		default:
			return nil, h.refuse(opt, proto.RepErrTLSReqd, "this server requires TLS")
		}
	}
	switch opt {
	case proto.OptExportName:
		return h.exportName(string(data))
	case protocol.NEGOTIATION_ID_OPTION_ABORT:
		_ = h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil) // the client may be gone
		return nil, errAbort
	case protocol.NEGOTIATION_ID_OPTION_LIST:
		return nil, h.list(opt, data)
	case proto.OptStartTLS:
		return nil, h.startTLS(ctx, data)
	case protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_ID_OPTION_GO:
		return h.info(opt, data)
	case proto.OptStructuredReply:
		if len(data) != 0 {
			return nil, h.refuse(opt, proto.RepErrInvalid, "the option takes no data")
		}
		h.structured = true
		return nil, h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
	case proto.OptListMeta, proto.OptSetMeta:
		return nil, h.metaContext(opt, data)
	}
	return nil, h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, "unknown option")
}

func (h *handshake) reply(opt, typ uint32, data []byte) error {
	be := binary.BigEndian
	b := be.AppendUint64(make([]byte, 0, 20+len(data)), protocol.NEGOTIATION_MAGIC_REPLY)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, typ)
	b = be.AppendUint32(b, uint32(len(data)))
	_, err := h.c.Write(append(b, data...))
	return err
}

// refuse answers with an error and a text for people.
func (h *handshake) refuse(opt, typ uint32, text string) error {
	return h.reply(opt, typ, []byte(text[:min(len(text), maxString)]))
}

func (h *handshake) list(opt uint32, data []byte) error {
	if len(data) != 0 {
		return h.refuse(opt, proto.RepErrInvalid, "the option takes no data")
	}
	for _, name := range h.s.Exports.List() {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		if err := h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_SERVER, append(b, name...)); err != nil {
			return err
		}
	}
	return h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

// startTLS goes on over TLS and forgets what was agreed before, which anyone
// on the way may have said.
func (h *handshake) startTLS(ctx context.Context, data []byte) error {
	switch {
	case len(data) != 0:
		return h.refuse(proto.OptStartTLS, proto.RepErrInvalid, "the option takes no data")
	case h.tls:
		return h.refuse(proto.OptStartTLS, proto.RepErrInvalid, "TLS is in use already")
	case h.s.TLS == nil:
		return h.refuse(proto.OptStartTLS, proto.RepErrPolicy, "this server has no TLS")
	}
	if err := h.reply(proto.OptStartTLS, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil); err != nil {
		return err
	}
	tc := tls.Server(h.c, h.s.TLS)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.c, h.tls = tc, true
	h.structured, h.metaOf, h.meta = false, "", nil
	return nil
}

// open opens an export and the metadata contexts that were chosen for it.
func (h *handshake) open(name string) (*session, error) {
	dev, err := h.s.Exports.Open(name)
	if err != nil {
		return nil, err
	}
	s := &session{name: name, dev: dev, structured: h.structured}
	if h.metaOf != name {
		return s, nil
	}
	for i, context := range h.meta {
		m, err := openMap(dev, context)
		if err == nil && m == nil {
			err = fmt.Errorf("metadata context %q is gone", context)
		}
		if err != nil {
			return nil, errors.Join(err, s.close())
		}
		s.maps = append(s.maps, chosenMap{uint32(i + 1), m})
	}
	return s, nil
}

func (h *handshake) flags(dev Device) uint16 {
	f := proto.FlagHasFlags | proto.FlagSendFlush | proto.FlagSendFUA | proto.FlagMultiConn | proto.FlagSendCache
	if h.structured {
		f |= proto.FlagSendDF
	}
	if dev.ReadOnly() {
		return f | proto.FlagReadOnly
	}
	return f | proto.FlagSendTrim | proto.FlagSendZeroes | proto.FlagFastZero
}

// exportName is the old way to choose an export: it has no way to say no but to hang up.
func (h *handshake) exportName(name string) (*session, error) {
	s, err := h.open(name)
	if err != nil {
		return nil, fmt.Errorf("export %q: %w", name, err)
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(s.dev.Size()))
	b = binary.BigEndian.AppendUint16(b, h.flags(s.dev))
	if !h.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	if _, err := h.c.Write(b); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// cutString takes a length and a string of that length off b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if b = b[4:]; uint64(n) > uint64(len(b)) {
		return "", nil, false
	}
	return string(b[:n]), b[n:], true
}

// info answers INFO and GO: name, then the kinds of information asked for.
func (h *handshake) info(opt uint32, data []byte) (*session, error) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return nil, h.refuse(opt, proto.RepErrInvalid, "malformed option")
	}
	s, err := h.open(name)
	if err != nil {
		return nil, h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, err.Error())
	}
	if err := h.sendInfo(opt, name, s.dev, rest[2:]); err != nil {
		return nil, errors.Join(err, s.close())
	}
	if opt == protocol.NEGOTIATION_ID_OPTION_INFO {
		return nil, s.close()
	}
	return s, nil
}

func (h *handshake) sendInfo(opt uint32, name string, dev Device, asked []byte) error {
	be := binary.BigEndian
	b := be.AppendUint16(nil, protocol.NEGOTIATION_TYPE_INFO_EXPORT)
	b = be.AppendUint64(b, uint64(dev.Size()))
	b = be.AppendUint16(b, h.flags(dev))
	if err := h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_INFO, b); err != nil {
		return err
	}
	b = be.AppendUint16(nil, protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE)
	b = be.AppendUint32(b, 1)
	b = be.AppendUint32(b, preferredBlock)
	b = be.AppendUint32(b, MaxRequest)
	if err := h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_INFO, b); err != nil {
		return err
	}
	for ; len(asked) > 0; asked = asked[2:] {
		switch typ := be.Uint16(asked); typ {
		case protocol.NEGOTIATION_TYPE_INFO_NAME, protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION:
			b := append(be.AppendUint16(nil, typ), name...)
			if err := h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_INFO, b); err != nil {
				return err
			}
		}
	}
	return h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) metaContext(opt uint32, data []byte) error {
	if opt == proto.OptSetMeta {
		h.metaOf, h.meta = "", nil
	}
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 || !h.structured {
		return h.refuse(opt, proto.RepErrInvalid, "malformed option, or structured replies were not agreed on")
	}
	count, rest := binary.BigEndian.Uint32(rest), rest[4:]
	var asked []string
	if opt == proto.OptListMeta && count == 0 {
		asked = []string{proto.MetaAllocation}
	}
	for range count {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			return h.refuse(opt, proto.RepErrInvalid, "malformed query")
		}
		if opt == proto.OptListMeta && q == "base:" {
			q = proto.MetaAllocation
		}
		if !slices.Contains(asked, q) {
			asked = append(asked, q)
		}
		if len(asked) > maxContexts {
			return h.refuse(opt, proto.RepErrTooBig, fmt.Sprintf("at most %d metadata contexts are taken", maxContexts))
		}
	}
	if len(rest) != 0 {
		return h.refuse(opt, proto.RepErrInvalid, "data behind the queries")
	}
	known, err := h.contexts(name, asked)
	if err != nil {
		return h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, err.Error())
	}
	for i, context := range known {
		id := uint32(i + 1)
		if opt == proto.OptListMeta {
			id = 0
		}
		b := append(binary.BigEndian.AppendUint32(nil, id), context...)
		if err := h.reply(opt, proto.RepMetaContext, b); err != nil {
			return err
		}
	}
	if opt == proto.OptSetMeta {
		h.metaOf, h.meta = name, known
	}
	return h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

// contexts are those of the contexts asked for that an export knows.
func (h *handshake) contexts(export string, asked []string) (known []string, err error) {
	dev, err := h.s.Exports.Open(export)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	for _, context := range asked {
		m, err := openMap(dev, context)
		if err != nil {
			return nil, err
		}
		if m == nil {
			continue
		}
		if err := m.Close(); err != nil {
			return nil, err
		}
		known = append(known, context)
	}
	return known, nil
}
