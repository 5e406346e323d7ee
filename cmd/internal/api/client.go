package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"github.com/tidemark-cdp/tidemark/cmd/internal/dump"
)

// Client talks to a daemon.
type Client struct {
	path string
	http http.Client
}

// NewClient makes a client for the unix socket at path.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}
	return c
}

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 256 << 20

func (c *Client) do(ctx context.Context, method, path string, body, answer any) error {
	resp, err := c.send(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("the daemon's answer to %s: %w", path, err)
	}
	return nil
}

// send makes a call. What it answers with a body is no error.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://tidemarkd"+path, r)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w on %s (is it running? --api or TIDEMARK_API names its socket): %w", ErrUnreachable, c.path, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read the daemon's answer: %w", err)
	}
	e := &Error{Code: CodeInternal, Message: string(b)}
	_ = json.Unmarshal(b, e) // what is not JSON is told as it is
	return nil, e
}

// Dump has a group printed to w.
func (c *Client) Dump(ctx context.Context, w io.Writer, group string, o dump.Options) error {
	q := url.Values{}
	for name, on := range map[string]bool{"segments": o.Segments, "records": o.Records, "index": o.Index, "json": o.JSON} {
		q.Set(name, strconv.FormatBool(on))
	}
	resp, err := c.send(ctx, http.MethodGet, groupPath(group, "/dump?"+q.Encode()), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	if t := resp.Trailer.Get(ErrorTrailer); t != "" {
		e := &Error{}
		if err := json.Unmarshal([]byte(t), e); err != nil {
			return fmt.Errorf("the daemon's answer ended early: %s", t)
		}
		return e
	}
	return nil
}

func groupPath(group, rest string) string { return "/v1/groups/" + url.PathEscape(group) + rest }

// Status asks for the daemon's state.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	err = c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
	return s, err
}

// Mark takes a marker.
func (c *Client) Mark(ctx context.Context, group string, r MarkRequest) (m Marker, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/markers"), r, &m)
	return m, err
}

func markerPath(group, label string) string {
	return groupPath(group, "/markers/"+url.PathEscape(label))
}

// Amend changes a marker.
func (c *Client) Amend(ctx context.Context, group, label string, a Amendment) (m Marker, err error) {
	err = c.do(ctx, http.MethodPatch, markerPath(group, label), a, &m)
	return m, err
}

// Delete has a label name nothing any more. It returns what it named.
func (c *Client) Delete(ctx context.Context, group, label string) (m Marker, err error) {
	err = c.do(ctx, http.MethodDelete, markerPath(group, label), nil, &m)
	return m, err
}

// Points asks for a group's points.
func (c *Client) Points(ctx context.Context, group string, f Filter) (p Points, err error) {
	q := url.Values{}
	for name, v := range map[string]string{"since": f.Since, "until": f.Until, "label": f.Label, "consistency": f.Consistency, "by": f.By} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if f.Pinned {
		q.Set("pinned", "true")
	}
	err = c.do(ctx, http.MethodGet, groupPath(group, "/points?"+q.Encode()), nil, &p)
	return p, err
}

// Retention asks what a group keeps, and what would go. Of p, what is not empty is asked for in the stead of what is configured.
func (c *Client) Retention(ctx context.Context, group string, p url.Values) (r Retention, err error) {
	err = c.do(ctx, http.MethodGet, groupPath(group, "/retention?"+p.Encode()), nil, &r)
	return r, err
}

// Definitions asks for the definitions in force at a point.
func (c *Client) Definitions(ctx context.Context, group, point string) (d Definitions, err error) {
	err = c.do(ctx, http.MethodGet, groupPath(group, "/definitions?point="+url.QueryEscape(point)), nil, &d)
	return d, err
}

// Thaw has the guests of a group thawed.
func (c *Client) Thaw(ctx context.Context, group string) (t Thawed, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/thaw"), nil, &t)
	return t, err
}

// Rollback takes a group back to a point.
func (c *Client) Rollback(ctx context.Context, group string, r RollbackRequest) (d RolledBack, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/rollback"), r, &d)
	return d, err
}

// Scratch makes a scratch export.
func (c *Client) Scratch(ctx context.Context, r ScratchRequest) (s Scratch, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/scratches", r, &s)
	return s, err
}

// Promote begins to make a scratch export a group.
func (c *Client) Promote(ctx context.Context, name string, r PromoteRequest) (s Scratch, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/scratches/"+url.PathEscape(name)+"/promote", r, &s)
	return s, err
}

// Unexport throws a scratch export away.
func (c *Client) Unexport(ctx context.Context, name string, force bool) (s Scratch, err error) {
	err = c.do(ctx, http.MethodDelete, "/v1/scratches/"+url.PathEscape(name)+"?force="+strconv.FormatBool(force), nil, &s)
	return s, err
}

// Attach makes block devices of exports.
func (c *Client) Attach(ctx context.Context, r AttachRequest) (all []Attachment, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/attachments", r, &all)
	return all, err
}

// Detach disconnects the devices that a name means.
func (c *Client) Detach(ctx context.Context, name string, force bool) (all []Attachment, err error) {
	err = c.do(ctx, http.MethodDelete, "/v1/attachments?name="+url.QueryEscape(name)+"&force="+strconv.FormatBool(force), nil, &all)
	return all, err
}

// Peers asks for the daemons that the daemon trusts.
func (c *Client) Peers(ctx context.Context) (p Peers, err error) {
	err = c.do(ctx, http.MethodGet, "/v1/peers", nil, &p)
	return p, err
}

// Invite asks for a token that another daemon can join with.
func (c *Client) Invite(ctx context.Context, r InviteRequest) (i Invitation, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/peers/invitations", r, &i)
	return i, err
}

// Join makes a daemon that gave out a token a peer.
func (c *Client) Join(ctx context.Context, r JoinRequest) (p Peer, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/peers", r, &p)
	return p, err
}

// Revoke takes a peer's trust back.
func (c *Client) Revoke(ctx context.Context, name string) (p Peer, err error) {
	err = c.do(ctx, http.MethodDelete, "/v1/peers/"+url.PathEscape(name), nil, &p)
	return p, err
}

// Failover has the daemon write a group that follows.
func (c *Client) Failover(ctx context.Context, group string, r FailoverRequest) (f FailedOver, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/failover"), r, &f)
	return f, err
}

// Accept allows the writer of a group, once, to have what is here dropped.
func (c *Client) Accept(ctx context.Context, group string, r AcceptRequest) (a Accepted, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/accept"), r, &a)
	return a, err
}

// Failback has the writer of a group hand it over to the daemon.
func (c *Client) Failback(ctx context.Context, group string) (f FailedOver, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/failback"), nil, &f)
	return f, err
}

// Reload has the configuration read again.
func (c *Client) Reload(ctx context.Context) (r Reloaded, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/reload", nil, &r)
	return r, err
}

// Resolve asks for the LSN of a point.
func (c *Client) Resolve(ctx context.Context, group, point string) (r Resolved, err error) {
	err = c.do(ctx, http.MethodGet, groupPath(group, "/resolve?point="+url.QueryEscape(point)), nil, &r)
	return r, err
}

// Verify has a group verified, and, with repair, what is damaged mended; it takes as long as reading all of its journal, with repair several times.
func (c *Client) Verify(ctx context.Context, group string, repair bool) (v Verified, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/verify?repair="+strconv.FormatBool(repair)), nil, &v)
	return v, err
}

// VerifyIndex has the files of the index verified.
func (c *Client) VerifyIndex(ctx context.Context) (v VerifiedIndex, err error) {
	err = c.do(ctx, http.MethodPost, "/v1/index/verify", nil, &v)
	return v, err
}

// Compare compares a group's disks with those of another daemon, or of all that have them.
func (c *Client) Compare(ctx context.Context, group, point, peer string) (a Comparison, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/compare?point="+url.QueryEscape(point)+"&peer="+url.QueryEscape(peer)), nil, &a)
	return a, err
}
