// Package registry reads and writes images at OCI registries.
//
// A [Client] talks to every registry that it is asked about, over one stack:
// containerd's host configuration (hosts.toml with mirrors, certificates and
// headers) and its authorizer, with a repository's own credentials where the
// caller knows some, and Docker's. A [Blob] is one blob at its origin, read in
// closed ranges; it is what backstore calls a Fetcher. A manifest comes by tag or
// digest in as few requests as possible. A referrer is a manifest with a subject:
// it is listed by the Referrers API and by the fallback tag, which are asked at
// the same time.
//
// # One request
//
// A request goes to the hosts of its registry in the order of hosts.toml, the
// registry itself last. A host that fails in any way hands over to the next
// one; one that could not be reached is asked last for a while. When all have
// failed and at least one of the failures may pass (a broken connection, 408,
// 429, 5xx), the round is repeated after a back-off, a bounded number of times.
// Retry-After closes the host for everybody until it has passed. A body that
// ends early is continued from where it stopped. 401 renews the token, once for
// all requests that met it. [Blob.FetchOnce] leaves out all of that patience.
//
// Blob reads come in lanes, each with connections of its own. The demand lane
// uses HTTP/2 where TLS offers it and keeps connections. The background lane
// uses HTTP/1.1 with small receive buffers, so that a reader that pauses soon
// stops the sender and one paused stream holds up no other. Where a registry
// redirects a blob read to a blob store, the address is remembered, so that
// further ranges of the blob cost one round trip; credentials never go there.
// [Client.DialAhead] opens a lane's connections before there are requests for
// them.
//
// # Concurrency
//
// Client and Blob are safe for concurrent use. Streams are not. [Client.Close]
// comes last: streams still open end with an error. Nothing here calls back
// into the caller except the open function of [Client.Push].
package registry
