package node

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// finishTime bounds what comes after a recording: the search for the files that
// were read, and the pushing.
const finishTime = 5 * time.Minute

// A finishing is what comes after a recording. Its device may be gone.
type finishing struct {
	*autoRecording
	reason string // why the recording ended
	good   bool   // the container had not failed by then, as far as is known
	pin    *imageState
	m      recorder.DeviceMap
}

// finishing is called when the recorder is done.
func (a *autoRecording) finishing() *finishing {
	f := &finishing{autoRecording: a, pin: a.im.pinned(), m: a.im.deviceMap()}
	reason, err := a.rec.Wait(context.Background())
	f.reason = reason
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.drop != "":
	case err != nil:
		a.drop = err.Error()
	case a.started == 0:
		a.drop = "no process of a container was seen: " + reason
	case a.rec.Stats().Events == 0:
		a.drop = "nothing was read from the image: " + reason
	}
	f.good = strings.HasPrefix(reason, "ready: ") || a.alive && !strings.HasPrefix(reason, "stop: ")
	if a.drop == "" {
		a.says = "recorded: the trace is being finished"
	}
	return f
}

// run makes the trace whole and puts it beside its image, or keeps it.
func (f *finishing) run() {
	switch f.drop {
	case "":
	case notMissing:
		f.say("")
		return
	default:
		f.say("not recorded: " + f.drop)
		f.d.log.Info("the recording is dropped", "image", f.im.Ref, "workload", f.key.workload, "why", f.drop)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), finishTime)
	defer cancel()
	f.d.s.wg.Go(func() {
		select {
		case <-f.d.s.leaving:
			cancel()
		case <-ctx.Done():
		}
	})
	t, err := tracefmt.Read(bytes.NewReader(f.trace.Bytes()))
	if err != nil {
		f.say("not recorded: " + err.Error())
		f.d.log.Error("a recorded trace cannot be read", "image", f.im.Ref, "err", err)
		return
	}
	f.annotate(ctx, t)
	if !f.good {
		f.keep(t, "the container ended before it was ready ("+f.reason+"): look at the trace before you push it", f.path(true))
		return
	}
	f.attach(ctx, t)
}

// annotate names processes and files in the trace, as far as they can be known.
func (f *finishing) annotate(ctx context.Context, t *tracefmt.Trace) {
	if f.reads != nil {
		recorder.Attribute(t, f.reads, f.m)
	}
	ctx, cancel := context.WithTimeout(ctx, annotateTime)
	defer cancel()
	files, err := f.d.s.n.filesAgain(ctx, &f.d.state.Request, f.pin)
	if err != nil {
		f.missing = append(f.missing, "files are not named: "+err.Error())
		return
	}
	files.Annotate(t)
}

// attach puts the trace beside the image with the node's credentials.
func (f *finishing) attach(ctx context.Context, t *tracefmt.Trace) {
	e, err := f.push(ctx, t)
	switch {
	case err == nil:
		f.say("attached " + e.Descriptor.Digest.String())
		f.d.log.Info("a recorded trace is beside the image now", append(f.about(t), "trace", e.Descriptor.Digest)...)
		_ = os.Remove(f.path(true)) // of a container that had ended sooner
	case errors.Is(err, os.ErrExist):
		f.say("not needed: the image has got a trace of the workload meanwhile")
		f.d.log.Info("a recorded trace is not needed: the image has got one of the workload meanwhile", "image", f.im.Ref, "workload", f.key.workload)
	case denied(err):
		f.keepDenied(t, err)
	default:
		f.keep(t, err.Error(), f.path(false))
	}
}

// denied tells whether the node may not push.
func denied(err error) bool {
	return errdefs.IsPermissionDenied(err) || errdefs.IsUnauthorized(err) || errors.Is(err, errors.ErrUnsupported)
}

func (f *finishing) push(ctx context.Context, t *tracefmt.Trace) (artifact.Entry, error) {
	n, err := f.d.s.n.with(&f.d.state.Request, f.d.log.Logger)
	if err != nil {
		return artifact.Entry{}, err
	}
	defer n.client.Close()
	m, err := n.client.Manifest(ctx, f.pinnedRef(), nil)
	if err != nil {
		return artifact.Entry{}, err
	}
	store, err := artifact.New(n.client, f.im.Ref)
	if err != nil {
		return artifact.Entry{}, err
	}
	return store.Push(ctx, m.Descriptor, t, &artifact.PushOptions{Workload: f.key.workload, New: true})
}

// pinnedRef is the reference of the manifest that was recorded.
func (a *autoRecording) pinnedRef() string {
	r, err := registry.ParseReference(a.im.Ref)
	if err != nil { // it was opened
		return a.im.Ref
	}
	return r.Name() + "@" + a.key.manifest.String()
}

// keepDenied keeps a trace that the registry does not take from this node. It says
// so once a repository.
func (f *finishing) keepDenied(t *tracefmt.Trace, err error) {
	repository, _, _ := strings.Cut(f.pinnedRef(), "@")
	if f.d.s.recordings.first("denied " + repository) {
		f.d.log.Warn("this node may not put traces beside images; they are kept here", "repository", repository, "dir", tracesDir(f.d.s.n.o.Root), "err", err)
	}
	f.keep(t, "", f.path(false))
}

// keep writes the trace to a file of this node. An empty why has been told.
func (f *finishing) keep(t *tracefmt.Trace, why, path string) {
	if err := keepTrace(path, t); err != nil {
		f.say("not kept: " + err.Error())
		f.d.log.Error("a recorded trace is lost", "image", f.im.Ref, "why", cmp.Or(why, "it could not be pushed"), "err", err)
		return
	}
	f.say(fmt.Sprintf("kept: %s; push it with '%s'", path, f.command(path)))
	args := append(f.about(t), "file", path, "push", f.command(path))
	if why == "" {
		f.d.log.Info("a recorded trace is kept on this node", args...)
		return
	}
	f.d.log.Warn("a recorded trace is kept on this node", append(args, "why", why)...)
}

func keepTrace(path string, t *tracefmt.Trace) error {
	var p bytes.Buffer
	if err := tracefmt.Encode(&p, t); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return replaceFile(path, p.Bytes(), true)
}

// about describes the trace to the log.
func (f *finishing) about(t *tracefmt.Trace) []any {
	args := []any{"image", f.im.Ref, "workload", f.key.workload, "reads", len(t.Events), "bytes", t.Bytes(), "ended_by", f.reason}
	if len(f.missing) > 0 {
		args = append(args, "missing", strings.Join(f.missing, "; "))
	}
	return args
}
