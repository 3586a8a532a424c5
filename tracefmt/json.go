package tracefmt

import (
	"encoding/json"
	"time"

	"github.com/opencontainers/go-digest"
)

// originNames are the values of Event.Origin.
var originNames = [...]string{"local", "cache", "prefetch", "flight", "fetch"}

type jsonTrace struct {
	Header jsonHeader  `json:"header"`
	Events []jsonEvent `json:"events"`
	End    *jsonEnd    `json:"end"`
}

type jsonHeader struct {
	Version   int           `json:"version"`
	Image     string        `json:"image,omitempty"`
	Manifest  digest.Digest `json:"manifest,omitempty"`
	Platform  string        `json:"platform,omitempty"`
	Layers    []jsonLayer   `json:"layers,omitempty"`
	Workload  string        `json:"workload,omitempty"`
	Args      []string      `json:"args,omitempty"`
	Tool      string        `json:"tool,omitempty"`
	Start     *time.Time    `json:"start,omitempty"`
	ReadAhead int64         `json:"readahead,omitempty"`
	Space     string        `json:"space"`
	Runs      int           `json:"runs,omitempty"`
}

type jsonLayer struct {
	Digest  digest.Digest `json:"digest,omitempty"`
	Size    int64         `json:"size"`
	Decoded int64         `json:"decoded"`
}

type jsonEvent struct {
	At        int64  `json:"at_us"`
	Wait      int64  `json:"wait_us"`
	Layer     int    `json:"layer"`
	Off       int64  `json:"offset"`
	Len       int64  `json:"length"`
	Origin    string `json:"origin"`
	Path      string `json:"path,omitempty"`
	FileOff   *int64 `json:"file_offset,omitempty"`
	Process   string `json:"process,omitempty"`
	Pid       int    `json:"pid,omitempty"`
	Container string `json:"container,omitempty"`
	Hits      int    `json:"hits,omitempty"`
	BlobOff   *int64 `json:"blob_offset,omitempty"`
	BlobLen   int64  `json:"blob_length,omitempty"`
}

type jsonEnd struct {
	Reason   string `json:"reason"`
	Ready    int64  `json:"ready_us"`
	Events   int    `json:"events"`
	Bytes    int64  `json:"bytes"`
	Duration int64  `json:"duration_us"`
}

// MarshalJSON gives {"header": …, "events": [{"at_us", "layer", "offset",
// "length", …}], "end": …}; end is null if the trace was cut off. What is not
// known of an event is left out.
func (t *Trace) MarshalJSON() ([]byte, error) {
	j := jsonTrace{Header: t.Header.json(), Events: make([]jsonEvent, len(t.Events))}
	for i := range t.Events {
		j.Events[i] = t.Events[i].json()
	}
	if e := t.End; e != nil {
		j.End = &jsonEnd{e.Reason, e.Ready.Microseconds(), e.Events, e.Bytes, e.Duration.Microseconds()}
	}
	return json.Marshal(j)
}

func (h *Header) json() jsonHeader {
	j := jsonHeader{
		Version: h.Version, Image: h.Image, Manifest: h.Manifest, Platform: h.Platform,
		Workload: h.Workload, Args: h.Args, Tool: h.Tool, ReadAhead: h.ReadAhead, Space: h.Space,
		Runs: h.Runs,
	}
	if !h.Start.IsZero() {
		j.Start = &h.Start
	}
	for _, l := range h.Layers {
		j.Layers = append(j.Layers, jsonLayer(l))
	}
	return j
}

func (e *Event) json() jsonEvent {
	j := jsonEvent{
		At: e.At.Microseconds(), Wait: e.Wait.Microseconds(), Layer: e.Layer, Off: e.Off, Len: e.Len,
		Origin: "unknown", Path: e.Path, Process: e.Process, Pid: e.Pid, Container: e.Container, Hits: e.Hits,
	}
	if int(e.Origin) < len(originNames) {
		j.Origin = originNames[e.Origin]
	}
	if e.Path != "" {
		off := e.FileOff
		j.FileOff = &off
	}
	if e.BlobLen > 0 {
		off := e.BlobOff
		j.BlobOff, j.BlobLen = &off, e.BlobLen
	}
	return j
}
