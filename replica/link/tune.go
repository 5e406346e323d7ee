package link

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// sockBuffer holds what is on its way on a fast link with a long round trip, in bytes: 1 Gbit/s over 250 ms.
	sockBuffer = 32 << 20
	congestion = "bbr"
)

// tune prepares a socket for long fat links. Nothing of it must succeed.
func tune(c net.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3})
	raw, err := t.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		s := int(fd)
		// Loss is not taken for congestion: the module may not be there.
		_ = unix.SetsockoptString(s, unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestion)
		_ = unix.SetsockoptInt(s, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds()))
		// More of what is not sent yet would hide that the link is the bottleneck from who compresses, or has more to say.
		_ = unix.SetsockoptInt(s, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 1<<20)
		for _, o := range []struct{ force, plain int }{{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}} {
			if unix.SetsockoptInt(s, unix.SOL_SOCKET, o.force, sockBuffer) == syscall.EPERM {
				_ = unix.SetsockoptInt(s, unix.SOL_SOCKET, o.plain, sockBuffer)
			}
		}
	})
}
