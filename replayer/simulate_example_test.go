package replayer_test

import (
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
)

// Two reads of a megabyte each, 20 ms of computing between them, over a link
// that brings one in 40 ms: bytes can come from the third round trip on, at 30
// ms, so that the first read is done at 70 and the second at 110, long after it
// began.
func ExampleLowerBound() {
	w, err := replayer.NewWorkload(&tracefmt.Trace{
		Header: tracefmt.Header{Layers: []tracefmt.Layer{{Digest: digest.FromString("layer"), Size: 8_000_000, Decoded: 16_000_000}}},
		Events: []tracefmt.Event{
			{At: 0, Off: 0, Len: 2_000_000, BlobOff: 0, BlobLen: 1_000_000},
			{At: 20 * time.Millisecond, Off: 8_000_000, Len: 2_000_000, BlobOff: 4_000_000, BlobLen: 1_000_000},
		},
	}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	link := replayer.Link{Delay: 10 * time.Millisecond, Rate: 200_000_000}
	bound, err := replayer.LowerBound([]*replayer.Workload{w}, &replayer.SimOptions{Link: link})
	fmt.Println(bound, err)
	// Output: 110ms <nil>
}
