package backstore

// readahead recognises readers that go forward through a blob. A miss that
// continues the run of an earlier one fetches twice as much as that one did.
type readahead struct {
	recent [8]run
	turn   int
}

type run struct{ end, length int64 }

// maxStream bounds what one miss of a forward reader fetches.
const maxStream = 2 << 20

// next returns how many bytes a miss at off that needs bytes up to need should
// fetch, base where nothing speaks for more.
func (r *readahead) next(off, need, base int64) int64 {
	for i := range r.recent {
		p := &r.recent[i]
		if p.length > 0 && off >= p.end && off-p.end <= base/4 {
			p.length = min(2*p.length, maxStream)
			p.end = max(off+p.length, need)
			return p.length
		}
	}
	r.recent[r.turn] = run{end: max(off+base, need), length: base}
	r.turn = (r.turn + 1) % len(r.recent)
	return base
}
