package node

import (
	"time"

	"github.com/reprise-project/reprise/backstore"
)

// figuresEvery is how often a device's figures are written into its state file,
// if it has been read meanwhile: a killed server loses no more. That costs a
// write of some kilobytes, which nobody waits for.
const figuresEvery = 10 * time.Second

// keepFigures writes figures down for as long as the device is served.
func (d *served) keepFigures() {
	t := time.NewTicker(figuresEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			d.writeFigures()
		case <-d.work.Done():
			return
		}
	}
}

// writeFigures writes them down, if there is anything new.
func (d *served) writeFigures() {
	select {
	case <-d.ready:
	default:
		return
	}
	if d.failed() != nil || d.s.isClosed() {
		return
	}
	now := d.im.Stats()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.released || d.state.Figures != nil && d.state.Figures.Latency.Count == now.Latency.Count {
		return
	}
	d.state.Figures = &now
	d.writeLater()
}

// WriteFigures writes down what the devices have done, for the next server.
func (s *Server) WriteFigures() {
	for _, d := range s.all() {
		d.writeFigures()
	}
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// succeed makes the figures of the server before those of all before.
func (s *state) succeed() {
	if s.Figures == nil {
		return
	}
	all := *s.Figures
	if s.Before != nil {
		all = s.Before.Add(all)
	}
	s.Before, s.Figures = &all, nil
}

// Total are the figures of the device since it was made, also under the servers
// before, as far as these have written them down.
func (st *Status) Total() backstore.Stats {
	if st.Before == nil {
		return st.Now.Stats
	}
	return st.Before.Add(st.Now.Stats)
}
