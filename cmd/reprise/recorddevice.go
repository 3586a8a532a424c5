package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/probe"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// deviceFlags are those of record that only a device has.
type deviceFlags struct {
	path string
	pid  int
}

func (f *deviceFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.path, "device", "", "record the reads of this block device, by eBPF, instead of running a container; REF may be left out")
	fs.IntVar(&f.pid, "pid", 0, "with --device: only what the container of this process reads; ready when it listens")
}

// given tells whether a device is to be recorded.
func (f *deviceFlags) given(cmd *cobra.Command) bool {
	return cmd.Flags().Changed("device") || cmd.Flags().Changed("pid")
}

// notOfDevices are the flags that say how a container is run.
var notOfDevices = []string{
	"net", "entrypoint", "env", "user", "workdir", "ready-log", "ready-http", "ready-exec", "ready-exit", "runs", "merge",
}

// check finds what is wrong with the flags and arguments themselves.
func (f *deviceFlags) check(cmd *cobra.Command, a []string) error {
	for _, name := range notOfDevices {
		if fl := cmd.Flags().Lookup(name); fl != nil && fl.Changed {
			return usagef(cmd, "--%s is for a container that record runs, not for --device", name)
		}
	}
	switch port := cmd.Flags().Lookup("ready-port"); {
	case !cmd.Flags().Changed("device"):
		return usagef(cmd, "--pid needs --device")
	case f.path == "":
		return usagef(cmd, "--device is empty")
	case len(a) > 1 || cmd.ArgsLenAtDash() >= 0:
		return usagef(cmd, "--device takes an image reference at most, and runs no command")
	case f.pid < 0 || f.pid == 0 && cmd.Flags().Changed("pid"):
		return usagef(cmd, "--pid %d: not a process", f.pid)
	case port.Changed && port.Value.String() == "0":
		return usagef(cmd, "--ready-port 0: not a port")
	case len(a) == 0 && cmd.Flags().Changed("attach"):
		return usagef(cmd, "--attach needs the image reference")
	}
	return nil
}

// A deviceRecording is one of a device.
type deviceRecording struct {
	*recordFlags
	ref string     // of the image on the device; empty if none is given
	n   *node.Node // for the image; nil if none is given
}

// recordDevice is record --device.
func (f *recordFlags) recordDevice(cmd *cobra.Command, a []string) error {
	if err := cmp.Or(f.check(cmd), f.device.check(cmd, a), f.container.check(cmd)); err != nil {
		return err
	}
	rdev, readAhead, err := blockDevice(f.device.path)
	if err != nil {
		return err
	}
	d := &deviceRecording{recordFlags: f}
	h := tracefmt.Header{Space: tracefmt.DeviceSpace, Tool: tool(), ReadAhead: readAhead, Workload: f.trace.workload}
	if len(a) == 0 {
		return d.record(cmd, h, rdev)
	}
	if err := needRoot("record", "to map the files of the image"); err != nil {
		return err
	}
	d.ref = a[0]
	if d.n, err = f.node.open(cmd); err != nil {
		return err
	}
	if err = d.describe(cmd.Context(), &h); err == nil {
		err = d.record(cmd, h, rdev)
	}
	return errors.Join(err, d.n.Close())
}

// blockDevice says which device a node is, and its read-ahead in bytes.
func blockDevice(path string) (rdev uint64, readAhead int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, 0, fmt.Errorf("%s is not a block device", path)
	}
	sectors, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKRAGET)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: read-ahead: %w", path, err)
	}
	return st.Rdev, int64(sectors) << 9, nil
}

// describe puts what the image says of itself into the header. It opens the
// image, so that a wrong reference is known before the recording.
func (d *deviceRecording) describe(ctx context.Context, h *tracefmt.Header) error {
	im, err := d.n.OpenImage(ctx, d.ref, nil)
	if err != nil {
		return err
	}
	h.Image, h.Manifest, h.Args = im.Ref, im.Manifest, im.Command(nil)
	h.Workload = cmp.Or(h.Workload, artifact.DefaultWorkload(h.Args))
	return im.Close()
}

// record records until a rule ends it.
func (d *deviceRecording) record(cmd *cobra.Command, h tracefmt.Header, rdev uint64) error {
	h.Start = time.Now()
	p, err := d.probe(rdev, h.Start)
	if err != nil {
		return fmt.Errorf("record %s: %w", d.device.path, err)
	}
	defer p.Close()
	f, remove, err := traceFile(d.out)
	if err != nil {
		return err
	}
	defer remove()
	defer f.Close()
	rules := d.rules
	rules.Given = func(last bool) []tracefmt.Event {
		if last {
			_ = p.Close() // the next gives the error
		}
		return p.Reads()
	}
	rec, err := recorder.New(f, h, &rules)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "recording %s\n", d.device.path)
	listening := make(chan struct{})
	go func() {
		defer close(listening)
		d.awaitReady(p, rec, h.Start)
	}()
	reason, err := rec.Wait(cmd.Context())
	err = errors.Join(err, p.Close())
	<-listening
	if err != nil {
		return err
	}
	t, err := tracefmt.Open(f.Name())
	if err != nil {
		return fmt.Errorf("read back the trace: %w", err)
	}
	if err := d.summary(cmd, t, reason, p.Stats()); err != nil || d.n == nil {
		return err
	}
	// Also after an interrupt, which is one way to end a recording.
	return d.finish(context.WithoutCancel(cmd.Context()), cmd, t, f.Name())
}

// probe watches the device, and who listens if that matters.
func (d *deviceRecording) probe(rdev uint64, start time.Time) (*probe.Probe, error) {
	if d.device.pid != 0 {
		if err := inContainer(d.device.pid); err != nil {
			return nil, err
		}
	}
	o := &probe.Options{Devices: []uint64{rdev}, Start: start, Listen: d.container.port != 0 || d.device.pid != 0, Filter: d.device.pid != 0}
	p, err := probe.Start(o)
	if err != nil || d.device.pid == 0 {
		return p, err
	}
	if err := p.AddContainer(d.device.pid); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// inContainer makes sure that a process is in another mount namespace than this
// one: nothing else tells a container from the rest of the machine.
func inContainer(pid int) error {
	var here, there unix.Stat_t
	path := fmt.Sprintf("/proc/%d/ns/mnt", pid)
	if err := unix.Stat(path, &there); err != nil {
		return fmt.Errorf("process %d: %w", pid, &os.PathError{Op: "stat", Path: path, Err: err})
	}
	if err := unix.Stat("/proc/self/ns/mnt", &here); err == nil && here.Ino == there.Ino {
		return fmt.Errorf("process %d is in no container: leave out --pid, and give --ready-port", pid)
	}
	return nil
}

// awaitReady tells the recorder of the first socket that matters; it returns
// when the probe is closed.
func (d *deviceRecording) awaitReady(p *probe.Probe, rec *recorder.Recorder, start time.Time) {
	for l := range p.Listens() {
		if port := int(l.Addr.Port()); d.container.port == 0 || d.container.port == port {
			how := "port " + strconv.Itoa(port)
			if port == 0 {
				how = "listens on a port"
			}
			rec.ReadyAt(start.Add(l.At), how)
		}
	}
}

// summary says what was recorded, and what was not.
func (d *deviceRecording) summary(cmd *cobra.Command, t *tracefmt.Trace, reason string, s probe.Stats) error {
	w := cmd.ErrOrStderr()
	if s.Lost > 0 {
		fmt.Fprintf(w, "reprise: %d events were lost: the trace is not complete\n", s.Lost)
	}
	if s.Kernel > 0 {
		fmt.Fprintf(w, "reprise: %d of %d reads were made by threads of the kernel, for whom is not known\n", s.Kernel, s.Reads)
	}
	if len(t.Events) == 0 {
		return fmt.Errorf("nothing was read from %s: the trace is empty", d.device.path)
	}
	fmt.Fprintf(w, "recorded %s in %d reads of %s by %s, %s; ended by %s\n",
		size(t.Bytes()), len(t.Events), d.device.path, readers(t), readiness(t), reason)
	return nil
}

// readers names the processes of a trace, those that read most first.
func readers(t *tracefmt.Trace) string {
	bytes := map[string]int64{}
	for _, e := range t.Events {
		bytes[e.Process] += e.Len
	}
	names := make([]string, 0, len(bytes))
	for name := range bytes {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(bytes[b], bytes[a]), cmp.Compare(a, b)) })
	const most = 3
	if more := len(names) - most; more > 0 {
		names = append(names[:most], fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// finish turns the trace of the device into one of the image, with the names of
// files, and attaches it if asked. If it fails, the trace of the device stays.
func (d *deviceRecording) finish(ctx context.Context, cmd *cobra.Command, t *tracefmt.Trace, path string) error {
	mapped, err := d.mapped(ctx, t)
	if err != nil {
		if d.out != "" {
			err = fmt.Errorf("%w; %s holds the trace of the device", err, path)
		}
		return err
	}
	if err := node.ReplaceTrace(path, mapped); err != nil {
		return err
	}
	if all, of := mapped.Bytes(), t.Bytes(); all < of {
		fmt.Fprintf(cmd.ErrOrStderr(), "%s of them lie in layers of the image\n", size(all))
	}
	if !d.attach {
		return nil
	}
	return attachFile(ctx, cmd.OutOrStdout(), d.n.Registry(), d.ref, path, attachOptions{})
}

func (d *deviceRecording) mapped(ctx context.Context, t *tracefmt.Trace) (*tracefmt.Trace, error) {
	files, info, err := d.n.Files(ctx, d.ref)
	if err != nil {
		return nil, err
	}
	mapped, err := recorder.FromDevice(t, info.Map, info.Layers)
	if err != nil {
		return nil, err
	}
	if len(mapped.Events) == 0 {
		return nil, fmt.Errorf("nothing that was read from %s lies in a layer of %s", d.device.path, d.ref)
	}
	mapped.Image, mapped.Manifest, mapped.Platform = info.Image, info.Manifest, info.Platform
	files.Annotate(mapped)
	return mapped, nil
}
