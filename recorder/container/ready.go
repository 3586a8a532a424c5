package container

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// How often it is looked again.
const (
	pollHTTP = 5 * time.Millisecond
	pollExec = 50 * time.Millisecond // after the end of the last attempt
)

// want says what is waited for, as in "before ...".
func (r *Ready) want() string {
	switch {
	case r.Port != 0:
		return fmt.Sprintf("it listened on port %d", r.Port)
	case r.Log != nil:
		return fmt.Sprintf("a line of its output matched %q", r.Log)
	case r.HTTP != "":
		return fmt.Sprintf("GET %s answered 2xx or 3xx", r.HTTP)
	case len(r.Exec) > 0:
		return fmt.Sprintf("%q in it exited with status 0", r.Exec)
	case r.Exit:
		return "it exited with status 0"
	}
	return "it listened on a port or exited with status 0"
}

// check refuses what can never tell that the container is ready.
func (r *Ready) check(network Network) error {
	set := 0
	for _, is := range []bool{r.Port != 0, r.Log != nil, r.HTTP != "", len(r.Exec) > 0, r.Exit} {
		if is {
			set++
		}
	}
	if set > 1 {
		return errors.New("ready: give only one of port, log, http, exec and exit")
	}
	port := r.Port
	if r.HTTP != "" {
		var err error
		if port, err = checkURL(r.HTTP, network); err != nil {
			return fmt.Errorf("ready: %w", err)
		}
	}
	if port < 0 || port > 65535 {
		return fmt.Errorf("ready: port %d: give one from 1 to 65535", port)
	}
	if port == 0 || network != HostNetwork {
		return nil
	}
	return checkFree(port)
}

// checkURL gives the port that a GET of the URL goes to, 0 if that is on another
// machine.
func checkURL(s string, network Network) (int, error) {
	u, err := url.Parse(s)
	if err != nil {
		return 0, err
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return 0, fmt.Errorf("%q: give a URL such as http://127.0.0.1:8080/", s)
	}
	addr, err := netip.ParseAddr(u.Hostname())
	local := u.Hostname() == "localhost" || err == nil && addr.IsLoopback()
	if !local && network == OwnNetwork {
		return 0, fmt.Errorf("%q: a container with a network of its own is reached at 127.0.0.1, ::1 or localhost", s)
	}
	if !local {
		return 0, nil
	}
	switch {
	case u.Port() != "":
		return strconv.Atoi(u.Port())
	case u.Scheme == "https":
		return 443, nil
	}
	return 80, nil
}

// checkFree is an error if somebody listens on the port before the container
// has been started: one could not tell the two apart.
func checkFree(port int) error {
	p, err := newPortProbe("", "")
	if err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	defer p.close()
	list, err := p.list()
	if err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	for _, l := range list {
		if l.port == port {
			return fmt.Errorf("ready: port %d: another process listens on it already: stop that one, or use another port or network %s", port, OwnNetwork)
		}
	}
	return nil
}

// attach takes note of the running container's process.
func (c *Container) attach(network Network) {
	s := c.stage
	s.mu.Lock()
	pid, pidfd := s.pid, s.pidfd
	s.mu.Unlock()
	c.host, c.network = pidOf(pidfd), network
	c.proc = fmt.Sprintf("/proc/%d/root/proc/%d", s.Pid(), pid)
}

// auto says that no way of telling readiness was given.
func (c *Container) auto() bool {
	r := &c.ready
	return r.Port == 0 && r.Log == nil && r.HTTP == "" && len(r.Exec) == 0 && !r.Exit
}

// seen takes note of the first line that matches.
func (c *Container) seen(at time.Time) {
	c.logOnce.Do(func() {
		c.logTime = at
		close(c.logged)
	})
}

// Told says that Listens will be told of every socket on which a process of the
// container begins to listen, so that it need not be looked for often.
func (c *Container) Told() { c.told.Store(true) }

// Listens says that a process of the container began, at that moment, to listen on
// a TCP port; 0 is a port that is not known.
func (c *Container) Listens(port int, at time.Time) {
	if !c.auto() && (c.ready.Port == 0 || c.ready.Port != port) {
		return
	}
	c.heardOnce.Do(func() {
		c.heardTime, c.heardPort = at, port
		close(c.heard)
	})
}

// How says what WaitReady has seen, once it has: "port 8080", "exit 0".
func (c *Container) How() string { return c.how }

// rule says in words what was asked to be waited for.
func (r *Ready) rule() string {
	switch {
	case r.Log != nil:
		return fmt.Sprintf("log %q", r.Log)
	case r.HTTP != "":
		return "http " + r.HTTP
	case len(r.Exec) > 0:
		return fmt.Sprintf("exec %q", r.Exec)
	}
	return "exit 0"
}

func listensOn(port int) string {
	if port == 0 {
		return "listens on a port"
	}
	return "port " + strconv.Itoa(port)
}

// WaitReady waits until the container is ready and returns when that was. A
// container that ends first is an *ExitedError. It is called once.
func (c *Container) WaitReady(ctx context.Context) (time.Time, error) {
	c.how = c.ready.rule()
	switch r := &c.ready; {
	case r.Log != nil:
		return c.waitLog(ctx)
	case r.Exit:
		return c.waitExit(ctx)
	case r.HTTP != "":
		return c.waitHTTP(ctx)
	case len(r.Exec) > 0:
		return c.poll(ctx, pollExec, c.tryExec)
	}
	return c.waitPort(ctx)
}

func (c *Container) waitLog(ctx context.Context) (time.Time, error) {
	select {
	case <-c.logged:
		return c.logTime, nil
	case <-ctx.Done():
		return time.Time{}, c.inVain(ctx, "")
	case <-c.stage.exited: // and all output has been seen
	}
	select {
	case <-c.logged:
		return c.logTime, nil
	default:
		return c.exit(false)
	}
}

func (c *Container) waitExit(ctx context.Context) (time.Time, error) {
	select {
	case <-c.stage.exited:
		return c.exit(true)
	case <-ctx.Done():
		return time.Time{}, c.inVain(ctx, "")
	}
}

func (c *Container) waitPort(ctx context.Context) (time.Time, error) {
	ports, err := c.probePorts()
	if err != nil { // the container is gone already, or there is no way to look
		select {
		case <-c.stage.exited:
			return c.exit(c.auto())
		case <-c.heard:
			c.how = listensOn(c.heardPort)
			return c.heardTime, nil
		case <-ctx.Done():
			return time.Time{}, c.inVain(ctx, err.Error())
		}
	}
	defer ports.close()
	every := ports.every
	if c.told.Load() {
		every = pollTold
	}
	return c.poll(ctx, every, func(context.Context) (bool, string) {
		on, ok, err := ports.listens(c.ready.Port)
		if err != nil {
			return false, err.Error()
		}
		if ok {
			c.how = listensOn(on)
		}
		return ok, ""
	})
}

// probePorts looks into the container's network.
func (c *Container) probePorts() (*portProbe, error) {
	if c.network == OwnNetwork {
		return newPortProbe(c.proc, "")
	}
	return newPortProbe("", filepath.Dir(c.proc))
}

func (c *Container) tryExec(ctx context.Context) (bool, string) {
	r, err := c.stage.run(ctx, c.ready.Exec)
	if err != nil {
		return false, ""
	}
	return r.Status == 0, fmt.Sprintf("last status %d: %s", r.Status, r.Text)
}

func (c *Container) waitHTTP(ctx context.Context) (time.Time, error) {
	t := &http.Transport{DisableKeepAlives: true, DialContext: c.dial}
	defer t.CloseIdleConnections()
	client := &http.Client{
		Transport:     t,
		Timeout:       30 * time.Second, // then the next request may have more luck
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c.poll(ctx, pollHTTP, func(ctx context.Context) (bool, string) {
		ctx, cancel := c.untilExit(ctx)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.ready.HTTP, nil)
		if err != nil {
			return false, err.Error()
		}
		resp, err := client.Do(req)
		if err != nil {
			return false, err.Error()
		}
		_ = resp.Body.Close()
		return resp.StatusCode >= 200 && resp.StatusCode < 400, "last answer " + resp.Status
	})
}

// untilExit gives a context that ends with the container too: a request to a
// server that is gone may hang.
func (c *Container) untilExit(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-c.stage.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel()
		<-watched
	}
}

// poll tries until it is so, the container ends, or ctx does.
func (c *Container) poll(ctx context.Context, every time.Duration, try func(context.Context) (bool, string)) (time.Time, error) {
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		ok, detail := try(ctx)
		if ok {
			return time.Now(), nil
		}
		timer.Reset(every)
		select {
		case <-c.heard:
			c.how = listensOn(c.heardPort)
			return c.heardTime, nil
		case <-c.stage.exited:
			return c.exit(c.auto())
		case <-ctx.Done():
			return time.Time{}, c.inVain(ctx, detail)
		case <-timer.C:
		}
	}
}

// exit judges the end of the container: a good one is ready if fine says so.
func (c *Container) exit(fine bool) (time.Time, error) {
	status, err := c.stage.exitStatus()
	if err != nil {
		return time.Time{}, fmt.Errorf("not ready: %w", err)
	}
	if fine && status == 0 {
		return c.Timeline().Exited, nil
	}
	return time.Time{}, &ExitedError{Status: status, Want: c.ready.want()}
}

// inVain is the error of a wait that was given up.
func (c *Container) inVain(ctx context.Context, detail string) error {
	if detail != "" {
		detail = " (" + detail + ")"
	}
	err := context.Cause(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: out of time", os.ErrDeadlineExceeded)
	}
	return fmt.Errorf("not ready: the wait ended before %s%s: %w", c.ready.want(), detail, err)
}
