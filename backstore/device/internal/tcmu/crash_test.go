package tcmu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// crashEnv makes the test binary a server that is going to be killed.
const crashEnv = "REPRISE_TEST_TCMU_SERVER"

// crash is what such a server does; JSON in crashEnv.
type crash struct {
	Block bool // the backend does not return
	Close bool // close the device, again and again
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(crashEnv); spec != "" {
		fmt.Fprintln(os.Stderr, crashServer([]byte(spec)))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// What the server writes to descriptor 3.
const (
	saysHBA   = 'h' // and the number
	saysKeep  = 'k' // with a descriptor; it is answered
	saysReady = 'r' // and the path
	control   = 3
)

func crashServer(spec []byte) error {
	var c crash
	if err := json.Unmarshal(spec, &c); err != nil {
		return err
	}
	disk := crashDisk()
	if c.Block {
		disk.hook = func(_ string, off int64) error {
			if off >= 1<<19 { // not the partition table
				select {}
			}
			return nil
		}
	}
	srv := request.New(disk, disk.config())
	cfg := testConfig("reprise-crash")
	cfg.Appear = func(hba int) error { return say(saysHBA, strconv.Itoa(hba)) }
	cfg.Keep = func(fd int) error {
		if err := unix.Sendmsg(control, []byte{saysKeep}, unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		_, err := unix.Read(control, make([]byte, 1))
		return err
	}
	for {
		d, err := Attach(context.Background(), srv, cfg)
		if err != nil {
			return err
		}
		if err := say(saysReady, d.Path()); err != nil {
			return err
		}
		if !c.Close {
			select {}
		}
		claim, err := d.Claim()
		if err != nil {
			return err
		}
		if err := d.Close(claim, time.Minute); err != nil {
			return err
		}
	}
}

func say(what byte, text string) error {
	return unix.Sendmsg(control, append([]byte{what}, text...), nil, nil, 0)
}

func crashDisk() *memory {
	disk := &memory{data: make([]byte, 1<<20)}
	for i := range disk.data {
		disk.data[i] = byte(i >> 12)
	}
	return disk
}

// A victim is a server and what is known of it.
type victim struct {
	t      *testing.T
	cmd    *exec.Cmd
	sock   int
	hba    int
	fd     int // kept
	ready  chan string
	listen chan struct{} // closed when nothing more can come
}

func startVictim(t *testing.T, c crash) *victim {
	t.Helper()
	spec, err := json.Marshal(c)
	require.NoError(t, err)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	v := &victim{t: t, sock: fds[0], fd: -1, ready: make(chan string, 1000), listen: make(chan struct{})}
	theirs := os.NewFile(uintptr(fds[1]), "control")
	defer theirs.Close()
	v.cmd = exec.Command("/proc/self/exe")
	v.cmd.Env = append(os.Environ(), crashEnv+"="+string(spec))
	v.cmd.Stderr = os.Stderr
	v.cmd.ExtraFiles = []*os.File{theirs}
	require.NoError(t, v.cmd.Start())
	go v.hear()
	return v
}

// hear takes down what the server says until its end of the socket is closed.
func (v *victim) hear() {
	defer close(v.listen)
	p, oob := make([]byte, 100), make([]byte, 100)
	for {
		n, oobn, _, _, err := unix.Recvmsg(v.sock, p, oob, unix.MSG_CMSG_CLOEXEC)
		if err != nil || n == 0 {
			return
		}
		switch p[0] {
		case saysHBA:
			v.hba, _ = strconv.Atoi(string(p[1:n]))
		case saysKeep:
			v.keep(oob[:oobn])
			unix.Write(v.sock, []byte{0})
		case saysReady:
			v.ready <- string(p[1:n])
		}
	}
}

func (v *victim) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 {
		return
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err == nil && len(fds) == 1 {
		v.drop()
		v.fd = fds[0]
	}
}

// drop closes what is kept.
func (v *victim) drop() {
	if v.fd >= 0 {
		unix.Close(v.fd)
		v.fd = -1
	}
}

// kill returns when the server's descriptors are closed; the process itself may
// have to wait for its device yet.
func (v *victim) kill() {
	require.NoError(v.t, v.cmd.Process.Kill())
	<-v.listen
	unix.Close(v.sock)
}

// buried waits for the process.
func (v *victim) buried() {
	v.t.Helper()
	done := make(chan error, 1)
	go func() { done <- v.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(patienceForTests):
		v.t.Fatal("the process that was killed is still there")
	}
}

// adopt goes on with the victim's device. It is nil if there is none.
func (v *victim) adopt(srv *request.Server) *Device {
	v.t.Helper()
	cfg := testConfig("reprise-crash")
	cfg.HBA = v.hba
	fd := v.fd
	v.fd = -1
	d, err := Adopt(v.t.Context(), srv, cfg, fd)
	if errors.Is(err, ErrGone) {
		return nil
	}
	require.NoError(v.t, err)
	return d
}

// readLater reads at 512 KiB, where the backend of a server may block.
func readLater(t *testing.T, path string) (got <-chan error) {
	f := directIO(t, path, os.O_RDONLY)
	c := make(chan error, 1)
	go func() {
		p := page()
		_, err := f.ReadAt(p, 1<<19)
		if err == nil && !bytes.Equal(p, bytes.Repeat([]byte{1 << 19 >> 12}, len(p))) {
			err = errors.New("wrong bytes")
		}
		c <- err
	}()
	return c
}

func outcome(t *testing.T, c <-chan error) error {
	t.Helper()
	select {
	case err := <-c:
		return err
	case <-time.After(patienceForTests):
		t.Fatal("the read does not end")
	}
	return nil
}

// TestOrphan has a server die with a request in the backend, and its device
// adopted, with and without a kept descriptor, or taken away.
func TestOrphan(t *testing.T) {
	needKernel(t)
	disk := crashDisk()
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	for name, after := range map[string]func(t *testing.T, v *victim, read <-chan error){
		"adopt": func(t *testing.T, v *victim, read <-chan error) {
			d := v.adopt(srv)
			require.NoError(t, outcome(t, read))
			require.NoError(t, d.Close(-1, time.Minute))
		},
		"reopen": func(t *testing.T, v *victim, read <-chan error) {
			v.drop()
			d := v.adopt(srv)
			require.NoError(t, outcome(t, read))
			require.NoError(t, d.Close(-1, time.Minute))
		},
		"remove": func(t *testing.T, v *victim, read <-chan error) {
			v.drop()
			require.NoError(t, Remove("reprise-crash"))
			require.ErrorIs(t, outcome(t, read), unix.EIO)
		},
		"attach": func(t *testing.T, v *victim, read <-chan error) {
			v.drop()
			d, err := Attach(t.Context(), srv, testConfig("reprise-crash"))
			require.NoError(t, err)
			require.ErrorIs(t, outcome(t, read), unix.EIO)
			require.NoError(t, outcome(t, readLater(t, d.Path())))
			require.NoError(t, d.Close(-1, time.Minute))
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := startVictim(t, crash{Block: true})
			path := <-v.ready
			read := readLater(t, path)
			inFlight(t, path)
			v.kill()
			v.buried()
			after(t, v, read)
			nothingLeft(t)
		})
	}
}

// inFlight waits until the disk has a request that is not finished.
func inFlight(t *testing.T, path string) {
	t.Helper()
	deadline := time.Now().Add(patienceForTests)
	for time.Now().Before(deadline) {
		b, err := os.ReadFile("/sys/block/" + path[len("/dev/"):] + "/inflight")
		require.NoError(t, err)
		if f := bytes.Fields(b); len(f) == 2 && string(f[0]) != "0" {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the read does not reach the disk")
}

// TestDiesAnywhere kills a server while it attaches and closes, at random
// moments, and has the device adopted and closed.
func TestDiesAnywhere(t *testing.T) {
	needKernel(t)
	disk := crashDisk()
	srv := request.New(disk, disk.config())
	defer srv.Stop()
	r := rand.New(rand.NewPCG(3, 5))
	const rounds = 25
	adopted := 0
	for range rounds {
		v := startVictim(t, crash{Close: true})
		if r.IntN(2) == 0 {
			<-v.ready
		}
		time.Sleep(time.Duration(r.IntN(600)) * time.Millisecond)
		v.kill()
		if d := v.adopt(srv); d != nil {
			adopted++
			require.NoError(t, outcome(t, readLater(t, d.Path())))
			require.NoError(t, d.Close(-1, time.Minute))
		}
		v.buried()
		require.NoError(t, Remove("reprise-crash"))
		nothingLeft(t)
	}
	t.Logf("%d of %d adopted", adopted, rounds)
	require.NotZero(t, adopted)
}
