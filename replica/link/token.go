package link

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// Token is what one daemon gives to another, by way of people, so that each knows the other: whose key it is to find, and what
// shows that it was invited.
type Token struct {
	Fingerprint Fingerprint
	Secret      [wire.SecretSize]byte
}

const tokenPrefix = "tidemark-"

var tokenText = base32.StdEncoding.WithPadding(base32.NoPadding)

// String is the token as people carry it: the prefix, then base32 of fingerprint, secret and the first four bytes of their SHA-256.
func (t Token) String() string {
	b := append(append([]byte(nil), t.Fingerprint[:]...), t.Secret[:]...)
	sum := sha256.Sum256(b)
	return tokenPrefix + strings.ToLower(tokenText.EncodeToString(append(b, sum[:4]...)))
}

// ParseToken reads a token.
func ParseToken(s string) (t Token, err error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), tokenPrefix)
	b, err := tokenText.DecodeString(strings.ToUpper(rest))
	if !ok || err != nil || len(b) != len(t.Fingerprint)+len(t.Secret)+4 {
		return t, errors.New("this is no token: it begins with " + tokenPrefix + " and is printed by: tidemark replica invite")
	}
	n := len(b) - 4
	if sum := sha256.Sum256(b[:n]); string(sum[:4]) != string(b[n:]) {
		return t, errors.New("the token was not copied whole, or has a wrong character")
	}
	copy(t.Fingerprint[:], b)
	copy(t.Secret[:], b[len(t.Fingerprint):])
	return t, nil
}

// invitations are tokens that were given out. They do not outlive the daemon.
type invitations struct {
	mu  sync.Mutex
	all []invitation
}

type invitation struct {
	secret  [wire.SecretSize]byte
	peer    Peer // what it will be
	expires time.Time
}

// maxInvitations bounds how many tokens are valid at once.
const maxInvitations = 64

func (in *invitations) add(p Peer, expires time.Time) (secret [wire.SecretSize]byte, err error) {
	if _, err := rand.Read(secret[:]); err != nil {
		return secret, fmt.Errorf("draw a token: %w", err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.dropLocked(time.Now())
	if len(in.all) >= maxInvitations {
		return secret, fmt.Errorf("%d tokens are waiting to be used: let them expire", len(in.all))
	}
	in.all = append(in.all, invitation{secret, p, expires})
	return secret, nil
}

func (in *invitations) dropLocked(now time.Time) {
	kept := in.all[:0]
	for _, i := range in.all {
		if now.Before(i.expires) {
			kept = append(kept, i)
		}
	}
	in.all = kept
}

// take uses an invitation up.
func (in *invitations) take(secret [wire.SecretSize]byte) (Peer, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.dropLocked(time.Now())
	for i, one := range in.all {
		if subtle.ConstantTimeCompare(one.secret[:], secret[:]) == 1 {
			in.all = append(in.all[:i], in.all[i+1:]...)
			return one.peer, nil
		}
	}
	return Peer{}, errors.New("the token is wrong, was used, or has expired: invite again")
}
