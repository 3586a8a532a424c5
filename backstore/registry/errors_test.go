package registry

import (
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

// What the registry has answered for good is not worth waiting for.
func TestPermanent(t *testing.T) {
	for name, tc := range map[string]struct {
		err  Error
		want bool
	}{
		"not found":        {Error{Status: 404}, true},
		"bad request":      {Error{Status: 400}, true},
		"no such range":    {Error{Status: 416}, true},
		"too many":         {Error{Status: 429}, false},
		"unavailable":      {Error{Status: 503}, false},
		"no answer":        {Error{Err: io.ErrUnexpectedEOF}, false},
		"cut short":        {Error{Status: 206, Err: io.ErrUnexpectedEOF}, false},
		"of another size":  {Error{Status: 206, Err: finalf("the blob has 3 bytes")}, true},
		"no ranges at all": {Error{Status: 200, Err: ErrNoRanges}, true},
	} {
		require.Equal(t, tc.want, tc.err.Permanent(), name)
	}
}
