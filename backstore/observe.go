package backstore

import "time"

// An Origin says where the bytes of a demand read came from. A read that
// needed several sources has the slowest of them.
type Origin uint8

const (
	// FromLocal is a layer that is a file on this node, or a read that
	// needs no bytes of a layer.
	FromLocal Origin = iota
	// FromCache is the chunk cache, filled by earlier demand.
	FromCache
	// FromPrefetch is the chunk cache, filled ahead of demand: by a prefetch, or
	// by this process with what it needed to open the layer.
	FromPrefetch
	// FromFlight is a prefetch that was under way, and waited for.
	FromFlight
	// FromFetch is a fetch for demand: the read's own, or another read's.
	FromFetch
)

func (o Origin) String() string {
	switch o {
	case FromLocal:
		return "local"
	case FromCache:
		return "cache"
	case FromPrefetch:
		return "prefetch"
	case FromFlight:
		return "flight"
	case FromFetch:
		return "fetch"
	}
	return "unknown"
}

// Origins are all there are.
func Origins() []Origin {
	return []Origin{FromLocal, FromCache, FromPrefetch, FromFlight, FromFetch}
}

// A ReadEvent is one demand read of one layer.
type ReadEvent struct {
	At    time.Duration // start of the read, since the image was opened
	Wait  time.Duration // until the bytes were on the node; decoding is not counted
	Layer int           // 0 is the bottom layer
	Off   int64         // in layer space
	Len   int64         // in layer space
	// BlobOff and BlobLen are where the bytes lie in the layer's blob, in
	// whole blocks of its compression.
	BlobOff, BlobLen int64
	Origin           Origin
}

// An Observer is told of every demand read. ObserveRead is called from the
// reading goroutine, concurrently, before the bytes are returned: it must
// neither block nor allocate.
type Observer interface {
	ObserveRead(ReadEvent)
}
