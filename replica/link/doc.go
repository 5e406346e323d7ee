// Package link carries streams of package replica between daemons: connections of TLS 1.3 on which both sides prove who they are,
// the peers that a daemon trusts and what each may do, and what runs a [replica.Sender] or a [replica.Receiver] with a group's journal.
//
// # Promises
//
//   - Nobody but a peer gets farther than its first message: 4 KiB are read of who is not known, within 15 seconds, of 32 at once. A peer is known by its key, from a
//     token that people carried ([Endpoint.Invite], [Endpoint.Join]), or by a certificate of an authority that the configuration names.
//   - What a peer may send is in its [Peer]; what a stream does to a group, and what a peer is told of one, is the [Target]'s and the [History]'s to
//     allow. An Endpoint asks Offered and Asked before either.
//   - A peer that is revoked is cut off at once.
//   - A peer that is slow, silent or gone holds up nothing but its stream, which ends after 20 seconds in which nothing moved.
//     What waits to be sent is bounded.
//   - Acknowledged is what the [Target]'s Sync has made durable.
//
// # The caller must
//
//  1. call Init, and Shut when Serve has been told to end;
//  2. check in Offered whether the peer may send the group, and in Asked whether it may read it, and have one stream for a group that follows;
//  3. keep records from expiring that followers have yet to get (journal.Hold), from before Local on;
//  4. try again when a stream has ended, after a while;
//  5. give its own implementation of durable writes;
//  6. run Watch, and leave an Endpoint's fields alone after Init.
//
// Endpoints, Peers and Conns are safe for concurrent use, but for Receive.
//
// # Format
//
// TCP, TLS 1.3, and in it what replica/wire says. The fingerprint of a peer is the SHA-256 of its SubjectPublicKeyInfo; a token is specified at
// [Token.String]. Who dials says what for (wire.Role): to offer a group, to wait for an offer, to ask, to pair.
//
// # Limits
//
// A token does not outlive the daemon that gave it out, and 64 are kept. A peer has 256 connections (Endpoint.MaxConns), of which 8 wait for an offer.
package link
