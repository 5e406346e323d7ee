// Package wan is a link between two network namespaces of this host as a wide-area network is: with a rate, a delay, and packets that
// get lost. Tests and benchmarks of replication use it, where the kernel has no netem.
//
// It promises that what it makes is gone after Close, and that packets of one direction stay in their order. The caller must be root,
// have ip (iproute2) and /dev/net/tun, run what is to use the link in a namespace ([Link.Command]), and close it. Shape and Cut may
// be called at any time. Limits: IPv4; rates up to some 500 Mbit/s, as every packet goes through this process.
package wan

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The addresses of the two ends.
const (
	AddressA = "10.231.7.1"
	AddressB = "10.231.7.2"
)

// Shape is how a link is, in each direction.
type Shape struct {
	Rate  int64         // bits a second; 0: as fast as it goes
	Delay time.Duration // one way
	Loss  float64       // part of the packets
	Queue int64         // bytes that wait for their turn before packets are dropped; 0: 8 MiB
}

// Link is a link that is there.
type Link struct {
	names [2]string // of the namespaces, and of the devices
	tuns  [2]*os.File
	shape atomic.Pointer[Shape]
	down  atomic.Bool
	wg    sync.WaitGroup
	stop  context.CancelFunc
	// carried counts bytes of packets that came to each end.
	carried [2]atomic.Int64
}

// New makes two namespaces, PREFIX-a and PREFIX-b, and a link between them.
func New(prefix string, s Shape) (l *Link, err error) {
	l = &Link{names: [2]string{prefix + "-a", prefix + "-b"}}
	l.shape.Store(&s)
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for i, name := range l.names {
		_ = exec.Command("ip", "netns", "del", name).Run() // what a run before has left
		if err := ip("netns", "add", name); err != nil {
			return l, err
		}
		if l.tuns[i], err = openTun(name); err != nil {
			return l, err
		}
		addr, other := AddressA, AddressB
		if i == 1 {
			addr, other = other, addr
		}
		for _, args := range [][]string{
			{"link", "set", name, "netns", name},
			{"-n", name, "link", "set", "lo", "up"},
			{"-n", name, "addr", "add", addr, "peer", other, "dev", name},
			{"-n", name, "link", "set", name, "mtu", "1500", "txqueuelen", "1000", "up"},
		} {
			if err := ip(args...); err != nil {
				return l, err
			}
		}
	}
	for i := range l.tuns {
		l.carry(ctx, i)
	}
	return l, nil
}

func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func openTun(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the device %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil // the runtime's poller waits for it
}

type packet struct {
	b   []byte
	due time.Time
}

// carry moves packets out of one end's device to the other's.
func (l *Link) carry(ctx context.Context, from int) {
	queue := make(chan packet, 1<<16)
	l.wg.Go(func() {
		defer close(queue)
		var free time.Time // when the line is
		buf := make([]byte, 64<<10)
		for {
			n, err := l.tuns[from].Read(buf)
			if err != nil {
				return // it is closed
			}
			s := l.shape.Load()
			if l.down.Load() || s.Loss > 0 && rand.Float64() < s.Loss {
				continue
			}
			now := time.Now()
			due := now
			if s.Rate > 0 {
				most := s.Queue
				if most == 0 {
					most = 8 << 20
				}
				if free.Before(now) {
					free = now
				}
				if int64(free.Sub(now).Seconds()*float64(s.Rate)/8) > most {
					continue
				}
				free = free.Add(time.Duration(float64(n*8) / float64(s.Rate) * float64(time.Second)))
				due = free
			}
			select {
			case queue <- packet{append([]byte(nil), buf[:n]...), due.Add(s.Delay)}:
			default:
			}
		}
	})
	l.wg.Go(func() {
		for p := range queue {
			if wait := time.Until(p.due); wait > 200*time.Microsecond { // what sleeps for less sleeps for longer
				time.Sleep(wait)
			}
			if ctx.Err() == nil && !l.down.Load() {
				_, _ = l.tuns[1-from].Write(p.b) // a device that is down loses it
				l.carried[1-from].Add(int64(len(p.b)))
			}
		}
	})
}

// Shape changes how the link is.
func (l *Link) Shape(s Shape) { l.shape.Store(&s) }

// Cut has every packet get lost, or, with false, none that would not.
func (l *Link) Cut(down bool) { l.down.Store(down) }

// Carried is how many bytes of packets have come to end 0 or 1, with their headers.
func (l *Link) Carried(end int) int64 { return l.carried[end].Load() }

// Prefix is what runs a program at end 0 (A) or 1 (B).
func (l *Link) Prefix(end int) []string {
	// Not by ip netns exec, which copies all mounts: what is unmounted meanwhile would stay mounted there.
	return []string{"nsenter", "--net=/run/netns/" + l.names[end]}
}

// Command runs a program at end 0 (A) or 1 (B).
func (l *Link) Command(ctx context.Context, end int, name string, args ...string) *exec.Cmd {
	argv := append(append(l.Prefix(end), name), args...)
	return exec.CommandContext(ctx, argv[0], argv[1:]...)
}

// Close takes the link and the namespaces away.
func (l *Link) Close() error {
	l.stop()
	var errs []error
	for _, t := range l.tuns {
		if t != nil {
			errs = append(errs, t.Close())
		}
	}
	l.wg.Wait()
	for _, name := range l.names {
		errs = append(errs, ip("netns", "del", name))
	}
	return errors.Join(errs...)
}
