package regtest

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseLink(t *testing.T) {
	good := []struct {
		in   string
		want LinkSpec
		out  string
	}{
		{"10ms,200mbit", LinkSpec{Delay: 10 * time.Millisecond, Rate: 200e6}, ""},
		{"0s,unlimited", LinkSpec{}, ""},
		{"0,1gbit", LinkSpec{Rate: 1e9}, "0s,1gbit"},
		{"30ms,1.5gbit", LinkSpec{Delay: 30 * time.Millisecond, Rate: 15e8}, "30ms,1500mbit"},
		{"1ms,64kbit,stall=0.1,reset=1e-3,429=60/min",
			LinkSpec{Delay: time.Millisecond, Rate: 64e3, Stall: 0.1, Reset: 0.001, PerMinute: 60},
			"1ms,64kbit,stall=0.1,reset=0.001,429=60/min"},
		{"1ms,7bit,429=1/min,stall=0", LinkSpec{Delay: time.Millisecond, Rate: 7, PerMinute: 1}, "1ms,7bit,429=1/min"},
	}
	for _, c := range good {
		got, err := ParseLink(c.in)
		require.NoError(t, err, c.in)
		require.Equal(t, c.want, got, c.in)
		if c.out == "" {
			c.out = c.in
		}
		require.Equal(t, c.out, got.String())
	}
	bad := []string{
		"", "10ms", "200mbit,10ms", "10,200mbit", "-1ms,1mbit", "2h,1mbit", "1ms,0mbit", "1ms,-1mbit", "1ms,1",
		"1ms,NaNmbit", "1ms,Infgbit", "1ms,1e9gbit", "1ms,mbit", "1ms,1mbit,", "1ms,1mbit,stall", "1ms,1mbit,stall=2",
		"1ms,1mbit,stall=NaN", "1ms,1mbit,stall=0.1,stall=0.1", "1ms,1mbit,429=5", "1ms,1mbit,429=0/min",
		"1ms,1mbit,429=-1/min", "1ms,1mbit,loss=0.1",
	}
	for _, in := range bad {
		_, err := ParseLink(in)
		require.Error(t, err, in)
	}
}

func FuzzParseLink(f *testing.F) {
	f.Add("10ms,200mbit")
	f.Add("30ms,1.5gbit,stall=0.01,reset=0.02,429=100/min")
	f.Add("0s,unlimited")
	f.Fuzz(func(t *testing.T, s string) {
		spec, err := ParseLink(s)
		if err != nil {
			return
		}
		again, err := ParseLink(spec.String())
		if err != nil || again != spec {
			t.Fatalf("%q → %+v → %q → %+v, %v", s, spec, spec.String(), again, err)
		}
	})
}

// body is a handler with that many bytes.
func body(n int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, n))
	})
}

// near is within 1 %.
func near(t *testing.T, want, got time.Duration) {
	t.Helper()
	require.InEpsilon(t, float64(want), float64(got), 0.01)
}

// In a synctest bubble a timer is never late and computing takes no time, so
// these are exact statements about the schedule.
func TestLinkSchedule(t *testing.T) {
	const mib = 1 << 20
	for _, spec := range []string{"10ms,200mbit", "10ms,2gbit", "0s,7mbit", "50ms,unlimited"} {
		t.Run(spec, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := ParseLink(spec)
				require.NoError(t, err)
				l := NewLink(s, body(8*mib))
				want := s.Delay
				if s.Rate > 0 {
					want += time.Duration(float64(8*mib*8) / float64(s.Rate) * 1e9)
				}
				for range 3 {
					start := time.Now()
					l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/v2/a/blobs/x", nil))
					near(t, want, time.Since(start))
				}
			})
		})
	}
}

func TestLinkSmallAnswerIsNotFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(LinkSpec{Delay: 10 * time.Millisecond, Rate: 200e6}, body(64<<10))
		start := time.Now()
		l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
		near(t, 10*time.Millisecond+64<<10*8*time.Second/200e6, time.Since(start))
	})
}

func TestLinkSharesRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 1 << 20
		l := NewLink(LinkSpec{Rate: 100e6}, body(n))
		one := time.Duration(n * 8 * 10) // ns at 100 Mbit/s
		var (
			wg   sync.WaitGroup
			took [4]time.Duration
		)
		start := time.Now()
		for i := range took {
			wg.Go(func() {
				l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
				took[i] = time.Since(start)
			})
		}
		wg.Wait()
		near(t, 4*one, time.Since(start))
		for _, d := range took {
			require.Greater(t, d, 4*one*95/100, "equal shares end at the same time")
		}
	})
}

// A sender that is late by a little catches up; one that its client kept
// waiting does not.
func TestSenderCatchesUpOnlyWithSlack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pacer{rate: 8 * quantum * 1000} // a quantum each millisecond
		s := &sender{p: p, ctx: t.Context(), due: time.Now()}
		start := time.Now()
		for range 10 {
			require.NoError(t, s.wait(quantum))
			time.Sleep(600 * time.Microsecond)
		}
		require.Equal(t, 10*time.Millisecond+600*time.Microsecond, time.Since(start))
		time.Sleep(time.Second)
		start = time.Now()
		for range 10 {
			require.NoError(t, s.wait(quantum))
		}
		require.Equal(t, 10*time.Millisecond-slack, time.Since(start))
	})
}

func TestLinkShapesUploads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(LinkSpec{Delay: 5 * time.Millisecond, Rate: 80e6}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n, err := io.Copy(io.Discard, r.Body)
			require.NoError(t, err)
			require.EqualValues(t, 1<<20, n)
		}))
		start := time.Now()
		l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("PUT", "/", bytes.NewReader(make([]byte, 1<<20))))
		near(t, 5*time.Millisecond+(1<<20)*100, time.Since(start))
		require.EqualValues(t, 1<<20, l.Stats().BytesReceived)
	})
}

func TestLinkNewConnectionCostsARoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(LinkSpec{Delay: 10 * time.Millisecond}, body(1))
		ctx := l.ConnContext(t.Context(), nil)
		for _, want := range []time.Duration{20, 10, 10} {
			start := time.Now()
			l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil).WithContext(ctx))
			require.Equal(t, want*time.Millisecond, time.Since(start))
		}
		require.EqualValues(t, 1, l.Stats().NewConns)
	})
}

// A handshake takes its round trip whether or not a request waits for its end.
func TestLinkConnectionOpenedAhead(t *testing.T) {
	const ms = time.Millisecond
	for _, tt := range []struct{ ahead, first time.Duration }{{0, 20 * ms}, {4 * ms, 16 * ms}, {10 * ms, 10 * ms}, {time.Second, 10 * ms}} {
		synctest.Test(t, func(t *testing.T) {
			l := NewLink(LinkSpec{Delay: 10 * ms}, body(1))
			ctx := l.ConnContext(t.Context(), nil)
			time.Sleep(tt.ahead)
			for _, want := range []time.Duration{tt.first, 10 * ms} {
				start := time.Now()
				l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil).WithContext(ctx))
				require.Equal(t, want, time.Since(start))
			}
			log := l.Stats().Log
			require.Equal(t, tt.first-10*ms, log[0].Waited)
			require.Zero(t, log[1].Waited)
		})
	}
	l := NewLink(LinkSpec{}, body(1))
	l.ConnContext(t.Context(), nil)
	s := l.Stats()
	require.Zero(t, s.NewConns, "it has carried nothing yet")
	require.EqualValues(t, 1, s.Conns)
}

func TestLinkLimitsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(LinkSpec{PerMinute: 3}, body(1))
		ask := func() *http.Response {
			w := httptest.NewRecorder()
			l.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
			return w.Result()
		}
		for range 3 {
			require.Equal(t, 200, ask().StatusCode)
		}
		r := ask()
		require.Equal(t, 429, r.StatusCode)
		require.Equal(t, "20", r.Header.Get("Retry-After"))
		time.Sleep(20 * time.Second)
		require.Equal(t, 200, ask().StatusCode)
		require.Equal(t, 429, ask().StatusCode)
	})
}

func TestSerialTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLink(LinkSpec{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			d, _ := time.ParseDuration(r.URL.Query().Get("d"))
			time.Sleep(d)
		}))
		var wg sync.WaitGroup
		for at, d := range map[time.Duration]string{0: "10ms", 4 * time.Millisecond: "2ms", 20 * time.Millisecond: "5ms"} {
			wg.Go(func() {
				time.Sleep(at)
				l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/v2/a/blobs/sha256:1?d="+d, nil))
			})
		}
		wg.Wait()
		s := l.Stats()
		require.Equal(t, 5*time.Millisecond, s.SerialTime)
		require.Equal(t, 4*time.Millisecond+4*time.Millisecond+5*time.Millisecond, s.SerialTotal)
		require.Equal(t, map[string]int{"blob": 3}, s.ByKind)
		require.Len(t, s.Log, 3)
		l.Reset()
		require.Zero(t, l.Stats().Requests)
	})
}

func TestKind(t *testing.T) {
	for in, want := range map[string]string{
		"GET /v2/": "ping", "GET /v2": "ping", "GET /": "other", "GET /v2/a/b/manifests/latest": "tag",
		"HEAD /v2/a/manifests/sha256:12": "manifest", "GET /v2/a/b/blobs/sha256:12": "blob",
		"GET /v2/a/referrers/sha256:12": "referrers", "POST /v2/a/blobs/uploads/": "push", "GET /v2/a/blobs/uploads/7": "push",
		"PUT /v2/a/manifests/x": "push", "GET /v2/a/tags/list": "other",
	} {
		method, path, _ := strings.Cut(in, " ")
		require.Equal(t, want, kind(method, path), in)
	}
}

// serve starts a link on the loopback interface, and gives it a client that
// keeps no connections.
func serve(t *testing.T, l http.Handler) (*Server, *http.Client) {
	t.Helper()
	s, err := Start(context.Background(), l)
	require.NoError(t, err)
	tr := &http.Transport{DisableCompression: true}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		require.NoError(t, s.Close())
	})
	return s, &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func TestFaults(t *testing.T) {
	const n = 100_000
	content := bytes.Repeat([]byte("0123456789"), n/10)
	l := NewLink(LinkSpec{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}))
	s, client := serve(t, l)
	get := func(f Fault) (*http.Response, []byte, error) {
		l.SetFault(func(*http.Request) *Fault { return &f })
		req, _ := http.NewRequest("GET", s.URL()+"/", nil)
		req.Header.Set("Range", "bytes=10-")
		resp, err := client.Do(req)
		if err != nil {
			return nil, nil, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp, b, err
	}
	resp, b, err := get(Fault{})
	require.NoError(t, err)
	require.Equal(t, 206, resp.StatusCode)
	require.Equal(t, content[10:], b)

	resp, b, err = get(Fault{Status: 307, Header: http.Header{"Location": {"http://elsewhere/"}}, Body: "there"})
	require.NoError(t, err)
	require.Equal(t, 307, resp.StatusCode)
	require.Equal(t, "http://elsewhere/", resp.Header.Get("Location"))
	require.Equal(t, "there", string(b))

	resp, b, err = get(Fault{IgnoreRange: true})
	require.NoError(t, err)
	require.Equal(t, 200, resp.StatusCode)
	require.Equal(t, content, b)

	_, b, err = get(Fault{Corrupt: true})
	require.NoError(t, err)
	require.Equal(t, ^content[10], b[0])

	_, b, err = get(Fault{Cut: true, CutAt: 50_000})
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Len(t, b, 50_000)

	_, _, err = get(Fault{Reset: true})
	require.Error(t, err)
	_, _, err = get(Fault{Reset: true, ResetHalf: true})
	require.Error(t, err)

	resp, b, err = get(Fault{Stall: time.Millisecond, StallHalf: true})
	require.NoError(t, err)
	require.Equal(t, content[10:], b)
	require.Equal(t, "bytes 10-99999/100000", resp.Header.Get("Content-Range"))

	resp, _, err = get(Fault{Header: http.Header{"Content-Range": {"bytes 0-1/2"}}})
	require.NoError(t, err)
	require.Equal(t, "bytes 0-1/2", resp.Header.Get("Content-Range"))
}

// A client that stops reading soon stops asking for the link's rate.
func TestPausedClientHoldsLittle(t *testing.T) {
	l := NewLink(LinkSpec{}, body(64<<20))
	s, client := serve(t, l)
	client.Transport.(*http.Transport).MaxIdleConnsPerHost = -1
	resp, err := client.Get(s.URL())
	require.NoError(t, err)
	last, same := int64(-1), 0
	for same < 20 { // until nothing more is sent
		time.Sleep(time.Millisecond)
		if sent := l.Stats().BytesSent; sent == last {
			same++
		} else {
			last, same = sent, 0
		}
	}
	require.NoError(t, resp.Body.Close())
	t.Logf("%d KiB sent to a client that reads nothing", last>>10)
	require.Less(t, last, int64(48<<20))
}

func TestServerCloseEndsHandlers(t *testing.T) {
	l := NewLink(LinkSpec{Delay: time.Minute}, body(1))
	s, client := serve(t, l)
	done := make(chan error)
	go func() {
		_, err := client.Get(s.URL())
		done <- err
	}()
	for l.Stats().Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	require.NoError(t, s.Close())
	require.Error(t, <-done)
	require.NoError(t, s.Close())
}

// What a late timer has held up is made up for, however much it is.
func TestSenderCatchesUpWithTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s := &sender{p: &pacer{rate: 8 * quantum * 1000}, ctx: t.Context(), due: start}
		time.Sleep(50 * time.Millisecond)
		s.credit = 50 * time.Millisecond // as sleep leaves it
		for range 70 {
			require.NoError(t, s.wait(quantum))
		}
		require.Equal(t, 70*time.Millisecond, time.Since(start))
	})
}
