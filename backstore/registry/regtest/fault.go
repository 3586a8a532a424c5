package regtest

import (
	"net"
	"net/http"
	"time"
)

// A Fault is what goes wrong with one request. Fields add up.
type Fault struct {
	// Status answers in the registry's stead, with Header and Body. A redirect
	// is 307 with a Location.
	Status int
	Header http.Header // set in the answer, the registry's or the fault's
	Body   string

	IgnoreRange bool // the registry gets no Range and so answers 200 with the whole
	Corrupt     bool // the body's bytes are inverted
	Cut         bool // the body ends, and the connection, after CutAt bytes
	CutAt       int64
	Reset       bool // the connection is reset after ResetAt bytes of the body; at 0 there is no answer
	ResetAt     int64
	ResetHalf   bool          // ... half-way through the body instead
	Stall       time.Duration // the body pauses after StallAt bytes
	StallAt     int64
	StallHalf   bool // ... half-way through the body instead
}

// answer is the whole answer where the fault needs no registry for it.
func (f *Fault) answer(w *response, r *http.Request) bool {
	if f.Reset && !f.ResetHalf && f.ResetAt == 0 {
		w.reset()
	}
	if f.Status == 0 {
		return false
	}
	w.WriteHeader(f.Status)
	if r.Method != http.MethodHead {
		w.Write([]byte(f.Body))
	}
	return true
}

// head changes the answer's head.
func (f *Fault) head(w *response) {
	for k, v := range f.Header {
		w.Header()[k] = v
	}
	if f.ResetHalf {
		f.ResetAt = half(w.size)
	}
	if f.StallHalf {
		f.StallAt = half(w.size)
	}
}

func half(size int64) int64 { return max(1, size/2) }

// body does to the next quantum of the body what is to be done, and may shorten
// it so that it ends where something happens.
func (f *Fault) body(w *response, p []byte) ([]byte, error) {
	if f.Stall > 0 {
		if w.sent >= f.StallAt {
			d := f.Stall
			f.Stall = 0
			w.Flush()
			if err := sleepUntil(w.s.ctx, time.Now().Add(d)); err != nil {
				return nil, err
			}
		} else {
			p = p[:min(int64(len(p)), f.StallAt-w.sent)]
		}
	}
	if f.Reset {
		if w.sent >= f.ResetAt {
			w.Flush()
			w.reset()
		}
		p = p[:min(int64(len(p)), f.ResetAt-w.sent)]
	}
	if f.Cut {
		if w.sent >= f.CutAt {
			w.Flush()
			panic(http.ErrAbortHandler)
		}
		p = p[:min(int64(len(p)), f.CutAt-w.sent)]
	}
	if f.Corrupt {
		q := make([]byte, len(p))
		for i, b := range p {
			q[i] = ^b
		}
		p = q
	}
	return p, nil
}

// reset ends the handler and the connection; what is in its buffers is lost.
func (w *response) reset() {
	if w.conn != nil {
		if tcp, ok := w.conn.Conn.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
	}
	panic(http.ErrAbortHandler)
}
