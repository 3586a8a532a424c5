package container

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCommand(t *testing.T) {
	for _, tt := range []struct {
		name                            string
		entry, cmd, newEntry, args, out []string
		err                             string
	}{
		{name: "image", entry: []string{"e"}, cmd: []string{"c"}, out: []string{"e", "c"}},
		{name: "args replace cmd", entry: []string{"e"}, cmd: []string{"c"}, args: []string{"a", "b"}, out: []string{"e", "a", "b"}},
		{name: "entrypoint replaces both", entry: []string{"e"}, cmd: []string{"c"}, newEntry: []string{"n"}, out: []string{"n"}},
		{name: "entrypoint and args", entry: []string{"e"}, cmd: []string{"c"}, newEntry: []string{"n"}, args: []string{"a"}, out: []string{"n", "a"}},
		{name: "no entrypoint", entry: []string{"e"}, newEntry: []string{}, args: []string{"a"}, out: []string{"a"}},
		{name: "nothing", err: "no command"},
		{name: "empty", cmd: []string{""}, err: "no command"},
		{name: "zero byte", cmd: []string{"a\x00"}, err: "zero byte"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := command(&Config{
				Image: ocispec.ImageConfig{Entrypoint: tt.entry, Cmd: tt.cmd}, Entrypoint: tt.newEntry, Args: tt.args,
			})
			if tt.err != "" {
				assert.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tt.out, out)
		})
	}
}

func TestEnvironment(t *testing.T) {
	id := identity{Home: "/home/a"}
	cfg := &Config{Image: ocispec.ImageConfig{Env: []string{"A=1", "junk", "=x", "B=1", "A=2", "Z=a\x00b"}}, Env: []string{"B=own", "HOME=/h"}}
	assert.Equal(t, []string{defaultPath, "HOME=/h", "A=2", "B=own"}, environment(cfg, id))
	assert.Equal(t, []string{"PATH=/x", "HOME=/home/a"}, environment(&Config{Image: ocispec.ImageConfig{Env: []string{"PATH=/x"}}}, id))
}

func TestWorkdir(t *testing.T) {
	for _, tt := range []struct{ image, own, want string }{
		{"", "", "/"}, {"/a/", "", "/a"}, {"a/../../b", "", "/b"}, {"/a", "/b", "/b"},
	} {
		assert.Equal(t, tt.want, workdir(&Config{Image: ocispec.ImageConfig{WorkingDir: tt.image}, Cwd: tt.own}))
	}
}

func TestLookupUser(t *testing.T) {
	const passwd = "root:x:0:0::/root:/bin/sh\nbob:x:7:8::/home/bob:/bin/sh\nminus:x:-1:5::/:\nhuge:x:4294967295:1::/:\nbroken\n"
	const group = "root:x:0:\nbob:x:8:\nwheel:x:10:root,bob\nodd:x:-3:minus\n"
	for _, tt := range []struct {
		spec string
		want identity
		err  string
	}{
		{spec: "", want: identity{Home: "/root", Groups: []uint32{10}}},
		{spec: "0", want: identity{Home: "/root", Groups: []uint32{10}}},
		{spec: "bob", want: identity{UID: 7, GID: 8, Home: "/home/bob", Groups: []uint32{10}}},
		{spec: "7", want: identity{UID: 7, GID: 8, Home: "/home/bob", Groups: []uint32{10}}},
		{spec: "bob:wheel", want: identity{UID: 7, GID: 10, Home: "/home/bob"}},
		{spec: "bob:77", want: identity{UID: 7, GID: 77, Home: "/home/bob"}},
		{spec: "1000", want: identity{UID: 1000, Home: "/"}},
		{spec: "1000:1001", want: identity{UID: 1000, GID: 1001, Home: "/"}},
		{spec: "eve", err: `user "eve"`},
		{spec: "bob:eve", err: "eve"},
		{spec: "minus", err: "out of range"},
		{spec: "huge", err: "out of range"},
		{spec: "-5", err: `user "-5"`},
	} {
		t.Run(tt.spec, func(t *testing.T) {
			got, err := lookupUser(tt.spec, strings.NewReader(passwd), strings.NewReader(group))
			if tt.err != "" {
				assert.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tt.want, got)
		})
	}
	got, err := lookupUser("5:6", nil, nil)
	require.NoError(t, err)
	assert.Equal(t, identity{UID: 5, GID: 6, Home: "/"}, got)
	_, err = lookupUser("bob", nil, nil)
	assert.Error(t, err)
}

// The image's links stay in the image.
func TestUserInLinks(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/etc", 0o755))
	must(t, os.WriteFile(dir+"/real", []byte("bob:x:7:8::/:\n"), 0o644))
	must(t, os.Symlink("../../../../real", dir+"/etc/passwd"))
	id, err := userIn(dir, "bob")
	require.NoError(t, err)
	assert.EqualValues(t, 7, id.UID)
	must(t, unix.Mkfifo(dir+"/etc/group", 0o644))
	_, err = userIn(dir, "bob:bob")
	assert.Error(t, err)
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]unix.Signal{
		"": unix.SIGTERM, "SIGQUIT": unix.SIGQUIT, "quit": unix.SIGQUIT, "9": unix.SIGKILL,
		"RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX": 64, "SIGRTMAX-1": 63,
	} {
		got, err := ParseSignal(in)
		assert.NoError(t, err, in)
		assert.Equal(t, want, got, in)
	}
	for _, in := range []string{"0", "-1", "65", "SIG", "SIGNONE", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMINx"} {
		_, err := ParseSignal(in)
		assert.Error(t, err, in)
	}
}

func TestRuntimeSpec(t *testing.T) {
	h := host{Hostname: "here", NoFile: 4096, Caps: 1<<unix.CAP_CHOWN | 1<<unix.CAP_SYS_ADMIN, Resolv: "/r", Hosts: "/h"}
	cfg := &Config{
		Image:   ocispec.ImageConfig{Cmd: []string{"run"}},
		Network: HostNetwork,
		Mounts:  []Mount{{Source: "/src", Target: "/dst", ReadOnly: true}},
	}
	s, err := runtimeSpec(cfg, identity{UID: 1, GID: 2, Groups: []uint32{3}, Home: "/"}, h, "/root")
	require.NoError(t, err)
	assert.Equal(t, specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}}, s.Process.User)
	assert.Equal(t, []string{"CAP_CHOWN"}, s.Process.Capabilities.Bounding)
	assert.Empty(t, s.Process.Capabilities.Ambient)
	assert.Empty(t, s.Process.Capabilities.Inheritable)
	assert.Equal(t, "here", s.Hostname)
	assert.Equal(t, []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}, s.Process.Rlimits)
	assert.NotNil(t, s.Linux.Seccomp)
	assert.Empty(t, s.Linux.CgroupsPath)
	assert.Nil(t, s.Linux.Resources)
	last := s.Mounts[len(s.Mounts)-1]
	assert.Equal(t, specs.Mount{Destination: "/dst", Type: "bind", Source: "/src", Options: []string{"rbind", "rprivate", "nosuid", "nodev", "ro"}}, last)
	network := func(s *specs.Spec) bool {
		for _, n := range s.Linux.Namespaces {
			if n.Type == specs.NetworkNamespace {
				return true
			}
		}
		return false
	}
	assert.False(t, network(s))
	cfg.Network, cfg.NoSeccomp = OwnNetwork, true
	s, err = runtimeSpec(cfg, identity{}, h, "/root")
	require.NoError(t, err)
	assert.True(t, network(s))
	assert.Nil(t, s.Linux.Seccomp)
}

func TestConfigFill(t *testing.T) {
	good := func() *Config {
		return &Config{LowerDir: "/x", Image: ocispec.ImageConfig{Cmd: []string{"a"}, StopSignal: "SIGQUIT"}}
	}
	cfg := good()
	require.NoError(t, cfg.fill())
	assert.Equal(t, HostNetwork, cfg.Network)
	assert.Equal(t, "ext4", cfg.FSType)
	assert.Equal(t, "SIGQUIT", cfg.StopSignal)
	for text, change := range map[string]func(*Config){
		"network":        func(c *Config) { c.Network = "bridge" },
		"absolute paths": func(c *Config) { c.Mounts = []Mount{{Source: "a", Target: "/b"}} },
		"KEY=VALUE":      func(c *Config) { c.Env = []string{"A"} },
		"no command":     func(c *Config) { c.Image.Cmd = nil },
	} {
		cfg := good()
		change(cfg)
		assert.ErrorContains(t, cfg.fill(), text)
	}
}

// What goes to the stage comes out there.
func TestConfigTravels(t *testing.T) {
	cfg := &Config{LowerDir: t.TempDir(), Args: []string{"a"}, Entrypoint: []string{}, Ready: Ready{Log: regexp.MustCompile("x")}}
	b, err := json.Marshal(cfg)
	require.NoError(t, err)
	mem, err := memFile("config", b)
	require.NoError(t, err)
	defer mem.Close()
	got, err := readConfig([]*os.File{mem, mem})
	require.NoError(t, err)
	cfg.Ready = Ready{}
	assert.Equal(t, cfg, got)
	_, err = readConfig([]*os.File{mem})
	assert.Error(t, err)
	_, err = readConfig(nil)
	assert.Error(t, err)
}

func TestReadyCheck(t *testing.T) {
	for _, tt := range []struct {
		ready Ready
		err   string
	}{
		{ready: Ready{}},
		{ready: Ready{Port: 80}},
		{ready: Ready{Port: -1}, err: "port -1"},
		{ready: Ready{Port: 65536}, err: "port 65536"},
		{ready: Ready{Port: 1, Exit: true}, err: "only one"},
		{ready: Ready{HTTP: "http://localhost"}},
		{ready: Ready{HTTP: "https://[::1]:99/x"}},
		{ready: Ready{HTTP: "ftp://localhost"}, err: "give a URL"},
		{ready: Ready{HTTP: "localhost:80"}, err: "give a URL"},
		{ready: Ready{HTTP: "http://example.org/"}, err: "of its own"},
		{ready: Ready{HTTP: "http://127.0.0.1:99999/"}, err: "port 99999"},
	} {
		err := tt.ready.check(OwnNetwork)
		if tt.err == "" {
			assert.NoError(t, err)
			continue
		}
		assert.ErrorContains(t, err, tt.err)
	}
}

func TestLogWatch(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		in         []string
		found      bool
	}{
		{"one piece", "^b$", []string{"a\nb\nc"}, true},
		{"split", "^hello world$", []string{"x\nhel", "lo wor", "ld", "\n"}, true},
		{"carriage return", "^b$", []string{"a\r\nb\r\n"}, true},
		{"no newline at the end", "^c$", []string{"a\nc"}, true},
		{"other line", "^ab$", []string{"a\nb\n"}, false},
		{"long line", "^x+$", []string{strings.Repeat("x", maxLine), strings.Repeat("y", maxLine) + "\n"}, true},
		{"after a long line", "^b$", []string{strings.Repeat("x", 3*maxLine), "\nb\n"}, true},
		{"empty line", "^$", []string{"\n"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := 0
			var w logWatch
			w.line([]byte("not yet expected b\n"))
			w.expect(regexp.MustCompile(tt.want), func(time.Time) { n++ })
			for _, s := range tt.in {
				w.line([]byte(s))
			}
			w.end()
			assert.Equal(t, tt.found, n == 1)
		})
	}
}

func TestTail(t *testing.T) {
	var w tail
	for range 3 {
		n, err := io.WriteString(&w, strings.Repeat("a", maxText-1))
		require.NoError(t, err)
		require.Equal(t, maxText-1, n)
	}
	_, _ = io.WriteString(&w, "end")
	assert.Len(t, w.String(), maxText)
	assert.True(t, strings.HasSuffix(w.String(), "aend"))
}

func TestRuncError(t *testing.T) {
	for msg, want := range map[string]int{
		`runc run failed: unable to start container process: exec: \"x\": executable file not found in $PATH`:                               127,
		`runc run failed: unable to start container process: error during container init: exec: \"/x\": stat /x: no such file or directory`: 127,
		`runc run failed: unable to start container process: exec: \"/x\": permission denied`:                                               126,
		`runc run failed: unable to start container process: exec: \"/etc\": is a directory`:                                                126,
		`runc run failed: seccomp: config provided but seccomp not supported`:                                                               125,
		`error mounting /x: no such file or directory`:                                                                                      125,
	} {
		err := runcError(strings.NewReader(`{"level":"warning","msg":"w"}`+"\n"+`{"level":"error","msg":"`+msg+`"}`+"\n"), io.EOF)
		var start *StartError
		require.ErrorAs(t, err, &start)
		assert.Equal(t, want, start.Status, msg)
		assert.NotContains(t, err.Error(), "runc run failed")
	}
	assert.ErrorIs(t, runcError(strings.NewReader("junk\n{}\n"), io.EOF), io.EOF)
}

func TestDeadChild(t *testing.T) {
	for stat, want := range map[string]bool{
		"7 (sh) Z 1 7 7 0": true, "7 (a) b) Z 1 7": true, "7 (sh) S 1 7": false, "7 (sh) Z 12 7": false, "": false, "7 (sh": false,
	} {
		assert.Equal(t, want, deadChild([]byte(stat)), stat)
	}
}

func TestParseListeners(t *testing.T) {
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0
   1: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 777 1
   2: 0100007F:0016 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 1 1
`
	got, err := parseListeners(strings.NewReader(text))
	require.NoError(t, err)
	assert.Equal(t, []listener{{8080, 12345}, {80, 777}}, got)
	got, err = parseListeners(strings.NewReader(""))
	assert.NoError(t, err)
	assert.Empty(t, got)
	_, err = parseListeners(strings.NewReader("h\n0: 0:zz 0:0 0A 0 0 0 0 0 1\n"))
	assert.Error(t, err)
}

// Both ways of listing agree, on a socket of our own.
func TestListWays(t *testing.T) {
	l := listen(t)
	p, err := newPortProbe("", "")
	require.NoError(t, err)
	defer p.close()
	if p.sock < 0 {
		t.Skip("needs sock_diag")
	}
	diag, err := p.list()
	require.NoError(t, err)
	assert.Contains(t, ports(diag), l)
	p.close()
	text, err := p.list()
	require.NoError(t, err)
	assert.Contains(t, ports(text), l)
	p.owners = "/proc"
	_, ok, err := p.listens(l)
	require.NoError(t, err)
	assert.True(t, ok, "this process owns it")
	p.owners = t.TempDir()
	for range 2 {
		_, ok, err = p.listens(l)
		require.NoError(t, err)
		assert.False(t, ok, "no process there does")
	}
}

func ports(list []listener) (all []int) {
	for _, l := range list {
		all = append(all, l.port)
	}
	return all
}

func TestTimelineString(t *testing.T) {
	at := time.Unix(100, 0)
	s := Timeline{Launched: at, StageReady: at.Add(time.Millisecond), Requested: at, Mounted: at.Add(2 * time.Millisecond)}.String()
	assert.Equal(t, "stage ready 1ms; after the request: mounted 2ms, runc started -, process started -, exited -", s)
}

func TestMoment(t *testing.T) {
	before := time.Now()
	at := moment(monotonic())
	assert.False(t, at.Before(before.Add(-time.Second)))
	assert.False(t, at.After(time.Now().Add(time.Second)))
}

func TestSeccompArchitectures(t *testing.T) {
	if runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64" {
		assert.NotEmpty(t, seccompArchitectures())
	}
}

func FuzzParseDiag(f *testing.F) {
	f.Add(diagRequest(unix.AF_INET))
	f.Add(bytes.Repeat([]byte{16, 0, 0, 0, 3, 0, 0, 0}, 4))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _, _ := parseDiag(b)
		if len(list)*72 > len(b) {
			t.Fatalf("%d sockets from %d bytes", len(list), len(b))
		}
	})
}

func FuzzParseListeners(f *testing.F) {
	f.Add([]byte("h\n0: 0:1F90 0:0 0A 0 0 0 0 0 1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, _ := parseListeners(bytes.NewReader(b))
		for _, l := range list {
			if l.port < 0 || l.port > 65535 {
				t.Fatal(l)
			}
		}
	})
}

func FuzzLookupUser(f *testing.F) {
	f.Add("bob:wheel", []byte("bob:x:1:2::/:\n"), []byte("wheel:x:3:bob\n"))
	f.Fuzz(func(t *testing.T, spec string, passwd, group []byte) {
		_, _ = lookupUser(spec, bytes.NewReader(passwd), bytes.NewReader(group))
	})
}

func FuzzRuncError(f *testing.F) {
	f.Add([]byte(`{"level":"error","msg":"exec: permission denied"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if runcError(bytes.NewReader(b), io.EOF) == nil {
			t.Fatal("no error")
		}
	})
}

func FuzzRuntimeSpec(f *testing.F) {
	f.Add([]byte(`{"Cmd":["a"],"Env":["A=b"],"User":"x","WorkingDir":"/a","StopSignal":"9"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg := &Config{LowerDir: "/"}
		if json.Unmarshal(b, &cfg.Image) != nil || cfg.fill() != nil {
			return
		}
		_, _ = ParseSignal(cfg.StopSignal)
		s, err := runtimeSpec(cfg, identity{}, host{}, "/")
		if err != nil {
			t.Fatal("fill let it pass: ", err)
		}
		for _, kv := range s.Process.Env {
			if strings.IndexByte(kv, '=') < 1 || strings.IndexByte(kv, 0) >= 0 {
				t.Fatalf("entry %q", kv)
			}
		}
	})
}

func TestIgnoresSignal(t *testing.T) {
	status := "Name:\tsh\nSigBlk:\t0000000000010000\nSigIgn:\t0000000000004000\nSigCgt:\t0000000000000002\n"
	for sig, want := range map[unix.Signal]bool{
		unix.SIGTERM: true,  // SigIgn does not count: it does not handle it
		unix.SIGINT:  false, // bit 1
		unix.SIGCHLD: false, // bit 16, blocked: it may be waited for
		unix.SIGHUP:  true,
	} {
		assert.Equal(t, want, ignoresSignal(status, sig), sig)
	}
	assert.False(t, ignoresSignal("", unix.SIGTERM), "nobody knows")
	assert.False(t, ignoresSignal("SigBlk:\tx\nSigCgt:\t0\n", unix.SIGTERM))
}
