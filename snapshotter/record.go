package snapshotter

import (
	"github.com/reprise-project/reprise/replayer/node"
)

// RecordOptions say which containers are recorded: those on images, in overlaybd
// format, that have no trace of the container's workload. A trace is put beside
// its image in the registry, or kept below the node's root.
type RecordOptions struct {
	// Wanted tells whether containers on an image are recorded. ref has the digest
	// of the image's manifest in the place of the tag where that is known. It is
	// called from many goroutines. Default: all are.
	Wanted func(ref string) bool
	// Rules end a recording.
	Rules node.RecordRules
}

// record has the device of a request record the container that it is made for.
func (o *RecordOptions) record(r *node.Request) {
	if o == nil || o.Wanted != nil && !o.Wanted(r.Ref) {
		return
	}
	rules := o.Rules
	r.Record = &rules
}
