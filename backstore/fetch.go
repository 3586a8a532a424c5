package backstore

import (
	"context"
	"io"
)

// A Lane says for whom bytes are fetched.
type Lane uint8

const (
	// Demand is a fetch that a reader waits for.
	Demand Lane = iota
	// Background is a fetch that nobody waits for yet: replay, completion.
	Background
)

// A Fetcher is one blob at its origin, usually a registry.
//
// A Fetcher that tries again by itself should also have the method
//
//	FetchOnce(ctx context.Context, off, n int64, lane Lane) (io.ReadCloser, error)
//
// which is Fetch without that. It is preferred, since how often a host that is
// away may be asked is known to the [Cache], for all blobs of the host. Of an
// error it is asked, with errors.As, whether it has these methods:
//
//	Permanent() bool           // trying again will not help
//	Answered() bool            // the host was reached, and has refused
//	RetryAfter() time.Duration // the host asks to be left alone for so long
type Fetcher interface {
	// Fetch opens the bytes [off, off+n) of the blob, 0 <= off, 0 < n, off+n
	// at most the blob's size. The stream gives exactly n bytes and then
	// io.EOF, or an error, which is io.ErrUnexpectedEOF where the origin ends
	// too early. Cancelling ctx ends the stream, also while it is being read.
	//
	// Background streams use connections with bounded receive buffers, so
	// that a reader that pauses soon stops the sender.
	Fetch(ctx context.Context, off, n int64, lane Lane) (io.ReadCloser, error)

	// Host is the key under which limits and the link estimate are kept.
	Host() string
}
