package devicetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// The kill suite. A supervisor in the test's process keeps the descriptors of a
// server, which is the test binary once more and serves one file as a device.
// The device holds ext4, mounted, under a [Load]. The server is killed again
// and again, each time the next one adopts the device:
//
//	test: supervisor, load, killer ──SIGKILL──▶ server: device.Adopt over a file
//
// In the end nobody must have seen an error or a wrong byte, the file system
// must be clean, and nothing may be left.

// killEnv makes the test binary a server: see KillMain.
const killEnv = "REPRISE_TEST_KILL_SERVER"

// KillOptions describe a kill test. A zero field means its default.
type KillOptions struct {
	Transport  string // of the device, required
	SectorSize int    // bytes, default 4096
	Kills      int    // default 20
	// Pause is how long the server lives before kill i, counted from its start.
	// Default: 5 to 60 ms, every tenth time 100 to 500 ms.
	Pause func(i int, r *rand.Rand) time.Duration
	// Backend names an opener of KillMain, and Path its content, 64 MiB or more,
	// instead of a file with an ext4 that the suite makes.
	Backend, Path string
	// Load is run on the device that has appeared, until stop is closed, instead
	// of a [Load] on a mounted ext4.
	Load func(t *testing.T, dev string, stop <-chan struct{})
}

func (o *KillOptions) fill() {
	if o.Kills == 0 {
		o.Kills = 20
	}
	if o.SectorSize == 0 {
		o.SectorSize = 4096
	}
	if o.Pause == nil {
		unit := time.Millisecond
		if os.Getenv("REPRISE_VM") != "" { // the emulated machine
			unit *= 20
		}
		o.Pause = func(i int, r *rand.Rand) time.Duration {
			if i%10 == 9 {
				return time.Duration(100+r.IntN(400)) * unit
			}
			return time.Duration(5+r.IntN(55)) * unit
		}
	}
}

// server is what a server is told, as JSON in killEnv.
type server struct {
	Path      string // of the backend
	Backend   string // name of its opener
	Dir       string // of the state file and of ready
	Transport string
	Sector    int
}

func (s *server) statePath() string { return filepath.Join(s.Dir, "state") }
func (s *server) readyPath() string { return filepath.Join(s.Dir, "ready") }

const killID = "devicetest-kill"

// Opener opens the backend of a kill test's server, whose content is at path,
// and tells its size in bytes.
type Opener func(path string) (device.Backend, int64, error)

// KillMain makes the test binary the server of a kill test, if it was started
// as one; it does not return then. TestMain calls it first. openers are the
// backends that KillOptions can name, beside "" for a plain file.
func KillMain(openers map[string]Opener) {
	config := os.Getenv(killEnv)
	if config == "" {
		return
	}
	var s server
	err := json.Unmarshal([]byte(config), &s)
	if err == nil {
		open := openers[s.Backend]
		if open == nil {
			open = openFile
		}
		err = s.serve(open)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kill suite's server:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// fileBackend is a file with all the abilities of a device.
type fileBackend struct{ *os.File }

func (f fileBackend) Discard(off, n int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func openFile(path string) (device.Backend, int64, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	return fileBackend{f}, st.Size(), nil
}

// serve attaches the device, or adopts it, and serves until SIGTERM.
func (s *server) serve(open Opener) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	b, size, err := open(s.Path)
	if err != nil {
		return err
	}
	store, err := device.OpenStore()
	if err != nil {
		return err
	}
	d, err := s.device(b, size, store)
	if err != nil {
		return err
	}
	if err := writeFile(s.readyPath(), []byte(d.Path())); err != nil {
		return err
	}
	if err := store.Ready(); err != nil {
		return err
	}
	select {
	case <-stop:
	case <-d.Done():
		return errors.Join(errors.New("the device ended"), d.Err())
	}
	err = errors.Join(closeFree(d), os.Remove(s.statePath()))
	if c, ok := b.(io.Closer); ok {
		err = errors.Join(err, c.Close())
	}
	return err
}

// closeFree closes a device that is unmounted here, once the mount namespaces that
// other programs on this machine have made meanwhile, with a copy of the mount, have
// let go of it.
func closeFree(d *device.Device) error {
	for deadline := time.Now().Add(patience); ; {
		err := d.Close()
		var busy *device.BusyError
		if !errors.As(err, &busy) || len(busy.Mounts) > 0 || time.Now().After(deadline) {
			return err
		}
	}
}

func (s *server) device(b device.Backend, size int64, store *device.Store) (*device.Device, error) {
	_, writable := b.(io.WriterAt)
	o := &device.Options{
		Transport: s.Transport, ID: killID, Name: killID, SectorSize: s.Sector, ReadOnly: !writable, Keeper: store,
		Prepared: func(state device.State) error {
			p, err := json.Marshal(state)
			if err != nil {
				return err
			}
			return writeFile(s.statePath(), p)
		},
	}
	var state device.State
	p, err := os.ReadFile(s.statePath())
	if errors.Is(err, os.ErrNotExist) {
		return device.Attach(context.Background(), b, size, o)
	}
	if err == nil {
		err = json.Unmarshal(p, &state)
	}
	if err != nil {
		return nil, err
	}
	d, err := device.Adopt(context.Background(), b, state, store.Take(killID), o)
	if errors.Is(err, device.ErrGone) { // killed before anybody has seen the device
		d, err = device.Attach(context.Background(), b, size, o)
	}
	return d, err
}

// writeFile replaces a file as a whole, durably.
func writeFile(path string, p []byte) error {
	tmp, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	_, err = tmp.Write(p)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Kill runs the kill suite. The package's TestMain must call KillMain.
func Kill(t *testing.T, o KillOptions) {
	RequireRoot(t)
	o.fill()
	k := &killer{t: t, o: o, starts: make(chan int, 1), server: server{
		Path: o.Path, Backend: o.Backend, Dir: t.TempDir(), Transport: o.Transport, Sector: o.SectorSize,
	}}
	if o.Path == "" {
		k.server.Path = killFile(t)
	}
	k.supervise()
	dev := k.awaitReady()
	if o.Load != nil {
		k.killUnder(dev)
	} else {
		k.killMounted(dev)
	}
	k.stop()
	if o.Path == "" {
		Tool(t, "e2fsck", "-fn", k.server.Path)
	}
	CheckGone(t, killID)
}

// killMounted kills servers under a Load on the mounted device.
func (k *killer) killMounted(dev string) {
	dir, unmount := mountAt(k.t, dev, false, "")
	load, err := StartLoad(dir, LoadOptions{Writer: true})
	if err != nil {
		k.t.Fatal(err)
	}
	n := k.kill(load.Failed)
	result, err := load.Stop()
	if err != nil {
		k.t.Error(err)
	}
	k.report(n, result)
	unmount()
}

// killUnder kills servers under the caller's own load.
func (k *killer) killUnder(dev string) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		k.o.Load(k.t, dev, stop)
	}()
	n := k.kill(func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	close(stop)
	<-done
	k.report(n, "under a load of the test's own")
}

// killFile makes a file with an ext4 that holds what a Load reads.
func killFile(t *testing.T) string {
	t.Helper()
	tree := t.TempDir()
	if err := WriteTree(tree, 4, 1024); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "disk")
	Tool(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-d", tree, file, "64m")
	return file
}

// killer is a kill test while it lasts.
type killer struct {
	t      *testing.T
	o      KillOptions
	server server
	starts chan int // process IDs of servers, as they start; the last one only
	over   sync.WaitGroup
	cancel context.CancelFunc
	err    error // of the supervisor

	mu     sync.Mutex      // guards what follows
	served bool            // the last server is ready, and was not killed
	last   int             // the last server
	killed int             // the last that was killed
	start  time.Time       // of the last server
	took   []time.Duration // from start to ready
}

func (k *killer) started(pid int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.start, k.last = time.Now(), pid
}

func (k *killer) ready(pid int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.took = append(k.took, time.Since(k.start))
	k.served = pid == k.last && pid != k.killed // what a server said may be read after its death
}

// settle waits until the device is served again: it is taken away by the server.
func (k *killer) settle() {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		k.mu.Lock()
		served := k.served
		k.mu.Unlock()
		if served {
			return
		}
		if time.Now().After(deadline) {
			k.t.Error("no server becomes ready after the last kill")
			return
		}
	}
}

// report says how fast servers came back.
func (k *killer) report(kills int, what any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	slices.Sort(k.took)
	n := len(k.took)
	k.t.Logf("%s: %d kills, %d of them before the server was ready; started to ready %v, at most %v; %v", k.o.Transport,
		kills, max(kills+1-n, 0), k.took[n/2].Round(100*time.Microsecond), k.took[n-1].Round(100*time.Microsecond), what)
}

func (k *killer) supervise() {
	config, err := json.Marshal(k.server)
	if err != nil {
		k.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	k.cancel = cancel
	o := &device.SuperviseOptions{
		Command: []string{os.Args[0]},
		Env:     append(os.Environ(), killEnv+"="+string(config)),
		OnReady: k.ready,
		OnStart: func(pid int) {
			k.started(pid)
			select {
			case <-k.starts: // nobody has killed that one
			default:
			}
			k.starts <- pid
		},
	}
	k.over.Go(func() { k.err = device.Supervise(ctx, o) })
	k.t.Cleanup(k.stop)
}

// stop ends server and supervisor.
func (k *killer) stop() {
	k.cancel()
	k.over.Wait()
	if k.err != nil && !errors.Is(k.err, context.Canceled) {
		k.t.Errorf("supervise: %v", k.err)
		k.err = nil
	}
}

// awaitReady waits until a server has the device.
func (k *killer) awaitReady() string {
	k.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if dev, err := os.ReadFile(k.server.readyPath()); err == nil {
			return string(dev)
		}
		if time.Now().After(deadline) {
			k.t.Fatal("the server does not become ready")
		}
	}
}

// kill kills servers until the load on them is over, or enough are dead. When it
// returns the device is served.
func (k *killer) kill(over func() bool) (n int) {
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for n < k.o.Kills && !over() {
		pid := wait(k.t, k.starts, "the next server")
		time.Sleep(k.o.Pause(n, r))
		k.mu.Lock()
		k.served, k.killed = false, pid
		k.mu.Unlock()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			k.t.Errorf("kill %d: %v", pid, err)
			break
		}
		n++
	}
	k.settle()
	return n
}
