package kernel

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Commands and attributes of the family "nbd".
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex       = 1  // u32; without it the kernel picks one
	attrSize        = 2  // u64, bytes
	attrBlockSize   = 3  // u64, bytes
	attrTimeout     = 4  // u64, seconds: of a request
	attrServerFlags = 5  // u64: the transmission flags of the protocol
	attrSockets     = 7  // nested: sockItem …
	attrDeadTimeout = 8  // u64, seconds: how long requests wait for a new connection
	attrBackend     = 10 // string: whose device it is

	sockItem = 1 // nested: sockFD
	sockFD   = 1 // u32
)

// blockSize is what the device says its sectors are, in bytes.
const blockSize = 512

// setup is what a device is connected with.
type setup struct {
	size    int64
	flags   uint16
	backend string
	timeout time.Duration
	dead    time.Duration
}

// request begins a request to the kernel.
func request(cmd uint8) (*nl.NetlinkRequest, error) {
	family, err := netlink.GenlFamilyGet("nbd")
	if errors.Is(err, unix.ENOENT) {
		return nil, errors.New("the kernel's NBD client is not there: modprobe nbd")
	}
	if err != nil {
		return nil, fmt.Errorf("find the kernel's NBD client: %w", err)
	}
	r := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	r.AddData(&nl.Genlmsg{Command: cmd, Version: 1})
	return r, nil
}

func u64(v uint64) []byte { return nl.Uint64Attr(v) }

func addSockets(r *nl.NetlinkRequest, socks []*os.File) {
	all := nl.NewRtAttr(attrSockets|unix.NLA_F_NESTED, nil)
	for _, s := range socks {
		all.AddRtAttr(sockItem|unix.NLA_F_NESTED, nil).AddRtAttr(sockFD, nl.Uint32Attr(uint32(s.Fd())))
	}
	r.AddData(all)
}

// connect makes a device of sockets whose handshake is done. The kernel holds them for itself.
func connect(s setup, socks []*os.File) (index int, err error) {
	r, err := request(cmdConnect)
	if err != nil {
		return 0, err
	}
	for attr, v := range map[int]uint64{
		attrSize: uint64(s.size), attrBlockSize: blockSize, attrServerFlags: uint64(s.flags),
		attrTimeout: uint64(s.timeout / time.Second), attrDeadTimeout: uint64(s.dead / time.Second),
	} {
		r.AddData(nl.NewRtAttr(attr, u64(v)))
	}
	r.AddData(nl.NewRtAttr(attrBackend, nl.ZeroTerminated(s.backend)))
	addSockets(r, socks)
	answers, err := r.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return 0, fmt.Errorf("connect the kernel's NBD client: %w", err)
	}
	for _, a := range answers {
		if len(a) < nl.SizeofGenlmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(a[nl.SizeofGenlmsg:])
		if err != nil {
			continue
		}
		for _, attr := range attrs {
			if attr.Attr.Type == attrIndex && len(attr.Value) >= 4 {
				return int(nl.NativeEndian().Uint32(attr.Value)), nil
			}
		}
	}
	return 0, errors.New("connect the kernel's NBD client: it does not say which device it made")
}

// reconfigure gives a device whose connections are dead new ones.
func reconfigure(index int, s setup, socks []*os.File) error {
	r, err := request(cmdReconfigure)
	if err != nil {
		return err
	}
	r.AddData(nl.NewRtAttr(attrIndex, nl.Uint32Attr(uint32(index))))
	r.AddData(nl.NewRtAttr(attrTimeout, u64(uint64(s.timeout/time.Second))))
	r.AddData(nl.NewRtAttr(attrDeadTimeout, u64(uint64(s.dead/time.Second))))
	r.AddData(nl.NewRtAttr(attrBackend, nl.ZeroTerminated(s.backend)))
	addSockets(r, socks)
	if _, err := r.Execute(unix.NETLINK_GENERIC, 0); err != nil {
		return fmt.Errorf("reconnect %s: %w", Path(index), err)
	}
	return nil
}

func disconnect(index int) error {
	r, err := request(cmdDisconnect)
	if err != nil {
		return err
	}
	r.AddData(nl.NewRtAttr(attrIndex, nl.Uint32Attr(uint32(index))))
	if _, err := r.Execute(unix.NETLINK_GENERIC, 0); err != nil {
		return fmt.Errorf("disconnect %s: %w", Path(index), err)
	}
	return nil
}
