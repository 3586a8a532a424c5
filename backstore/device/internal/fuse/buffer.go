package fuse

import "github.com/reprise-project/reprise/backstore/device/internal/request"

// buffer is one worker's request and reply memory, see Buffers in the package
// comment, and its place in the request server.
type buffer request.Buffer

// bufferSize is that of a buffer's memory.
const bufferSize = pageSize + maxIO

// request is where a request is read to: its header ends where page 1 begins
// if it is a WRITE.
func (b *buffer) request() []byte { return b.Mem[pageSize-writeHead:] }

// reply is a reply of n bytes after the header.
func (b *buffer) reply(n int) []byte { return b.Mem[pageSize-outHeaderSize : pageSize+n] }

// data is the first n bytes of page 1 and on.
func (b *buffer) data(n int) []byte { return b.Mem[pageSize : pageSize+n : pageSize+n] }
