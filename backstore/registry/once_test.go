package registry

import (
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// once reads with FetchOnce.
func once(t *testing.T, b *Blob, off, n int64) ([]byte, error) {
	t.Helper()
	rc, err := b.FetchOnce(t.Context(), off, n, backstore.Demand)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// FetchOnce asks once, does not sleep, and says what its caller needs to know.
func TestFetchOnce(t *testing.T) {
	for name, tc := range map[string]struct {
		fault     regtest.Fault
		answered  bool
		permanent bool
		after     time.Duration
	}{
		"503":         {regtest.Fault{Status: 503}, true, false, 0},
		"429":         {regtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"7"}}}, true, false, 7 * time.Second},
		"429 an hour": {regtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"3600"}}}, true, false, time.Hour},
		"404":         {regtest.Fault{Status: 404}, true, true, 0},
		"reset":       {regtest.Fault{Reset: true}, false, false, 0},
		"cut":         {regtest.Fault{Cut: true, CutAt: 100}, false, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, Options{}, regtest.RegistryOptions{})
			d, content := f.push(t, 1, 1000)
			b, err := f.Blob(f.repo, d)
			require.NoError(t, err)
			var asked atomic.Int64
			slept := f.clock.slept
			f.link.SetFault(func(*http.Request) *regtest.Fault { asked.Add(1); return &tc.fault })
			_, err = once(t, b, 0, 1000)
			var e *Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, tc.answered, e.Answered())
			require.Equal(t, tc.permanent, e.Permanent())
			require.Equal(t, tc.after, e.RetryAfter())
			require.Equal(t, slept, f.clock.slept)
			if name == "reset" { // net/http replaces a connection that was idle
				asked.Store(1)
			}
			require.EqualValues(t, 1, asked.Load())
			if tc.after > 0 {
				_, err = once(t, b, 0, 1000)
				require.ErrorAs(t, err, &e)
				require.True(t, e.Answered())
				require.False(t, e.Permanent())
				require.Equal(t, tc.after, e.RetryAfter())
				require.EqualValues(t, 1, asked.Load(), "the host wants to be left alone")
				require.NoError(t, f.clock.sleep(t.Context(), tc.after))
			}
			f.link.SetFault(nil)
			got, err := once(t, b, 0, 1000)
			require.NoError(t, err)
			require.Equal(t, content, got)
		})
	}
}

// Who asks to be left alone for longer than is waited for is not permanent.
func TestPatienceIsNotPermanent(t *testing.T) {
	e := &Error{Err: &patienceError{"h", time.Hour}}
	require.False(t, e.Permanent())
	require.False(t, e.transient(), "nor is it tried again at once")
	require.ErrorContains(t, e, "asks to wait 1h0m0s")
	require.Zero(t, (&Error{Err: errors.New("x"), retryAfter: -1}).RetryAfter())
}
