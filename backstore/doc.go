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
// Demand starts at once; background requests are admitted only as far as the
// link's bandwidth × delay needs, and pause while demand is being fetched.
// Everything exported is safe for concurrent use unless it says otherwise.
// Several processes may share one cache directory: they fetch on their own but
// find what the others have written.
//
// # Closing
//
// Close images first, then the cache. Closing an image ends the reads that
// wait for its blobs with an error, then waits for its goroutines.
package backstore
