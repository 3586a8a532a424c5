package keeper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// envProtocol names the file in which a service of the real systemd writes down
// what it was handed.
const envProtocol = "REPRISE_KEEPER_PROTOCOL"

// beService is a service that kills itself after each step. What it has to do
// next it learns from what was kept.
func beService() error {
	s, err := OpenStore()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(os.Getenv(envProtocol), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	fds := s.Take("vol")
	content := make([]byte, 100)
	if fd, ok := fds["fuse"]; ok {
		n, err := unix.Pread(fd, content, 0)
		if err != nil {
			return err
		}
		content = content[:n]
	} else {
		content = nil
	}
	fmt.Fprintf(out, "%v %v %s %s\n", s.Kept(), s.Supervised(), strings.Join(s.Names(), ","), content)
	if err := errors.Join(s.Status("step"), s.Ready()); err != nil {
		return err
	}
	switch len(content) {
	case 0:
		for _, role := range []string{"fuse", "mount"} {
			fd, err := unix.MemfdCreate(role, unix.MFD_CLOEXEC)
			if err != nil {
				return err
			}
			fds[role] = fd
			if err := s.Store("vol."+role, fd); err != nil {
				return err
			}
		}
		r, w, err := os.Pipe() // its end hangs up: FDPOLL=0 counts
		if err != nil {
			return err
		}
		if err := s.Store("pipe", int(r.Fd())); err != nil {
			return err
		}
		w.Close()
	case 2:
		if err := s.Remove("vol.mount"); err != nil {
			return err
		}
	case 4:
		fmt.Fprintln(out, "done")
		return nil
	}
	if _, err := unix.Pwrite(fds["fuse"], []byte("x"), int64(len(content))); err != nil {
		return err
	}
	return unix.Kill(os.Getpid(), unix.SIGKILL)
}

// The client is tried with a systemd of its own, a user's instance in fresh
// namespaces and control groups.
func TestRealSystemd(t *testing.T) {
	const systemd = "/lib/systemd/systemd"
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, tool := range []string{systemd, "systemctl", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs systemd: %v", err)
		}
	}
	groups := makeGroups(t)
	dir := t.TempDir()
	protocol := filepath.Join(dir, "protocol")
	units := filepath.Join(dir, ".config", "systemd", "user")
	require.NoError(t, os.MkdirAll(units, 0o700))
	self, err := os.Executable()
	require.NoError(t, err)
	unit := fmt.Sprintf(`[Unit]
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=%s
Environment=%s=service %s=%s
FileDescriptorStoreMax=8
Restart=on-failure
RestartSec=0
`, self, envChild, envProtocol, protocol)
	require.NoError(t, os.WriteFile(filepath.Join(units, "reprise-test.service"), []byte(unit), 0o600))

	cmd := exec.Command("sh", "-c", joinGroups(groups)+`exec unshare -pmf --mount-proc --kill-child sh -c '
		mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/own && chmod 700 /run/own || exit 3
		export XDG_RUNTIME_DIR=/run/own
		`+systemd+` --user --unit=basic.target &
		until [ -S /run/own/systemd/private ]; do kill -0 $! || exit 3; sleep 0.05; done
		systemctl --user start reprise-test.service
		read line'`)
	cmd.Env = append(cleanEnv(os.Environ()), "HOME="+dir, "SYSTEMD_LOG_TARGET=console")
	said, err := os.Create(filepath.Join(dir, "said"))
	require.NoError(t, err)
	defer said.Close()
	cmd.Stdout, cmd.Stderr = said, said
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		stdin.Close()
		<-ended
	}()

	text := ""
	for deadline := time.Now().Add(limit); !strings.HasSuffix(text, "done\n"); time.Sleep(10 * time.Millisecond) {
		b, _ := os.ReadFile(protocol)
		text = string(b)
		select {
		case err := <-ended:
			ended <- err
			b, _ := os.ReadFile(said.Name())
			if text == "" {
				t.Skipf("systemd does not run here: %v: %s", err, b)
			}
			t.Fatalf("%v: %s\n%s", err, b, text)
		default:
		}
		require.True(t, time.Now().Before(deadline), text)
	}
	require.Equal(t, `true false  
true false pipe,vol.fuse,vol.mount x
true false pipe,vol.fuse,vol.mount xx
true false pipe,vol.fuse xxx
true false pipe,vol.fuse xxxx
done
`, text)
}

// makeGroups makes the control groups that a systemd needs for its own.
func makeGroups(t *testing.T) (dirs []string) {
	t.Helper()
	for _, at := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(at, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(at, fmt.Sprintf("reprise-keeper-%d", os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skipf("needs a control group: %v", err)
		}
		dirs = append(dirs, dir)
		t.Cleanup(func() { require.Eventually(t, func() bool { return removeTree(dir) }, limit, 10*time.Millisecond) })
	}
	if dirs == nil {
		t.Skip("needs control groups")
	}
	return dirs
}

func joinGroups(dirs []string) string {
	var b strings.Builder
	for _, dir := range dirs {
		fmt.Fprintf(&b, "echo $$ > %s/cgroup.procs || exit 3\n", dir)
	}
	return b.String()
}

// removeTree removes control groups; false if one is still in use.
func removeTree(dir string) bool {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, d := range dirs {
		if err := unix.Rmdir(d); err != nil && err != unix.ENOENT {
			return false
		}
	}
	return true
}
