// Package kernel makes exports block devices of this host, /dev/nbdN, by the kernel's own NBD client.
//
// # Promises
//
//   - Attach returns when the device is there and its first requests can be served.
//   - Requests wait for DeadTime when the connections are lost, and go on when Reattach gives the device new ones.
//   - A device carries the identity of what it was attached to, in the kernel. It is found by that, also by a process that did not
//     attach it, and is never connected to anything else.
//   - Detach refuses a device that is mounted or otherwise claimed, unless it is forced to.
//
// # The caller must
//
//  1. be root, on a kernel with the nbd module;
//  2. give a dialer whose server offers what is attached, unchanged, for as long as it is attached;
//  3. call Reattach when connections are lost, for one because the server starts anew;
//  4. not attach a disk that this host's memory may have to be written to: a server that waits for memory whose dirty pages wait
//     for the server hangs with it.
//
// # Concurrency
//
// Everything is safe for concurrent use.
//
// # Format
//
// Generic netlink, family "nbd", version 1: include/uapi/linux/nbd-netlink.h of Linux. The handshake is done here,
// then the kernel has the socket.
//
// # Limits
//
// Linux 5.14 or later for identities; before, devices are not found again. The kernel's client takes simple replies
// alone, and knows no holes.
package kernel
