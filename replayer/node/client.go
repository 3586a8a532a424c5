package node

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
	"os"
	"slices"
	"time"
)

// A Client asks the server at a socket, and asks again when that is killed
// before it has answered. It is safe for concurrent use. Close it.
type Client struct {
	socket string
	http   *http.Client
	// lost is closed when the server will not come back; err says why.
	lost <-chan struct{}
	err  func() error
}

var _ Devices = (*Client)(nil)

// patience is how long a server may be out of reach.
const patience = 30 * time.Second

// NewClient makes a client of the server at a socket. It asks nothing yet.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return dial(socket) },
	}}
	return c
}

// NewKeptClient makes a client of a server that will not be there any more once
// ended is closed; why says for what reason.
func NewKeptClient(socket string, ended <-chan struct{}, why func() error) *Client {
	c := NewClient(socket)
	c.lost, c.err = ended, why
	return c
}

// Dial makes a client of the daemon that serves root. The error is
// os.ErrNotExist if there is none that answers.
func Dial(ctx context.Context, root string) (*Client, error) {
	path := SocketPath(root)
	if !listening(path) {
		return nil, fmt.Errorf("no daemon listens at %s: %w", path, os.ErrNotExist)
	}
	return NewClient(path), nil
}

// DialAll makes clients of the servers that answer for devices of root: the daemon
// first, if there is one, and those of a command each.
func DialAll(root string) ([]*Client, error) {
	list, err := states(root)
	if err != nil {
		return nil, err
	}
	sockets := []string{SocketPath(root)}
	for _, st := range list {
		if !slices.Contains(sockets, st.Socket) {
			sockets = append(sockets, st.Socket)
		}
	}
	var clients []*Client
	for _, path := range sockets {
		if listening(path) {
			clients = append(clients, NewClient(path))
		}
	}
	return clients, nil
}

// Close ends idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Socket is where the server is reached.
func (c *Client) Socket() string { return c.socket }

var (
	// errLost is a server that was killed before it had answered.
	errLost = errors.New("the server ended before it had answered")
	// ErrServerEnded is one that is not started again.
	ErrServerEnded = errors.New("the image's server has ended")
)

// ask makes one request, again and again until it is answered. read gets the
// body of a good answer.
func (c *Client) ask(ctx context.Context, method, path string, query url.Values, body any, read func(io.Reader) error) error {
	p, err := json.Marshal(body)
	if err != nil {
		return err
	}
	var since time.Time
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := c.once(ctx, method, path, query, p, read)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !errors.Is(err, errLost):
			return err
		}
		if since.IsZero() {
			since = time.Now()
		}
		if time.Since(since) > patience {
			return err
		}
		if e := c.pause(ctx, wait); e != nil {
			return e
		}
	}
}

func (c *Client) pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.lost:
		if err := c.err(); err != nil {
			return fmt.Errorf("%w: %w", ErrServerEnded, err)
		}
		return ErrServerEnded
	}
}

func (c *Client) once(ctx context.Context, method, path string, query url.Values, body []byte, read func(io.Reader) error) error {
	u := url.URL{Scheme: "http", Host: "reprise", Path: apiVersion + path, RawQuery: query.Encode()}
	q, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(q)
	if err != nil {
		return c.lostBy(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return read(resp.Body)
	}
	p, err := io.ReadAll(io.LimitReader(resp.Body, maxRequest))
	if err != nil {
		return c.lostBy(err)
	}
	var f failure
	if json.Unmarshal(p, &f) != nil || f.Text == "" {
		return fmt.Errorf("the server at %s answers %s: %.200s", c.socket, resp.Status, p)
	}
	return f.err()
}

func (c *Client) lostBy(err error) error { return fmt.Errorf("%w: %w", errLost, cause(err)) }

// object reads an answer that is one object.
func object(v any) func(io.Reader) error {
	return func(r io.Reader) error {
		if err := json.NewDecoder(r).Decode(v); err != nil {
			return fmt.Errorf("%w: %w", errLost, err)
		}
		return nil
	}
}

func devicePath(id, more string) string { return "/devices/" + url.PathEscape(id) + more }

// Attach implements [Devices].
func (c *Client) Attach(ctx context.Context, r *Request, say func(string)) (st *Status, err error) {
	err = c.ask(ctx, http.MethodPut, devicePath(r.ID, ""), nil, r, func(body io.Reader) error {
		lines := json.NewDecoder(body)
		for {
			var line reply
			if err := lines.Decode(&line); err != nil {
				return fmt.Errorf("%w: %w", errLost, err)
			}
			switch {
			case line.Error != nil:
				return line.Error.err()
			case line.Status != nil:
				st = line.Status
				return nil
			case say != nil:
				say(line.Log)
			}
		}
	})
	return st, err
}

// Status implements [Devices].
func (c *Client) Status(ctx context.Context, id string, trace bool) (*Status, error) {
	query := url.Values{}
	if trace {
		query.Set("trace", "1")
	}
	st := new(Status)
	err := c.ask(ctx, http.MethodGet, devicePath(id, ""), query, nil, object(st))
	return st, err
}

// Quiesce implements [Devices].
func (c *Client) Quiesce(ctx context.Context, id string, failAfter time.Duration) (*Status, error) {
	query := url.Values{}
	if failAfter > 0 {
		query.Set("fail", failAfter.String())
	}
	st := new(Status)
	err := c.ask(ctx, http.MethodPost, devicePath(id, "/quiesce"), query, nil, object(st))
	return st, err
}

// Fail implements [Devices].
func (c *Client) Fail(ctx context.Context, id string) error {
	return c.ask(ctx, http.MethodPost, devicePath(id, "/fail"), nil, nil, object(&struct{}{}))
}

// Release implements [Devices].
func (c *Client) Release(ctx context.Context, id string, lazily bool) error {
	query := url.Values{}
	if lazily {
		query.Set("detach", "1")
	}
	return c.ask(ctx, http.MethodDelete, devicePath(id, ""), query, nil, object(&struct{}{}))
}

// Lease implements [Devices].
func (c *Client) Lease(ctx context.Context, id string) error {
	for {
		err := c.ask(ctx, http.MethodGet, devicePath(id, "/lease"), nil, nil, func(r io.Reader) error {
			_, _ = io.Copy(io.Discard, r) // until the server or ctx ends
			return nil
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if err := c.pause(ctx, time.Millisecond); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// Server asks what the server is.
func (c *Client) Server(ctx context.Context) (*ServerInfo, error) {
	i := new(ServerInfo)
	err := c.ask(ctx, http.MethodGet, "/server", nil, nil, object(i))
	return i, err
}

// List asks for the devices that are attached.
func (c *Client) List(ctx context.Context) (list []Status, err error) {
	err = c.ask(ctx, http.MethodGet, "/devices", nil, nil, object(&list))
	return list, err
}

// Get asks for an object of [ServerOptions.HTTP]: path is below the version of
// the interface, "/snapshots" say.
func (c *Client) Get(ctx context.Context, path string, v any) error {
	return c.ask(ctx, http.MethodGet, path, nil, nil, object(v))
}

// Upgrade asks the server to make room for the next, and returns what it was.
func (c *Client) Upgrade(ctx context.Context, r UpgradeRequest) (*ServerInfo, error) {
	i := new(ServerInfo)
	err := c.ask(ctx, http.MethodPost, "/upgrade", nil, r, object(i))
	return i, err
}
