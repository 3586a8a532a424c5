package registry

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// ErrNoRanges is the error of a ranged read where the registry answers with the
// whole blob and the range starts too far into it.
var ErrNoRanges = errors.New("the server does not do ranges")

// An Error is a request that failed. It matches, with errors.Is:
//
//   - 401: errdefs.ErrUnauthenticated; 403: errdefs.ErrPermissionDenied
//   - 404: os.ErrNotExist and errdefs.ErrNotFound
//   - 405, 501: errors.ErrUnsupported
//   - 408, 429, 5xx, and no answer at all: errdefs.ErrUnavailable
type Error struct {
	Method   string
	Registry string // as in the reference
	Host     string // the one that was asked: a mirror, or the registry itself
	Path     string // of the request, with repository and digest or tag
	Status   int    // 0: there was no answer
	Message  string // what the registry said, if anything
	Err      error  // the cause where there was no (usable) answer

	retryAfter time.Duration // -1: not said
	object     string        // REPOSITORY@DIGEST or REPOSITORY:TAG
	own        bool          // refused were the repository's own credentials, and Docker's too
}

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "registry %s: %s", e.Registry, e.object)
	if e.Host != e.Registry {
		fmt.Fprintf(&b, " (at %s)", e.Host)
	}
	fmt.Fprintf(&b, ": %s: ", strings.ToLower(e.Method))
	switch {
	case e.Status == 0 && e.Err != nil:
		b.WriteString(e.Err.Error())
	default:
		fmt.Fprintf(&b, "%d %s", e.Status, strings.ToLower(http.StatusText(e.Status)))
		if e.Message != "" {
			fmt.Fprintf(&b, ": %s", e.Message)
		}
		if e.Err != nil {
			fmt.Fprintf(&b, ": %v", e.Err)
		}
	}
	if hint := e.hint(); hint != "" {
		fmt.Fprintf(&b, " (%s)", hint)
	}
	return b.String()
}

// hint says what to do.
func (e *Error) hint() string {
	switch {
	case e.own:
		return "the repository's own credentials are refused, and so are Docker's: pull the image again with such as are good"
	case e.Status == http.StatusUnauthorized:
		return fmt.Sprintf("check the name, or run `docker login %s`", e.Registry)
	case e.Status == http.StatusForbidden:
		return fmt.Sprintf("check the name, or ask for access and run `docker login %s`", e.Registry)
	case e.Status == http.StatusTooManyRequests:
		return fmt.Sprintf("the registry limits requests: try later, or run `docker login %s` for a higher limit", e.Registry)
	case e.Status == http.StatusMethodNotAllowed && e.Method == http.MethodDelete:
		return "the registry does not allow deletes: enable them there"
	case isPlainHTTPAnswer(e.Err):
		return "the registry speaks plain HTTP: use --plain-http, or say so in hosts.toml"
	case isCertificate(e.Err):
		return fmt.Sprintf("put the registry's CA under certs.d/%s", e.Registry)
	}
	return ""
}

// Unwrap gives the cause, and the sentinels listed at Error.
func (e *Error) Unwrap() []error {
	var errs []error
	switch {
	case e.Status == http.StatusUnauthorized:
		errs = append(errs, errdefs.ErrUnauthenticated)
	case e.Status == http.StatusForbidden:
		errs = append(errs, errdefs.ErrPermissionDenied)
	case e.Status == http.StatusNotFound:
		errs = append(errs, os.ErrNotExist, errdefs.ErrNotFound)
	case e.Status == http.StatusMethodNotAllowed, e.Status == http.StatusNotImplemented:
		errs = append(errs, errors.ErrUnsupported)
	case e.transient():
		errs = append(errs, errdefs.ErrUnavailable)
	}
	if e.Err != nil {
		errs = append(errs, e.Err)
	}
	return errs
}

// transient says whether the same request may well succeed a little later.
func (e *Error) transient() bool {
	switch e.Status {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests,
		http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	case 0:
		return transientCause(e.Err)
	}
	return false
}

// Permanent says that the registry has answered, and will answer so again.
// Whoever has the patience to wait for a registry that is away need not wait
// for this one.
func (e *Error) Permanent() bool {
	var final *finalError
	return errors.As(e.Err, &final) || errors.Is(e.Err, ErrNoRanges) || e.Status >= 400 && !e.transient()
}

func transientCause(err error) bool {
	var (
		final    *finalError
		patience *patienceError
		dns      *net.DNSError
	)
	switch {
	case err == nil, errors.As(err, &final), errors.As(err, &patience):
		return false
	case isCertificate(err), isPlainHTTPAnswer(err):
		return false
	case errors.As(err, &dns) && dns.IsNotFound:
		return false
	}
	return true
}

func isTransient(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.transient()
}

// unreachable says that a host gave no answer at all, so that others are better
// asked first for a while.
func (e *Error) unreachable() bool {
	var op *net.OpError
	return e.Status == 0 && (errors.As(e.Err, &op) && op.Op == "dial" || isCertificate(e.Err))
}

// Answered says that a host of the registry was reached, though it did not give
// what was asked for.
func (e *Error) Answered() bool {
	var patience *patienceError
	return e.Status != 0 || errors.As(e.Err, &patience)
}

// RetryAfter is how long the host has asked to be left alone, 0 if it has not.
func (e *Error) RetryAfter() time.Duration {
	var patience *patienceError
	if errors.As(e.Err, &patience) {
		return patience.after
	}
	return max(0, e.retryAfter)
}

// A patienceError is a request that was not sent, since the host has asked for
// patience. It is nothing permanent, but nothing to be tried again soon.
type patienceError struct {
	host  string
	after time.Duration
}

func (e *patienceError) Error() string {
	return fmt.Sprintf("%s asks to wait %v: try again then", e.host, e.after.Round(time.Second))
}

func (e *patienceError) Unwrap() error { return errdefs.ErrUnavailable }

// A finalError is an answer that will not get better by asking this host again.
type finalError struct{ err error }

func (e *finalError) Error() string { return e.err.Error() }
func (e *finalError) Unwrap() error { return e.err }

func finalf(format string, args ...any) error {
	return &finalError{fmt.Errorf(format, args...)}
}

func isCertificate(err error) bool {
	var (
		verify    *tls.CertificateVerificationError
		authority x509.UnknownAuthorityError
		name      x509.HostnameError
	)
	return errors.As(err, &verify) || errors.As(err, &authority) || errors.As(err, &name)
}

// isPlainHTTPAnswer recognises a plain HTTP server behind an https address.
func isPlainHTTPAnswer(err error) bool {
	var rec tls.RecordHeaderError
	if errors.As(err, &rec) {
		return string(rec.RecordHeader[:]) == "HTTP/"
	}
	return err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client")
}

// maxErrorBody bounds what is read of an error's body.
const maxErrorBody = 16 << 10

// statusError consumes resp.
func (q *request) statusError(h *host, resp *http.Response, now time.Time) *Error {
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	e := q.error(h, nil)
	e.Status = resp.StatusCode
	e.Message = errorMessage(body)
	e.retryAfter = retryAfter(resp.Header, now)
	return e
}

// error is a request that got no usable answer.
func (q *request) error(h *host, cause error) *Error {
	e := &Error{
		Method:     q.method,
		Registry:   q.ref.Registry,
		Path:       q.path,
		Err:        cause,
		retryAfter: -1,
		object:     q.object,
	}
	if h != nil {
		e.Host = h.name
	} else {
		e.Host = e.Registry
	}
	return e
}

// asError makes err the failure of q at h, unless it says all that itself.
func (q *request) asError(h *host, err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return q.error(h, err)
}

// authorizeError is the failure to get a token. A refusal of the token server
// is the registry's own.
func (q *request) authorizeError(h *host, err error) error {
	e := q.error(h, err)
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		switch status.StatusCode {
		case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
			e.Status = http.StatusUnauthorized
		}
	}
	return e
}

// errorMessage is the registry's own words, shortened: the messages of the
// spec's JSON, else the text's beginning. Text from outside goes to terminals,
// so it is quoted where it holds anything unprintable.
func errorMessage(body []byte) string {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	var parts []string
	if json.Unmarshal(body, &doc) == nil {
		for _, e := range doc.Errors {
			parts = append(parts, strings.TrimSpace(e.Code+" "+e.Message))
		}
	} else if s := strings.TrimSpace(string(body)); !strings.HasPrefix(s, "<") {
		parts = append(parts, s)
	}
	s := strings.Join(parts, "; ")
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "") + "…"
	}
	if q := strconv.Quote(s); len(q) != len(s)+2 && strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return q
	}
	return s
}

// retryAfter reads the header of that name, in seconds or as a date; -1 without.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if v == "" {
		return -1
	}
	if s, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(s) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, t.Sub(now))
	}
	return -1
}
