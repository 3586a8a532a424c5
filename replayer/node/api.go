package node

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer"
)

// The server of devices and its clients speak HTTP and JSON over a unix socket.
// Every request names a device by an ID that the client has chosen, and asking
// twice is the same as asking once: so a client repeats what a killed server
// has not answered.
//
//	GET    /v1/server               ServerInfo
//	GET    /v1/devices              []Status
//	PUT    /v1/devices/ID           Request → lines of reply; opens, attaches, mounts
//	GET    /v1/devices/ID           Status; ?trace waits for the end of the trace's lookup
//	DELETE /v1/devices/ID           unmounts and releases, → when all is gone; ?detach though files are in use
//	POST   /v1/devices/ID/quiesce   ends the replay → Status; ?fail=1s: then reads that wait fail
//	POST   /v1/devices/ID/fail      reads fail from now on
//	GET    /v1/devices/ID/lease     holds the device for as long as the answer is read
//	POST   /v1/upgrade              UpgradeRequest: restart, perhaps as another program
const apiVersion = "/v1"

// Request asks a server for the device of an image, and to mount it.
type Request struct {
	// ID is the device's: a new one of [NewID] for each device.
	ID string `json:"id"`
	// Ref is the image as [Node.OpenImage] takes it. Relative paths, here and
	// in Trace and Dir, are relative to Cwd.
	Ref string `json:"ref"`
	Cwd string `json:"cwd,omitempty"`
	// Begun is the zero of the phases, now by default.
	Begun time.Time `json:"begun"`

	// Trace, Workload, Args and Entrypoint are those of [ImageOptions].
	Trace    string           `json:"trace,omitempty"`
	Workload string           `json:"workload,omitempty"`
	Args     []string         `json:"args,omitempty"`
	Plan     replayer.Options `json:"plan"`
	// TraceWait is that of [Config], the server's by default.
	TraceWait time.Duration `json:"trace_wait_ns,omitempty"`

	Entrypoint []string `json:"entrypoint,omitempty"`

	// PlainHTTP and HostsDir are those of the registry client.
	PlainHTTP bool   `json:"plain_http,omitempty"`
	HostsDir  string `json:"hosts_dir,omitempty"`
	// Platform and Transport are those of [Config].
	Platform  string `json:"platform,omitempty"`
	Transport string `json:"transport,omitempty"`

	// Layers are those of [ImageOptions].
	Layers []digest.Digest `json:"layers,omitempty"`
	// Dir is where the image is mounted; empty for a device alone. A mounted
	// device goes when it is mounted nowhere any more.
	Dir string `json:"dir,omitempty"`
	// Leased is a device that goes when its client does; see [Client.Lease].
	Leased bool `json:"leased,omitempty"`
	// Writable mounts read-write. What is written goes to the upper layer that
	// a config.v1.json names; otherwise it is kept below Root until the image
	// is unmounted.
	Writable bool `json:"writable,omitempty"`
	// Upper, if set, is the file that is written to instead, which is made if it is
	// not there, with another one beside it. It stays when the device goes. The
	// image must not have an upper layer of its own.
	Upper string `json:"upper,omitempty"`
	// Complete, if set, downloads what is missing of the image afterwards.
	Complete *backstore.CompleteOptions `json:"complete,omitempty"`
	// Record, if set, has the start of a container on the device recorded, if
	// the image has no trace of the workload; see autorecord.go.
	Record *RecordRules `json:"record,omitempty"`
}

// resolve gives a path of the request as this process sees it.
func (r *Request) resolve(path string) string {
	if path == "" || r.Cwd == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(r.Cwd, path)
}

// place is Ref with its path resolved, if it is one.
func (r *Request) place() string {
	if dir, ok := strings.CutPrefix(r.Ref, layoutScheme); ok {
		return layoutScheme + r.resolve(dir)
	}
	if path := r.resolve(r.Ref); isConfig(path) {
		return path
	}
	return r.Ref
}

func (r *Request) imageOptions() ImageOptions {
	return ImageOptions{Trace: r.trace(), Workload: r.Workload, Args: r.Args, Entrypoint: r.Entrypoint, Layers: r.Layers}
}

// trace is Trace with its path resolved, if it is one.
func (r *Request) trace() string {
	switch r.Trace {
	case "", "none", "auto":
		return r.Trace
	}
	if _, err := digest.Parse(r.Trace); err == nil {
		return r.Trace
	}
	return r.resolve(r.Trace)
}

const maxID = 64

// checkID refuses what cannot be a part of a file name.
func checkID(id string) error {
	bad := strings.ContainsFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
	if id == "" || len(id) > maxID || bad {
		return fmt.Errorf("device %.80q: an ID is 1 to %d letters, digits, '-' and '_'", id, maxID)
	}
	return nil
}

// Status is what a server says of a device.
type Status struct {
	ID       string        `json:"id"`
	Ref      string        `json:"ref"`
	Manifest digest.Digest `json:"manifest,omitempty"`
	Config   ocispec.Image `json:"config"`
	Layers   int           `json:"layers"`
	Workload string        `json:"workload"`

	Device       string `json:"device"` // its path
	FSType       string `json:"fs_type"`
	MountOptions string `json:"mount_options"`
	Dir          string `json:"dir,omitempty"`
	Writable     bool   `json:"writable,omitempty"`
	Leased       bool   `json:"leased,omitempty"`
	Pid          int    `json:"pid"` // of the server
	// Restarts is how often the server was started again: Now is of the last one
	// only, and Before of the others, but for their last seconds.
	Restarts int              `json:"restarts"`
	Before   *backstore.Stats `json:"before,omitempty"`

	// Size is that of the blobs of its layers at registries, bytes, and Present what
	// is on this node of them.
	Size    int64 `json:"size"`
	Present int64 `json:"present"`
	// Waiting says in a line each which fetches reads wait for.
	Waiting []string `json:"waiting,omitempty"`

	Phases []Phase  `json:"phases"`
	Now    Snapshot `json:"now"`
	Trace  string   `json:"trace"` // where the trace is from, or why there is none
	// Explain says in a line why the trace is used, partly used or not.
	Explain string `json:"explain"`
	// Recording says in a line how the recording of a container goes, or has gone,
	// that the server does by itself; empty if there is none.
	Recording string          `json:"recording,omitempty"`
	Replay    replayer.Result `json:"replay"`
}

// ServerInfo is what a server says of itself.
type ServerInfo struct {
	Pid     int       `json:"pid"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Program string    `json:"program"`
	// Mounts is the mount namespace, as /proc/self/ns/mnt has it.
	Mounts  string `json:"mount_namespace"`
	Devices int    `json:"devices"`
	// Kept tells whether devices outlive the process.
	Kept bool `json:"kept"`
}

// UpgradeRequest asks a server to make room for the next.
type UpgradeRequest struct {
	Binary string `json:"binary,omitempty"` // another program; empty for the same
}

// reply is a line of the answer to a PUT: what is logged meanwhile, and at last
// a Status or a failure.
type reply struct {
	Log    string   `json:"log,omitempty"`
	Status *Status  `json:"status,omitempty"`
	Error  *failure `json:"error,omitempty"`
}

// failure is an error on its way to a client.
type failure struct {
	Text string `json:"text"`
	Kind string `json:"kind,omitempty"`
}

// ErrNoDevice is a device that the server does not have.
var ErrNoDevice = errors.New("there is no such device")

// kinds are the errors that a client can tell from others.
var kinds = map[string]error{"busy": errBusy, "none": ErrNoDevice}

func newFailure(err error) *failure {
	f := &failure{Text: err.Error()}
	for kind, is := range kinds {
		if errors.Is(err, is) {
			f.Kind = kind
		}
	}
	return f
}

// remoteError is the error of a server as a client returns it.
type remoteError struct {
	text string
	is   error
}

func (f *failure) err() error { return &remoteError{f.Text, kinds[f.Kind]} }

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.is }
