package regtest

import (
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"time"
)

// A Proxy is a registry elsewhere as an http.Handler, to put a Link in front
// of. It passes credentials on. Where the registry redirects a read to a blob
// store, the proxy follows by itself, so that those bytes go over the link too
// (and the redirect costs no round trip on it).
type Proxy struct {
	rp        httputil.ReverseProxy
	transport *http.Transport
	upstream  *url.URL
}

// NewProxy passes requests on to the registry at base, as in
// https://registry.example or http://127.0.0.1:5000.
func NewProxy(base string) (*Proxy, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("proxy to %q: want an http or https address", base)
	}
	p := &Proxy{upstream: u}
	p.transport = &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DisableCompression:  true,
		MaxIdleConnsPerHost: 128,
		IdleConnTimeout:     30 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
	}
	p.rp = httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = u.Host
		},
		Transport:      followReads{p.transport},
		ModifyResponse: p.rewriteLocation,
		ErrorLog:       stdlog.New(io.Discard, "", 0),
	}
	return p, nil
}

func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.rp.ServeHTTP(w, r) }

// Close closes idle connections to the registry.
func (p *Proxy) Close() error {
	p.transport.CloseIdleConnections()
	return nil
}

// rewriteLocation makes the registry's own addresses relative, so that clients
// stay on the link.
func (p *Proxy) rewriteLocation(resp *http.Response) error {
	u, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || u.Host == "" || !strings.EqualFold(u.Host, p.upstream.Host) {
		return nil
	}
	u.Scheme, u.Host = "", ""
	resp.Header.Set("Location", u.String())
	return nil
}

// followReads follows redirects of reads to other hosts, without credentials.
type followReads struct{ rt http.RoundTripper }

func (f followReads) RoundTrip(req *http.Request) (*http.Response, error) {
	for range 5 {
		resp, err := f.rt.RoundTrip(req)
		if err != nil || resp.StatusCode/100 != 3 || req.Method != http.MethodGet && req.Method != http.MethodHead {
			return resp, err
		}
		next, err := resp.Location()
		if err != nil || next.Host == req.URL.Host {
			return resp, nil
		}
		resp.Body.Close()
		req = req.Clone(req.Context())
		req.URL, req.Host = next, next.Host
		req.Header.Del("Authorization")
	}
	return nil, errors.New("more than 5 redirects")
}
