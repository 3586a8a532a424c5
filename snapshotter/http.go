package snapshotter

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// ChainInfo describes a chain that is an image's, or that a container is on; a
// container with a device of its own has one of its own.
type ChainInfo struct {
	// Ref is the image, with the digest of its manifest if that is known.
	Ref string `json:"ref"`
	// Device is the ID of its device, which is there while it is used.
	Device string `json:"device"`
	// Layers are those in overlaybd format.
	Layers int `json:"layers"`
	// Containers are the keys of the snapshots of those on it, as containerd passes
	// them on: NAMESPACE/NUMBER/KEY.
	Containers []string `json:"containers"`
}

// List describes the chains, sorted by image.
func (s *Snapshotter) List(ctx context.Context) ([]ChainInfo, error) {
	var list []ChainInfo
	err := s.read(ctx, func(ctx context.Context) (err error) {
		list, err = s.listChains(ctx)
		return err
	})
	if errdefs.IsNotFound(err) { // there has never been a snapshot
		err = nil
	}
	return list, err
}

// listChains is List in a transaction. What is on no chain, or on a broken one, is
// left out.
func (s *Snapshotter) listChains(ctx context.Context) ([]ChainInfo, error) {
	var all []snapshots.Info
	err := storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
		all = append(all, info)
		return nil
	})
	if err != nil {
		return nil, err
	}
	refs := map[string]string{}
	for _, info := range all {
		refs[info.Name], _ = imageRef(info.Labels)
	}
	inner := map[string]bool{} // has another layer of the same image above it
	for _, info := range all {
		if isLayer(info.Labels) && refs[info.Name] == refs[info.Parent] {
			inner[info.Parent] = true
		}
	}
	chains := map[string]*ChainInfo{} // by ID of the snapshot whose device it is
	for _, info := range all {
		container := info.Kind != snapshots.KindCommitted
		top := info.Name
		if container {
			top = info.Parent
		} else if !isLayer(info.Labels) || inner[info.Name] {
			continue
		}
		c, err := s.chainOf(ctx, top)
		if err != nil || c == nil {
			continue
		}
		id := c.id
		if mode, _, err := s.writableMode(ctx, info); err == nil && mode != "" {
			if id, _, _, err = storage.GetInfo(ctx, info.Name); err != nil {
				return nil, err
			}
		}
		if chains[id] == nil {
			chains[id] = &ChainInfo{Ref: c.ref, Device: deviceID(id), Layers: len(c.layers), Containers: []string{}}
		}
		if container {
			chains[id].Containers = append(chains[id].Containers, info.Name)
		}
	}
	list := make([]ChainInfo, 0, len(chains))
	for _, c := range chains {
		list = append(list, *c)
	}
	slices.SortFunc(list, func(a, b ChainInfo) int { return cmp.Or(cmp.Compare(a.Ref, b.Ref), cmp.Compare(a.Device, b.Device)) })
	return list, nil
}

// Handler answers what clients of the daemon ask of the snapshotter:
//
//	GET /v1/snapshots  []ChainInfo
func (s *Snapshotter) Handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /v1/snapshots", func(w http.ResponseWriter, r *http.Request) {
		list, err := s.List(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(list) // a client that is gone does not want to know
	})
	return m
}
