package registrytest

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// config is for versions 2.8 and 3 alike. They say where they listen.
const config = `version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %q}
  delete: {enabled: %t}
  maintenance: {uploadpurging: {enabled: false}}
http: {addr: "127.0.0.1:0", secret: test}
`

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)

// dockerRegistry is where Debian's package has the program.
func dockerRegistry(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		missing(t, "needs docker-registry, of the Debian package of that name: %v", err)
	}
	return path
}

// distribution builds version 3 from its module, which .ci/registry names. Of
// several tests at once one builds it and the others find it up to date. One that
// somebody else has built will do where it cannot be built.
func distribution(t testing.TB) string {
	t.Helper()
	root := moduleRoot(t)
	path := filepath.Join(root, "bin", "tools", "registry")
	err := build(path, filepath.Join(root, ".ci", "registry"))
	if fi, e := os.Stat(path); err != nil && (e != nil || fi.Mode()&0o111 == 0) {
		missing(t, "needs distribution's registry, which cannot be built: %v", err)
	}
	return path
}

func build(path, module string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(filepath.Dir(path), ".registry.lock"), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	cmd := exec.Command("go", "-C", module, "build", "-buildvcs=false", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, e := os.Stat(filepath.Join(dir, "go.mod")); e == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	t.Fatalf("no go.mod above the working directory (%v)", err)
	return ""
}

// program runs a registry until the test ends.
func program(t testing.TB, path string, o Options) http.Handler {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf(config, filepath.Join(dir, "data"), !o.NoDeletes)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "serve", file)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "OTEL_TRACES_EXPORTER=none"}
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	addr := start(t, cmd)
	p, err := regtest.NewProxy("http://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// start returns once the program listens, and where.
func start(t testing.TB, cmd *exec.Cmd) (addr string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		t.Fatal(err)
	}
	var said strings.Builder
	lines := bufio.NewScanner(r)
	for addr == "" && lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			addr = m[1]
		}
	}
	through := make(chan struct{})
	go func() { // what else it says
		defer close(through)
		_, _ = io.Copy(io.Discard, r)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		<-through
		r.Close()
	})
	if addr == "" {
		t.Fatalf("%s does not listen:\n%s", cmd.Path, said.String())
	}
	return addr
}
