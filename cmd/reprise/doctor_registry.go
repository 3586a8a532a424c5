package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/snapshotter"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// groupRegistry begins the name of the group of findings about an image's registry.
const groupRegistry = "Registry"

// annotationOverlaybd is on layers in overlaybd format.
const annotationOverlaybd = "containerd.io/snapshot/overlaybd/blob-digest"

// registryAnswers is how long a registry and its mirrors may take.
const registryAnswers = 20 * time.Second

// A registryCheck asks the registry of an image.
type registryCheck struct {
	*registry.Client
	ref   registry.Reference
	group string
}

// checkRegistry says what the registry of REF, and its mirrors, can do.
func (x *examination) checkRegistry(ctx context.Context) []finding {
	ctx, cancel := context.WithTimeout(ctx, registryAnswers)
	defer cancel()
	ref, _ := registry.ParseReference(x.ref) // it has been parsed before
	k := &registryCheck{ref: ref, group: groupRegistry + " " + ref.Registry}
	o := x.registry()
	o.Attempts = 2
	o.Credentials = snapshotter.OpenSecrets(secretsPath(x.root), slog.New(slog.DiscardHandler)).Credentials
	var err error
	if k.Client, err = registry.New(&o); err != nil {
		return []finding{k.failed("credentials", err, "correct Docker's configuration")}
	}
	defer k.Close()
	list, there := k.checkHosts(ctx)
	if !there {
		return list
	}
	m, err := k.Manifest(ctx, x.ref, nil)
	if err != nil {
		return append(list, k.failed("image", err, "name an image that is for this machine's platform"))
	}
	lazy := overlaybd(m.Layers)
	list = append(list, k.checkImage(&m, lazy), k.checkRanges(ctx, &m, lazy), k.checkReferrers(ctx, &m))
	if lazy {
		list = append(list, k.checkTraces(ctx, &m))
	}
	return list
}

func (k *registryCheck) finding(name string, g grade, detail string) finding {
	return finding{Group: k.group, Name: name, Grade: g, Detail: detail}
}

// failed is an error, with what it says itself on how to cure it, or else remedy.
func (k *registryCheck) failed(name string, err error, remedy string) finding {
	f := k.finding(name, broken, err.Error())
	f.Remedy = remedy
	var e *registry.Error
	if !errors.As(err, &e) {
		return f
	}
	if hint := e.Hint(); hint != "" {
		f.Detail, f.Remedy = strings.ReplaceAll(f.Detail, " ("+hint+")", ""), hint
	}
	return f
}

// checkHosts asks all hosts. One of them is enough.
func (k *registryCheck) checkHosts(ctx context.Context) (list []finding, there bool) {
	hosts, err := k.Check(ctx, k.ref.String())
	if err != nil {
		return []finding{k.failed("hosts", err, "correct hosts.toml")}, false
	}
	for _, h := range hosts {
		there = there || h.Err == nil
	}
	for _, h := range hosts {
		list = append(list, k.checkHost(h, there))
	}
	return list, there
}

func (k *registryCheck) checkHost(h registry.HostStatus, there bool) finding {
	as := "asked without credentials: Docker's configuration has none for it"
	switch {
	case h.Own:
		as = "asked as " + h.User + ", by the image pull secret of the last pull"
	case h.User != "":
		as = "asked as " + h.User
	}
	what := ""
	if h.Mirror {
		what = "mirror: "
	}
	if h.Err == nil {
		return k.finding(h.Name, fine, what+"has the image; "+as)
	}
	f := k.failed(h.Name, h.Err, remedyOf(h.Err))
	if errors.Is(h.Err, errdefs.ErrUnauthenticated) || errors.Is(h.Err, errdefs.ErrPermissionDenied) {
		f.Detail += "; " + as
	}
	if there {
		f.Grade = lacking
	}
	if there && h.Mirror && errors.Is(h.Err, os.ErrNotExist) {
		return k.finding(h.Name, fine, what+"answers, and does not have the image")
	}
	return f
}

// remedyOf is for what gives no hint of its own.
func remedyOf(err error) string {
	var e *registry.Error
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "check the name and the tag"
	case !errors.As(err, &e):
		return "correct the credentials: docker login"
	case e.Status == 0:
		return "check its name, the network and the firewall (HTTPS_PROXY is obeyed); a mirror can stand in for it: see hosts.toml"
	}
	return "ask who runs it"
}

// overlaybd tells whether all layers are in that format.
func overlaybd(layers []ocispec.Descriptor) bool {
	for _, l := range layers {
		if l.Annotations[annotationOverlaybd] == "" {
			return false
		}
	}
	return len(layers) > 0
}

func (k *registryCheck) checkImage(m *registry.Manifest, lazy bool) finding {
	var n int64
	for _, l := range m.Layers {
		n += l.Size
	}
	if lazy {
		return k.finding("image", fine, fmt.Sprintf("%d layers in overlaybd format, %s: loaded lazily", len(m.Layers), size(n)))
	}
	f := k.finding("image", without, fmt.Sprintf("%d layers, not in overlaybd format, %s: downloaded and unpacked before it starts", len(m.Layers), size(n)))
	f.Remedy = "to load it lazily, convert it: reprise convert " + k.ref.String() + " " + k.ref.Name() + ":TAG"
	return f
}

// checkRanges asks for the last byte of the largest layer.
func (k *registryCheck) checkRanges(ctx context.Context, m *registry.Manifest, lazy bool) finding {
	const name = "ranges"
	var largest ocispec.Descriptor
	for _, l := range m.Layers {
		if l.Size > largest.Size {
			largest = l
		}
	}
	if largest.Size < 2 {
		return k.finding(name, without, "there is no layer to try it with")
	}
	switch has, err := k.HasRanges(ctx, k.ref.String(), largest); {
	case err != nil:
		return k.failed(name, fmt.Errorf("a layer cannot be read: %w", err), remedyOf(err))
	case !has:
		f := k.finding(name, broken, "it answers with whole layers to who asks for a part: nothing can be loaded lazily")
		if !lazy {
			f.Grade = lacking
		}
		f.Remedy = "have it, or the proxy before it, obey Range requests"
		return f
	}
	return k.finding(name, fine, "it gives parts of layers")
}

func (k *registryCheck) checkReferrers(ctx context.Context, m *registry.Manifest) finding {
	const name = "referrers"
	has, err := k.HasReferrers(ctx, k.ref.String(), m.Descriptor.Digest)
	switch {
	case err != nil:
		f := k.failed(name, err, remedyOf(err))
		f.Grade = lacking
		return f
	case has:
		return k.finding(name, fine, "it has the Referrers API")
	}
	return k.finding(name, without, "it lacks the Referrers API: traces are found by their tags")
}

func (k *registryCheck) checkTraces(ctx context.Context, m *registry.Manifest) finding {
	const name = "traces"
	var list []artifact.Entry
	store, err := artifact.New(k.Client, k.ref.String())
	if err == nil {
		list, err = store.List(ctx, m.Descriptor.Digest)
	}
	if err != nil {
		f := k.failed(name, err, remedyOf(err))
		f.Grade = lacking
		return f
	}
	if len(list) == 0 {
		f := k.finding(name, without, "none beside the image: nothing is prefetched")
		f.Remedy = "record one: reprise record --attach " + k.ref.String()
		return f
	}
	var names []string
	for _, e := range list {
		n := e.Workload
		if e.Default {
			n += " (default)"
		}
		names = append(names, n)
	}
	return k.finding(name, fine, fmt.Sprintf("%d: %s", len(list), strings.Join(names, ", ")))
}
