package compare

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// A Mode is the name of a way to start an image.
type Mode string

const (
	Lazy   Mode = "lazy"   // nothing on the node, no trace
	Replay Mode = "replay" // nothing on the node, with the image's trace
	Warm   Mode = "warm"   // all bytes on the node, page cache dropped
)

// A Variant is a way to start an image. The zero value of a field is its
// default.
type Variant struct {
	Name Mode
	// Trace is --trace of the run: none, auto, a file, or a digest. None by
	// default.
	Trace string
	// Warm has all bytes on the node; otherwise it has nothing of the image.
	Warm bool
	// Flags are more flags of `reprise run`.
	Flags []string
	// Fault, if set, is called before each start and chooses the faults of the
	// link then; it needs a link.
	Fault func() func(*http.Request) *regtest.Fault
	// Room, if set, has the state directory on a file system of so many bytes.
	Room int64
	// Against names the variant whose ready times those of this one are
	// compared with, run by run; Lazy by default.
	Against Mode
	// Check, if set, looks at each start when the container is ready.
	Check func(*node.Report) error

	start starter // other than `reprise run`
	local bool    // which needs no registry
}

// A starter starts an image in an empty directory, waits until the container is
// ready, and ends it. It calls atReady once: at that moment, or when it is known
// never to come.
type starter func(ctx context.Context, dir string, atReady func()) (process, error)

// Standard are the variants of a plain comparison, in the order of a round.
func Standard() []Variant {
	return []Variant{
		{Name: Lazy},
		{Name: Replay, Trace: "auto", Check: replayed},
		{Name: Warm, Warm: true},
	}
}

// replayed makes sure that a start had a trace. Its result is not known yet at
// readiness when the replay still runs; the phase is.
func replayed(r *node.Report) error {
	if slices.ContainsFunc(r.Phases, func(p node.Phase) bool { return p.Name == "replay started" }) {
		return nil
	}
	return fmt.Errorf("no trace was replayed: %s", r.Trace)
}

// fillVariants checks the variants and fills in defaults.
func fillVariants(vs []Variant, link bool) ([]Variant, error) {
	if len(vs) == 0 {
		vs = Standard()
	}
	vs = slices.Clone(vs)
	seen := map[Mode]bool{}
	for i := range vs {
		v := &vs[i]
		switch {
		case v.Name == "" || seen[v.Name]:
			return nil, fmt.Errorf("variant %q: a name that no other has is needed", v.Name)
		case v.Fault != nil && !link:
			return nil, fmt.Errorf("variant %s: faults need a link", v.Name)
		case v.Warm && v.Room > 0:
			return nil, fmt.Errorf("variant %s: warm starts share a directory", v.Name)
		}
		seen[v.Name] = true
		v.Trace, v.Against = cmp.Or(v.Trace, "none"), cmp.Or(v.Against, Lazy)
	}
	return vs, nil
}

// Traces are what [Adversaries] replays, as files.
type Traces struct {
	Workload  string // recorded from another command on the same image
	Image     string // recorded from another image
	Truncated string // the image's own, cut off half-way; see [Truncate]
}

// Adversaries are starts with a trace that does not fit, or in conditions in
// which a replay could do harm, each beside the lazy start that it must not be
// slower than. room is how many bytes the disk, or else the cache, holds; it
// should be less than a start needs.
func Adversaries(t Traces, room int64) []Variant {
	limited := []string{"--cache-size", fmt.Sprint(room)}
	return []Variant{
		{Name: Lazy},
		{Name: "other workload", Trace: t.Workload},
		{Name: "other image", Trace: t.Image},
		{Name: "truncated", Trace: t.Truncated},
		{Name: "failing prefetch", Trace: "auto", Fault: EverySecondPrefetch},
		{Name: "lazy, cache full", Flags: limited},
		{Name: "cache full", Trace: "auto", Flags: limited, Against: "lazy, cache full"},
		{Name: "lazy, disk full", Room: room},
		{Name: "disk full", Trace: "auto", Room: room, Against: "lazy, disk full"},
	}
}

// EverySecondPrefetch has the registry fail every second request that reprise
// marks as one that nobody waits for.
func EverySecondPrefetch() func(*http.Request) *regtest.Fault {
	var n counter
	return func(r *http.Request) *regtest.Fault {
		if !isPrefetch(r) || n.next()%2 != 0 {
			return nil
		}
		return &regtest.Fault{Status: http.StatusInternalServerError, Body: "{}"}
	}
}

func isPrefetch(r *http.Request) bool {
	return strings.HasPrefix(r.Header.Get("Purpose"), "prefetch")
}

// Truncate copies the first half of a trace file.
func Truncate(from, to string) error {
	p, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, p[:len(p)/2], 0o600)
}

// mountRoom makes dir a file system of its own. The function that it returns
// takes that away.
func mountRoom(dir string, bytes int64) (func() error, error) {
	if err := unix.Mount("reprise-compare", dir, "tmpfs", unix.MS_NODEV|unix.MS_NOSUID, fmt.Sprintf("mode=700,size=%d", bytes)); err != nil {
		return nil, fmt.Errorf("mount a small file system: %w", err)
	}
	return func() error {
		err := unix.Unmount(dir, 0)
		if errors.Is(err, unix.EBUSY) {
			err = errors.Join(fmt.Errorf("unmount %s: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH))
		}
		return err
	}, nil
}
