// Package artifact keeps traces beside images in a registry.
//
// A trace is an OCI 1.1 artifact: a manifest whose subject is the platform's
// manifest of the image, with an empty config and one layer, the trace as
// tracefmt.Encode writes it. All but very large traces are also carried inline
// in their layer's descriptor, so that the manifest is all there is to fetch.
// Annotations tell what `List` shows without reading traces. An image has
// several traces, one for each workload; the image itself never changes.
//
// A trace is found in two ways: it has a tag of its own, [Tag], made of the
// subject and a hash of the workload (and [DefaultTag], if it is the default),
// and it is a referrer of its subject (Referrers API or fallback tag, which the
// registry client asks together). The tag is tried first: it is one request,
// works at every registry, and no concurrent attaching of another workload can
// lose it. Where the two disagree the tag is right, because it is written last;
// so a list of all traces looks at the tags too.
//
// A registry that does not allow deletes keeps the manifest of a trace that is
// removed. Its tag then names a manifest of the same workload that is marked as
// removed and has no trace, and that, being the newest, takes it off the list.
//
// A [Store] is safe for concurrent use. It needs no closing; the client is its
// caller's.
package artifact

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

// Types of a trace's manifest and of its layer.
const (
	ArtifactType = "application/vnd.reprise.trace.v1"
	LayerType    = "application/vnd.reprise.trace.v1+msgpack.zstd"
)

// Annotations of the manifest, beside ocispec.AnnotationCreated, the time when
// the trace was attached.
const (
	AnnotationWorkload = "dev.reprise.trace.workload"
	AnnotationReady    = "dev.reprise.trace.ready" // microseconds; absent if never
	AnnotationBytes    = "dev.reprise.trace.bytes"
	AnnotationEvents   = "dev.reprise.trace.events"
	AnnotationDefault  = "dev.reprise.trace.default" // "true", or absent
	AnnotationRemoved  = "dev.reprise.trace.removed" // "true": the workload has no trace any more
)

// maxInline is the size of a trace, in bytes, up to which its descriptor carries
// it. The demo's start has 713 events in 7.5 KB; 8,000 such would be 85 KB. In
// base64 that is a third more, and at the limit as long on a link of 25 Mbit/s
// as the round trip of 30 ms that another request takes, if it is not redirected.
// The manifest stays far below the 4 MiB that registries take, and below the
// 1 MiB that proxies in front of them let through if they were not told more.
const maxInline = 256 << 10

const (
	maxBlob     = registry.MaxObject // bytes of a compressed trace
	maxWorkload = 128                // bytes of a name
	maxEntries  = 1000               // traces of an image that are looked at
)

// An Entry is what the registry tells of a trace.
type Entry struct {
	Descriptor ocispec.Descriptor // of the manifest
	Workload   string
	Created    time.Time     // when it was attached; zero if not told
	Ready      time.Duration // 0 never, or not told
	Bytes      int64
	Events     int
	Default    bool  // for workloads that have no trace of their own
	Size       int64 // bytes of the trace, compressed; 0 as long as only the list is known

	// Choice is why Auto has picked it; empty in what other calls return.
	Choice Choice
	// Union are the workloads, sorted, whose traces were joined if Choice is
	// ByUnion. There is no Descriptor and no single Workload then.
	Union []string

	removed bool
}

// A Choice is a reason to replay a trace.
type Choice string

// The choices of Store.Auto, best first.
const (
	Own       Choice = "own"     // it is of the workload
	ByDefault Choice = "default" // it is marked as the default
	ByUnion   Choice = "union"   // of all traces of the image
)

// maxNamed is how many workloads a line names.
const maxNamed = 5

// String says which trace it is.
func (e Entry) String() string {
	switch e.Choice {
	case ByDefault:
		return fmt.Sprintf("trace %s of workload %s, the default", e.Descriptor.Digest, e.Workload)
	case ByUnion:
		names, more := e.Union, ""
		if n := len(names) - maxNamed; n > 0 {
			names, more = names[:maxNamed], fmt.Sprintf(" and %d more", n)
		}
		return fmt.Sprintf("union of the traces of other workloads: %s%s", strings.Join(names, ", "), more)
	}
	return fmt.Sprintf("trace %s of workload %s", e.Descriptor.Digest, e.Workload)
}

// entry reads the annotations of a trace's manifest. They are the word of
// whoever pushed it: what makes no sense counts as not told.
func entry(d ocispec.Descriptor) Entry {
	a := d.Annotations
	created, _ := time.Parse(time.RFC3339Nano, a[ocispec.AnnotationCreated])
	return Entry{
		Descriptor: d,
		Workload:   a[AnnotationWorkload],
		Created:    created,
		Ready:      time.Duration(number(a[AnnotationReady], math.MaxInt64/1000)) * time.Microsecond,
		Bytes:      number(a[AnnotationBytes], math.MaxInt64),
		Events:     int(number(a[AnnotationEvents], tracefmt.MaxEvents)),
		Default:    a[AnnotationDefault] == "true",
		removed:    a[AnnotationRemoved] == "true",
	}
}

func number(s string, limit int64) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > limit {
		return 0
	}
	return n
}

// annotations are those of a compacted trace.
func annotations(t *tracefmt.Trace, o *PushOptions) map[string]string {
	a := map[string]string{
		ocispec.AnnotationCreated: o.Created.UTC().Format(time.RFC3339Nano),
		AnnotationWorkload:        t.Workload,
		AnnotationBytes:           strconv.FormatInt(t.Bytes(), 10),
		AnnotationEvents:          strconv.Itoa(len(t.Events)),
	}
	if t.End != nil && t.End.Ready > 0 {
		a[AnnotationReady] = strconv.FormatInt(t.End.Ready.Microseconds(), 10)
	}
	if o.Default {
		a[AnnotationDefault] = "true"
	}
	return a
}

// latest keeps the newest entry of each workload, sorted by name, unless it says
// that the workload has none any more. A registry that does not allow deletes
// lists the replaced and the removed ones as well.
func latest(all []Entry) []Entry {
	slices.SortStableFunc(all, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Workload, b.Workload), b.Created.Compare(a.Created))
	})
	all = slices.CompactFunc(all, func(a, b Entry) bool { return a.Workload == b.Workload })
	return slices.DeleteFunc(all, func(e Entry) bool { return e.removed })
}

// Tag is the tag of the trace of a workload: sha256-HEX.reprise-HASH.
func Tag(subject digest.Digest, workload string) string {
	sum := sha256.Sum256([]byte(workload))
	return tagPrefix(subject) + hex.EncodeToString(sum[:8])
}

// tagPrefix begins the tags of all traces of an image.
func tagPrefix(subject digest.Digest) string { return registry.FallbackTag(subject) + ".reprise-" }

// DefaultTag is the tag of the trace that was last attached as the default.
func DefaultTag(subject digest.Digest) string {
	return tagPrefix(subject) + "default"
}

// DefaultWorkload names what is started by its effective entrypoint and
// arguments: the command's base name, and a hash of all of it. The same
// arguments give the same name, everywhere and for ever.
func DefaultWorkload(args []string) string {
	name := ""
	if len(args) > 0 {
		name = strings.Trim(strings.Map(plain, path.Base(args[0])), "-.")
	}
	if name == "" {
		name = "workload"
	}
	sum := sha256.Sum256([]byte(strings.Join(args, "\x00")))
	return name[:min(len(name), 40)] + "-" + hex.EncodeToString(sum[:4])
}

func plain(r rune) rune {
	if r < 0x80 && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("._-", r)) {
		return r
	}
	return '-'
}

func checkWorkload(name string) error {
	if name == "" || len(name) > maxWorkload || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return fmt.Errorf("workload %.200q: a name has 1 to %d bytes and no control characters", name, maxWorkload)
	}
	return nil
}
