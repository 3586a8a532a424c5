package fuse

import "golang.org/x/sys/unix"

// handle answers one request.
func (s *Session) handle(b *buffer, req []byte) {
	h := parseHeader(req)
	body := req[inHeaderSize:]
	switch h.op {
	case opRead:
		s.read(b, h, body)
	case opWrite:
		s.write(b, h, body)
	case opFsync, opFlush:
		s.answer(b, h, 0, b.Sync())
	case opFallocate:
		s.fallocate(b, h, body)
	case opForget, opBatchForget: // have no reply
	case opInterrupt:
		// ENOSYS stops the kernel from sending more. The requests that matter
		// come from the loop driver and are never interrupted.
		s.answer(b, h, 0, unix.ENOSYS)
	default:
		s.meta(b, h, body)
	}
}

// meta answers what concerns the two nodes and not the data.
func (s *Session) meta(b *buffer, h header, body []byte) {
	out := b.data(attrOutSize + entryOutSize)
	switch h.op {
	case opLookup:
		if h.node != rootNode || cString(body) != s.cfg.Name {
			s.answer(b, h, 0, unix.ENOENT)
			return
		}
		a := s.attr(fileNode)
		putEntryOut(out, &a)
		s.answer(b, h, entryOutSize, 0)
	case opGetattr:
		a := s.attr(h.node)
		putAttrOut(out, &a)
		s.answer(b, h, attrOutSize, 0)
	case opOpen:
		s.open(b, h)
	case opStatfs:
		putStatfsOut(out, uint64(s.srv.Size), uint32(s.cfg.BlockSize))
		s.answer(b, h, statfsOutSize, 0)
	case opRelease:
		s.release(b, h, body)
	case opDestroy:
		s.answer(b, h, 0, 0)
	default:
		s.answer(b, h, 0, unix.ENOSYS)
	}
}

func (s *Session) attr(node uint64) attr {
	switch {
	case node != fileNode:
		return attr{ino: node, mode: unix.S_IFDIR | 0o500, nlink: 2}
	case s.srv.ReadOnly:
		return attr{ino: node, size: uint64(s.srv.Size), mode: unix.S_IFREG | 0o400, nlink: 1}
	}
	return attr{ino: node, size: uint64(s.srv.Size), mode: unix.S_IFREG | 0o600, nlink: 1}
}

func (s *Session) read(b *buffer, h header, body []byte) {
	if len(body) < 24 {
		s.answer(b, h, 0, unix.EINVAL)
		return
	}
	e := parseRW(body)
	if e.n > maxIO {
		s.answer(b, h, 0, unix.EINVAL)
		return
	}
	n := int(e.n)
	if end := uint64(s.srv.Size); e.off < end && e.n > end-e.off {
		n = int(end - e.off) // the page cache reads whole pages
	}
	s.answer(b, h, n, b.Read(b.data(n), int64(e.off)))
}

func (s *Session) write(b *buffer, h header, body []byte) {
	if len(body) < writeInSize {
		s.answer(b, h, 0, unix.EINVAL)
		return
	}
	e := parseRW(body)
	if e.n != uint64(len(body)-writeInSize) {
		s.answer(b, h, 0, unix.EINVAL)
		return
	}
	errno := b.Write(b.data(int(e.n)), int64(e.off))
	out := b.data(8)
	native.PutUint64(out, e.n) // fuse_write_out
	s.answer(b, h, 8, errno)
}

func (s *Session) fallocate(b *buffer, h header, body []byte) {
	if len(body) < 32 {
		s.answer(b, h, 0, unix.EINVAL)
		return
	}
	e, mode := parseFallocate(body)
	mode &^= fallocKeepSize
	if mode != fallocPunchHole && mode != fallocZeroRange {
		s.answer(b, h, 0, unix.EOPNOTSUPP)
		return
	}
	s.answer(b, h, 0, b.Discard(int64(e.off), int64(e.n)))
}

// answer sends the reply whose n bytes are in b.data. An error of write(2)
// says that the request is gone: it was interrupted or the session is ending.
func (s *Session) answer(b *buffer, h header, n int, errno unix.Errno) unix.Errno {
	if errno != 0 {
		n = 0
	}
	p := b.reply(n)
	putHeader(p, n, int32(errno), h.unique)
	return write(s.fd, p)
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
