// Package regtest is a registry for experiments and tests, and a link to put
// in front of it or of any other.
//
// [NewRegistry] is an embedded registry, go-containerregistry's, over files. A
// [Link] is an http.Handler in front of another one, this registry or a
// [Proxy] to one elsewhere, that behaves like a network link: it has a delay, a
// rate, random faults, and writes down every request. A [Server] serves it on
// the loopback interface.
//
// # What a link models
//
// DELAY is one round trip. It is added once to every request, before the
// request reaches the registry. A new connection carries nothing for one DELAY
// from when it was opened, for the TCP handshake: so a request that opens one
// costs two, and a request on one that was opened ahead of it, by DELAY or more,
// costs one. TLS handshakes, slow start, lost packets and the upper part of the
// protocol stack are not modelled; a request that is sent while another is under
// way does not wait for it.
//
// RATE is payload, each way: the bodies of all responses share it, and the
// bodies of all requests share as much again, as on a full-duplex link. Heads
// are free. A body goes in quanta of 16 KiB, each of which leaves when the link
// is done with all that were ready before it, so that bodies under way at the
// same time get equal shares. Sending is computed on the link's own clock and
// only then waited for, so that a timer that is late costs no rate: what it
// held up is sent at once. A handler and its client that take up to 5 ms from
// one quantum to the next cost nothing either; what they take longer is lost. A
// body whose client does not read asks for no quanta and leaves the rate to
// others; connections are given small socket buffers (64 KiB each way), so that
// this happens soon.
//
// # Concurrency
//
// All types are safe for concurrent use. Close the Server first, then the
// Proxy; the registry's files are the caller's.
package regtest
