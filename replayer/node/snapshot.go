package node

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
)

// Snapshot are the figures of a start at one moment.
type Snapshot struct {
	Stats    backstore.Stats `json:"stats"`
	Coverage float64         `json:"coverage"`
	Accuracy float64         `json:"accuracy"`
	CPU      time.Duration   `json:"cpu_ns"` // of reprise's processes, the container not counted
	MaxRSS   int64           `json:"max_rss_bytes"`
	// Restarts is how often the server was started again. It has forgotten what
	// was before.
	Restarts int `json:"restarts"`
}

func snapshot(im *Image) Snapshot {
	s := Snapshot{Stats: im.Stats()}
	s.Coverage, s.Accuracy = s.Stats.Coverage(), s.Stats.Accuracy()
	s.addUsage()
	return s
}

// addUsage adds what this process has used.
func (s *Snapshot) addUsage() {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) == nil {
		s.CPU += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		s.MaxRSS += u.Maxrss << 10
	}
}
