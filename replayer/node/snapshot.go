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
	CPU      time.Duration   `json:"cpu_ns"` // of this process, the container not counted
	MaxRSS   int64           `json:"max_rss_bytes"`
}

func snapshot(im *Image) Snapshot {
	s := Snapshot{Stats: im.Stats()}
	s.Coverage, s.Accuracy = s.Stats.Coverage(), s.Stats.Accuracy()
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) == nil {
		s.CPU = time.Duration(u.Utime.Nano() + u.Stime.Nano())
		s.MaxRSS = u.Maxrss << 10
	}
	return s
}
