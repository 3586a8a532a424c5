package snapshotter

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"
)

// listed is what the handler answers.
func (s *site) listed() (list []ChainInfo) {
	s.t.Helper()
	w := httptest.NewRecorder()
	s.sn.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/snapshots", nil))
	require.Equal(s.t, http.StatusOK, w.Code, w.Body)
	require.NoError(s.t, json.Unmarshal(w.Body.Bytes(), &list))
	return list
}

// What is listed follows what there is.
func TestList(t *testing.T) {
	s := newSite(t, nil)
	require.Empty(t, s.listed())
	top := s.pulled()
	c, err := s.sn.chain(t.Context(), top)
	require.NoError(t, err)
	shared := ChainInfo{Ref: c.ref, Device: c.device(), Layers: len(s.manifest.Layers), Containers: []string{}}
	require.Equal(t, []ChainInfo{shared}, s.listed(), "an image that nothing uses")

	_, err = s.sn.Prepare(t.Context(), "default/1/one", top)
	require.NoError(t, err)
	_, err = s.sn.View(t.Context(), "default/2/view", top)
	require.NoError(t, err)
	_, err = s.sn.Prepare(t.Context(), "default/3/own", top, snapshots.WithLabels(map[string]string{LabelWritable: WritableDir}))
	require.NoError(t, err)
	shared.Containers = []string{"default/1/one", "default/2/view"}
	own := ChainInfo{Ref: c.ref, Device: deviceID(s.id("default/3/own")), Layers: shared.Layers, Containers: []string{"default/3/own"}}
	require.ElementsMatch(t, []ChainInfo{shared, own}, s.listed())
	devices := map[string]bool{}
	for _, st := range s.server.List() {
		devices[st.ID] = true
	}
	require.Equal(t, map[string]bool{shared.Device: true, own.Device: true}, devices, "by the names that they have")

	// What is ordinary is on no chain, and what is above one is on that.
	_, err = s.sn.Prepare(t.Context(), "plain", "")
	require.NoError(t, err)
	require.NoError(t, s.sn.Commit(t.Context(), "committed", "default/1/one"))
	shared.Containers = []string{"default/2/view"}
	require.ElementsMatch(t, []ChainInfo{shared, own}, s.listed())
	_, err = s.sn.Prepare(t.Context(), "default/4/above", "committed")
	require.NoError(t, err)
	shared.Containers = []string{"default/2/view", "default/4/above"}
	require.ElementsMatch(t, []ChainInfo{shared, own}, s.listed())

	for _, key := range []string{"default/4/above", "committed", "plain", "default/3/own", "default/2/view"} {
		require.NoError(t, s.sn.Remove(t.Context(), key))
	}
	for _, name := range reversed(chainIDs(s.manifest.Layers)) {
		require.NoError(t, s.sn.Remove(t.Context(), name))
	}
	require.Empty(t, s.listed())
}

// An image that is the lower part of another is one of its own.
func TestListParts(t *testing.T) {
	s := newSite(t, nil)
	s.pulled()
	accel := s.pushed(layerTar(t, "trace", ""), map[string]string{labelAccel: "yes"})
	ref, desc, m := s.above("more", accel)
	s.pull(ref, desc, m.Layers, func(int, []mount.Mount) {})
	list := s.listed()
	require.Len(t, list, 2)
	require.NotEqual(t, list[0].Ref, list[1].Ref)
	require.NotEqual(t, list[0].Device, list[1].Device)
	require.Equal(t, list[0].Layers, list[1].Layers, "an acceleration layer is none")
	for _, name := range reversed(chainIDs(m.Layers)) {
		require.NoError(t, s.sn.Remove(t.Context(), name))
	}
}
