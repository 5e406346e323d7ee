// Package api is the control API between tidemark and tidemarkd: HTTP with
// JSON over a unix socket.
//
// It promises that the types here are what docs/cli.md documents: fields are added, never
// renamed or removed. The client's errors carry the daemon's code, see [Error].
// The caller must bound calls with a context. A Client is safe for concurrent use. Who may open
// the socket may do everything: there is no other access control.
package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/dump"
)

// ErrorTrailer is the HTTP trailer with the Error, in JSON, of an answer that
// ended early.
const ErrorTrailer = "Tidemark-Error"

// Codes of errors.
const (
	CodeBadRequest = "bad_request"
	CodeNotFound   = "not_found"    // no such group or disk
	CodeNoPoint    = "no_point"     // no such point
	CodeLabelInUse = "label_in_use" // the label names another point
	CodeNoSpace    = "no_space"
	CodeFailed     = "failed" // the group takes no writes
	CodeInternal   = "internal"
)

// Error is what the daemon answers when it can not do what it was asked.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// ErrUnreachable is wrapped when no daemon answers on the socket.
var ErrUnreachable = errors.New("tidemarkd does not answer")

// Status is the answer to GET /v1/status.
type Status struct {
	Version    string   `json:"version"`
	NBD        []string `json:"nbd"`
	StateDir   string   `json:"state_dir"`
	IndexBytes int64    `json:"index_bytes"`
	Groups     []Group  `json:"groups"`
}

// Group is a group's state.
type Group struct {
	Name         string `json:"name"`
	State        string `json:"state"` // active, full, failed
	Error        string `json:"error,omitempty"`
	Head         uint64 `json:"head"`
	Durable      uint64 `json:"durable"`
	Applied      uint64 `json:"applied"`
	Horizon      uint64 `json:"horizon"`
	JournalBytes int64  `json:"journal_bytes"`
	Unapplied    int64  `json:"unapplied_bytes"`
	Disks        []Disk `json:"disks"`
}

// Disk is a disk's state.
type Disk struct {
	Name    string `json:"name"`
	Size    int64  `json:"size"`
	Backing string `json:"backing"`
}

// Marker is the answer to POST /v1/groups/GROUP/markers, and one of Points.
type Marker struct {
	Group       string    `json:"group"`
	LSN         uint64    `json:"lsn"`
	Label       string    `json:"label"`
	Time        time.Time `json:"time"`
	Consistency string    `json:"consistency"`
	By          string    `json:"by"`
}

// MarkRequest is the body of POST /v1/groups/GROUP/markers.
type MarkRequest struct {
	Label string `json:"label"`
	By    string `json:"by"`
}

// Points is the answer to GET /v1/groups/GROUP/points.
type Points struct {
	Group   string   `json:"group"`
	Horizon uint64   `json:"horizon"`
	Durable uint64   `json:"durable"`
	Head    uint64   `json:"head"`
	Markers []Marker `json:"markers"`
}

// Resolved is the answer to GET /v1/groups/GROUP/resolve?point=POINT.
type Resolved struct {
	Group string `json:"group"`
	Point string `json:"point"`
	LSN   uint64 `json:"lsn"`
}

// Verified is the answer to POST /v1/groups/GROUP/verify.
type Verified struct {
	Group     string    `json:"group"`
	Records   int64     `json:"records"`
	Originals int64     `json:"originals"`
	Bytes     int64     `json:"bytes"`
	Versions  int64     `json:"versions"`
	Damaged   int64     `json:"damaged"`
	Findings  []Finding `json:"findings"` // the first thousand
}

// Finding is damage.
type Finding struct {
	Where string `json:"where"`
	LSN   uint64 `json:"lsn,omitempty"`
	What  string `json:"what"`
}

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

// Points asks for a group's points.
func (c *Client) Points(ctx context.Context, group string) (p Points, err error) {
	err = c.do(ctx, http.MethodGet, groupPath(group, "/points"), nil, &p)
	return p, err
}

// Resolve asks for the LSN of a point.
func (c *Client) Resolve(ctx context.Context, group, point string) (r Resolved, err error) {
	err = c.do(ctx, http.MethodGet, groupPath(group, "/resolve?point="+url.QueryEscape(point)), nil, &r)
	return r, err
}

// Verify has a group verified; it takes as long as reading all of its journal.
func (c *Client) Verify(ctx context.Context, group string) (v Verified, err error) {
	err = c.do(ctx, http.MethodPost, groupPath(group, "/verify"), nil, &v)
	return v, err
}
