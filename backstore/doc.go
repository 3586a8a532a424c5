// Package backstore gives a container image as one block device that is read
// lazily: an [Image] is a stack of layers, each a [Blob] on this node or at a
// registry.
//
//	Image.ReadAt → merged index → layer → ZFile block → Blob → chunk cache → one ranged GET
//
// # Words
//
// A [Blob] is the bytes of one layer as the registry serves them (blob space).
// What is inside it, the LSMT file, has offsets in layer space; the merged
// device has offsets in device space. A chunk is the unit in which the cache
// knows what it has ([DefaultChunkSize]). A flight is one request to the
// origin that is under way; equal misses meet in one flight. Demand is a read
// that somebody waits for, everything else is background.
//
// # Concurrency
//
// A [Cache] belongs to a process and holds the process-wide schedule: one link
// estimate and one set of limits a registry host, shared by every image.
// Demand starts at once and waits for no budget. Background requests are let in
// as far as the link's bandwidth × delay needs and [Limits] allow; prefetches
// take turns by bytes, those whose readers wait get more, and completion comes
// last. While demand is fetched, or a prefetch that a reader has joined, the
// others are read slowly; while readers miss what no plan has, fewer are let in.
// What a background request fails with holds up no reader: he fetches by
// himself what it does not bring, unless the host asks to be left alone.
// Everything exported is safe for concurrent use unless it says otherwise.
// Several processes may share one cache directory: they fetch on their own but
// find what the others have written.
//
// # Decoded blocks
//
// Blocks of more than 4 KiB of which a read wants a part are kept decoded, for
// all images of the cache, up to [CacheOptions].DecodedBytes of memory outside
// of the Go heap: neighbouring reads decode a block once. What is wanted whole
// is decoded to where it is wanted and not kept. Blocks go with the last image
// that has their blob, and when nobody has used them for ten times
// [CacheOptions].FlushEvery. Reading a node's own files keeps nothing.
//
// What was tried and left out, on two processors with other programs running:
// decoding a request on both, since waking the second takes 60 to 200 µs, as
// long as decoding 128 KiB does; and decoding blocks of a replay ahead of
// demand, which makes no less work of it. With a processor idle throughout it
// would take up to 14 % off a start from zstd blocks of 64 KiB.
//
// # A registry that is away
//
// A read of an open image goes on trying while its registry cannot be reached,
// hangs, or answers that it is overloaded or broken, for as long as
// [CacheOptions].Outage says. All images of the process that read from a host
// share one view of it: while it is away one request at a time is sent to find
// out, 2 s apart at most, and the first that succeeds lets the others go on, a
// few for each success. A request of which nothing is heard is left waiting and
// another one sent beside it. Definite answers (401, 403, 404, other bytes than
// the digest says) fail at once. [Image.Waiting] and [Image.Explain] tell what
// is waited for; that an outage begins, lasts and ends is logged.
//
// # Processes that are killed
//
// A process that is killed loses nothing: what it has fetched is in the cache
// of whoever opens the same blobs next, with what opening them reads, so that
// an image that was open once can be opened again without its registry. What
// was written to an upper layer made by [CreateUpper] is found by [OpenUpper].
//
// # Closing
//
// Close images first, then the cache. Closing an image ends the reads that
// wait for its blobs with an error, then waits for its goroutines, but not for
// a registry.
package backstore
