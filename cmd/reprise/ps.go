package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

func newPs() *cobra.Command {
	var root, address, path string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List the images, devices and containers of this node",
		Long: `List the images that containerd has for the snapshotter, those that mount and run
serve, and who uses them: how much of each is on this node, what its reads have
cost, and whether a trace is replayed, or why not. Images that nothing uses have
no device.

The names of containers are containerd's, where that can be reached; elsewhere
they are NAMESPACE/KEY of their snapshots.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadConfig(path)
			if err != nil {
				return err
			}
			if asConfigured(cmd, c); root == "" {
				return usagef(cmd, "--root is empty")
			}
			if err := needRoot("ps", "to ask who serves devices"); err != nil {
				return err
			}
			l, err := listImages(cmd.Context(), root, address)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, l)
			}
			return l.print(newTable(cmd.OutOrStdout()))
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&root, "root", node.DefaultRoot, "state directory")
	addConfig(cmd, &path)
	fs.StringVar(&address, "address", defaultCtrdSocket, "containerd's socket")
	fs.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// A listing is what ps prints.
type listing struct {
	Daemon *node.ServerInfo `json:"daemon"` // null without one
	// Containerd says why the names of containers are not known; empty if they are.
	Containerd string        `json:"containerd_error,omitempty"`
	Images     []listedImage `json:"images"`
}

// A listedImage is an image with its device, if it has one.
type listedImage struct {
	Name     string        `json:"name,omitempty"` // that containerd has for it, if that is known
	Ref      string        `json:"ref"`
	Manifest digest.Digest `json:"manifest,omitempty"`
	Layers   int           `json:"layers"`
	Device   *listedDevice `json:"device"`
	// Containers are those on it, empty for those of mount and run.
	Containers []listedContainer `json:"containers"`
}

type listedDevice struct {
	ID       string `json:"id"`
	Path     string `json:"path"`
	FSType   string `json:"fs_type"`
	Dir      string `json:"dir,omitempty"`
	Writable bool   `json:"writable"`
	Pid      int    `json:"pid"` // of the server
	Restarts int    `json:"restarts"`

	Size    int64 `json:"size"`    // of the layers' blobs, bytes
	Present int64 `json:"present"` // of them on this node
	Lazy    bool  `json:"lazy"`    // not all of them are

	Workload string `json:"workload"`
	// Trace says whether one is used: used, partly used, not used, not used yet,
	// not needed. Why says the rest.
	Trace     string          `json:"trace"`
	Why       string          `json:"trace_why"`
	Recording string          `json:"recording,omitempty"`
	Waiting   []string        `json:"waiting,omitempty"`
	Stats     backstore.Stats `json:"stats"`
}

// A listedContainer is known by its snapshot's key; the rest is containerd's.
type listedContainer struct {
	snapshotter.Container
}

// psAnswers is how long a server, or containerd, may take.
const psAnswers = 5 * time.Second

// listImages asks all servers of a state directory, and containerd.
func listImages(ctx context.Context, root, address string) (*listing, error) {
	clients, err := node.DialAll(root)
	if err != nil {
		return nil, err
	}
	l := &listing{Images: []listedImage{}}
	var devices []node.Status
	var chains []snapshotter.ChainInfo
	for _, c := range clients {
		defer c.Close()
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, psAnswers)
			defer cancel()
			list, err := c.List(ctx)
			if err != nil {
				return err
			}
			devices = append(devices, list...)
			if c.Socket() != node.SocketPath(root) {
				return nil
			}
			if l.Daemon, err = c.Server(ctx); err != nil {
				return err
			}
			return c.Get(ctx, "/snapshots", &chains)
		}()
		if err != nil && (c.Socket() == node.SocketPath(root) || ctx.Err() != nil) {
			return nil, fmt.Errorf("the server at %s: %w", c.Socket(), err)
		} // a server of one device may have ended since
	}
	var names ctrdNames
	if len(chains) > 0 {
		if names, err = askContainerd(ctx, address); err != nil {
			l.Containerd = err.Error()
		}
	}
	l.join(devices, chains, names)
	return l, nil
}

// ctrdNames are those that containerd has for things; empty where it was not asked.
type ctrdNames struct {
	containers map[string]snapshotter.Container // by NAMESPACE/KEY of their snapshots
	images     map[digest.Digest][]string
}

func askContainerd(ctx context.Context, address string) (names ctrdNames, err error) {
	if _, err := os.Stat(address); err != nil {
		return names, fmt.Errorf("containerd at %s: %s", address, reason(err))
	}
	ctx, cancel := context.WithTimeout(ctx, psAnswers)
	defer cancel()
	c, err := snapshotter.OpenContainerd(ctx, address)
	if err != nil {
		return names, err
	}
	defer c.Close()
	list, err := c.Containers(ctx)
	if err == nil {
		names.images, err = c.ImageNames(ctx)
	}
	if err != nil {
		return names, fmt.Errorf("containerd at %s: %w", address, err)
	}
	names.containers = map[string]snapshotter.Container{}
	for _, ctr := range list {
		names.containers[ctr.Namespace+"/"+ctr.SnapshotKey] = ctr
	}
	return names, nil
}

// image is the tag of a pinned reference.
func (n *ctrdNames) image(ref string) string {
	name, d, pinned := strings.Cut(ref, "@")
	for _, tag := range n.images[digest.Digest(d)] {
		if rest, ok := strings.CutPrefix(tag, name); pinned && ok && strings.HasPrefix(rest, ":") {
			return tag
		}
	}
	return ""
}

// join puts devices to the images that they are of, and containers on them.
func (l *listing) join(devices []node.Status, chains []snapshotter.ChainInfo, names ctrdNames) {
	byID := map[string]*node.Status{}
	for i := range devices {
		byID[devices[i].ID] = &devices[i]
	}
	for _, c := range chains {
		im := listedImage{Name: names.image(c.Ref), Ref: c.Ref, Layers: c.Layers, Containers: []listedContainer{}}
		for _, key := range c.Containers {
			im.Containers = append(im.Containers, newListedContainer(key, names.containers))
		}
		if st := byID[c.Device]; st != nil {
			im.has(st)
			delete(byID, c.Device)
		}
		l.Images = append(l.Images, im)
	}
	for _, st := range devices {
		if byID[st.ID] == nil {
			continue
		}
		im := listedImage{Ref: st.Ref, Containers: []listedContainer{}}
		im.has(&st)
		l.Images = append(l.Images, im)
	}
	slices.SortStableFunc(l.Images, func(a, b listedImage) int { return cmp.Compare(a.Ref, b.Ref) })
}

// newListedContainer is the container of a snapshot, whose key containerd has made
// NAMESPACE/NUMBER/KEY.
func newListedContainer(key string, containers map[string]snapshotter.Container) listedContainer {
	ns, rest, _ := strings.Cut(key, "/")
	if _, own, ok := strings.Cut(rest, "/"); ok {
		rest = own
	}
	if c, ok := containers[ns+"/"+rest]; ok {
		return listedContainer{c}
	}
	return listedContainer{snapshotter.Container{Namespace: ns, SnapshotKey: rest}}
}

// has notes the image's device.
func (im *listedImage) has(st *node.Status) {
	im.Manifest, im.Layers = st.Manifest, st.Layers
	im.Device = &listedDevice{
		ID: st.ID, Path: st.Device, FSType: st.FSType, Dir: st.Dir, Writable: st.Writable, Pid: st.Pid, Restarts: st.Restarts,
		Size: st.Size, Present: st.Present, Lazy: st.Present < st.Size,
		Workload: st.Workload, Recording: st.Recording, Waiting: st.Waiting, Stats: st.Total(),
	}
	im.Device.Trace, im.Device.Why, _ = strings.Cut(st.Explain, ": ")
}

// print writes a row an image, and below it what does not fit into one.
func (l *listing) print(t *table) error {
	rows := [][]string{{"IMAGE", "DEVICE", "ON THIS NODE", "FETCHED", "READS WAITED", "TRACE", "CONTAINERS"}}
	for _, im := range l.Images {
		rows = append(rows, im.row())
	}
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	for i, row := range rows {
		text := alignRow(row, widths)
		if i == 0 {
			t.line("%s\n", t.bold(text))
			continue
		}
		t.line("%s\n", text)
		for _, line := range l.Images[i-1].more() {
			t.line("    %s\n", t.fold(line, 6))
		}
	}
	for _, note := range l.notes() {
		t.line("\n%s\n", t.fold(note, 0))
	}
	return t.err
}

func alignRow(cells []string, widths []int) string {
	var b strings.Builder
	for i, cell := range cells {
		fmt.Fprintf(&b, "%-*s  ", widths[i], cell)
	}
	return strings.TrimRight(b.String(), " ")
}

func (im *listedImage) row() []string {
	row := []string{im.name(), "-", "-", "-", "-", "-", fmt.Sprint(len(im.Containers))}
	d := im.Device
	if d == nil {
		return row
	}
	row[1], row[2] = d.Path, d.onNode()
	row[3] = fmt.Sprintf("%s in %d", size(d.Stats.DemandBytes+d.Stats.BackgroundBytes), d.Stats.DemandRequests+d.Stats.BackgroundRequests)
	row[4], row[5] = short(d.Stats.Stall).String(), d.Trace
	return row
}

// name is the image as people know it: by its tag or that of a container, where there
// is one that is of the same repository, else with its digest cut short.
func (im *listedImage) name() string {
	if im.Name != "" {
		return im.Name
	}
	name, hex, pinned := strings.Cut(im.Ref, "@sha256:")
	if !pinned {
		return im.Ref
	}
	for _, c := range im.Containers {
		if rest, ok := strings.CutPrefix(c.Image, name); ok && strings.HasPrefix(rest, ":") {
			return c.Image
		}
	}
	return name + "@" + hex[:min(12, len(hex))]
}

func (d *listedDevice) onNode() string {
	if !d.Lazy {
		return "all of " + size(d.Size)
	}
	return fmt.Sprintf("lazy, %s of %s", size(d.Present), size(d.Size))
}

// more is what does not fit into a row, a line each.
func (im *listedImage) more() (lines []string) {
	if d := im.Device; d != nil {
		if d.Why != "" {
			lines = append(lines, "trace: "+d.Trace+": "+d.Why)
		}
		if d.Recording != "" {
			lines = append(lines, "recording: "+d.Recording)
		}
		for _, w := range d.Waiting {
			lines = append(lines, "reads wait for "+w)
		}
		if len(im.Containers) == 0 {
			lines = append(lines, d.where())
		}
	}
	for _, c := range im.Containers {
		lines = append(lines, "container "+c.String())
	}
	return lines
}

// where is what a device is for that no container of containerd is on.
func (d *listedDevice) where() string {
	switch {
	case strings.HasPrefix(d.ID, "snapshot-"):
		return "no container is on it any more: its device goes soon"
	case d.Dir != "":
		return "mounted at " + d.Dir
	}
	return fmt.Sprintf("served by process %d", d.Pid)
}

// String is one line.
func (c listedContainer) String() string {
	name := c.Namespace + "/" + c.SnapshotKey
	switch {
	case c.Pod != "":
		name = c.Pod + "/" + cmp.Or(c.Name, "(sandbox)")
	case c.ID != "":
		name = c.Namespace + "/" + c.ID
	}
	if c.State != "" {
		name += ", " + c.State
	}
	return name
}

// notes say what the table lacks.
func (l *listing) notes() (lines []string) {
	if l.Daemon == nil {
		return []string{"No daemon answers for this state directory: containerd's images are not listed."}
	}
	if l.Containerd != "" {
		lines = append(lines, "Containers have the names of their snapshots: "+l.Containerd)
	}
	return lines
}
