package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/registrytest"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// doctorOf runs doctor about an image and gives what it finds of its registry.
func (b *bench) doctorOf(ref string, more ...string) (list []finding, r result) {
	b.t.Helper()
	args := append([]string{"doctor", "--root", b.root, "--address", b.path("none"), "--containerd-config", b.path("none"), ref}, more...)
	r = b.run(append(args, "--json")...)
	require.Empty(b.t, r.stderr)
	var d diagnosis
	require.NoError(b.t, json.Unmarshal([]byte(r.stdout), &d))
	require.Equal(b.t, ref, d.Ref)
	for _, f := range d.Findings {
		if strings.HasPrefix(f.Group, groupRegistry) {
			list = append(list, f)
			require.Equal(b.t, f.Grade == broken || f.Grade == lacking, f.Remedy != "" && f.Grade != without, "%+v", f)
		}
	}
	b.t.Logf("%s: %+v", ref, list)
	return list, r
}

// TestDoctorRegistries asks registries of all kinds about an image that they have.
func TestDoctorRegistries(t *testing.T) {
	skipUnprivileged(t) // to convert the image
	registrytest.Each(t, registrytest.Options{}, func(t *testing.T, g *registrytest.Registry) {
		b := newBench(t)
		small.make(t)
		ref := g.Addr + smallName
		b.ok("convert", "--cache-dir", small.converted(), small.source(), ref)
		list, _ := b.doctorOf(ref)
		require.Equal(t, fine, findingOf(t, list, g.Addr).Grade)
		require.Contains(t, findingOf(t, list, g.Addr).Detail, "asked without credentials")
		require.Contains(t, findingOf(t, list, "image").Detail, "5 layers in overlaybd format")
		require.Equal(t, fine, findingOf(t, list, "ranges").Grade)
		want := map[bool]grade{true: fine, false: without}[g.Referrers]
		require.Equal(t, want, findingOf(t, list, "referrers").Grade)
		require.Contains(t, findingOf(t, list, "traces").Remedy, "reprise record --attach "+ref)
	})
}

// TestDoctorRegistryFaults has a registry do what registries do.
func TestDoctorRegistryFaults(t *testing.T) {
	skipUnprivileged(t) // to convert the image
	b := newBench(t)
	s := b.ownSite(false)
	ordinary := b.pushOrdinary(s)
	list, _ := b.doctorOf(ordinary)
	require.Contains(t, findingOf(t, list, "image").Remedy, "reprise convert "+ordinary)
	require.Equal(t, without, findingOf(t, list, "image").Grade)

	blobs := func(f regtest.Fault) func(*http.Request) *regtest.Fault { return to("/blobs/", f) }
	manifests := func(f regtest.Fault) func(*http.Request) *regtest.Fault { return to("/manifests/", f) }
	tests := []struct {
		name, ref string
		fault     func(*http.Request) *regtest.Fault
		of        string
		grade     grade
		says      []string
	}{
		{"whole layers", s.ref, blobs(regtest.Fault{IgnoreRange: true}), "ranges", broken, []string{"whole layers", "obey Range"}},
		{"whole layers of an ordinary image", ordinary, blobs(regtest.Fault{IgnoreRange: true}), "ranges", lacking, []string{"whole layers"}},
		{"lost layers", s.ref, blobs(regtest.Fault{Status: 404}), "ranges", broken, []string{"a layer cannot be read", "check the name"}},
		{"refused", s.ref, manifests(regtest.Fault{Status: 403}), s.addr, broken, []string{"403 forbidden", "asked without credentials", "run `docker login " + s.addr + "`"}},
		{"no such image", s.addr + "/tests/none:1", nil, s.addr, broken, []string{"404 not found", "check the name and the tag"}},
		{"overloaded", s.ref, manifests(regtest.Fault{Status: 503}), s.addr, broken, []string{"503 service unavailable", "ask who runs it"}},
		{"limited", s.ref, manifests(regtest.Fault{Status: 429}), s.addr, broken, []string{"the registry limits requests"}},
		{"cut off", s.ref, manifests(regtest.Fault{Reset: true}), s.addr, broken, []string{"HTTPS_PROXY"}},
		{"broken referrers", s.ref, to("/referrers/", regtest.Fault{Status: 500}), "referrers", lacking, []string{"500", "ask who runs it"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s.SetFault(tt.fault)
			defer s.SetFault(nil)
			list, r := b.doctorOf(tt.ref)
			f := findingOf(t, list, tt.of)
			require.Equal(t, tt.grade, f.Grade, "%+v", f)
			for _, w := range tt.says {
				require.Contains(t, f.Detail+"\n"+f.Remedy, w)
			}
			if tt.grade == broken {
				require.Equal(t, exitFailed, r.code)
			}
		})
	}
	text := b.run("doctor", "--root", b.root, s.ref).stdout
	require.Contains(t, text, "\nRegistry "+s.addr+"\n")
	require.Contains(t, text, "\n"+s.ref+" can be loaded.\n")
	require.Contains(t, b.run("doctor", "--root", b.root, s.addr+"/none").stdout, "/none cannot be loaded: see FAIL above (1).\n")
}

// TestDoctorCredentials has a registry that wants some.
func TestDoctorCredentials(t *testing.T) {
	skipUnprivileged(t) // to convert the image
	b := newBench(t)
	s := b.ownSite(false)
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if user, password, _ := r.BasicAuth(); user == "alice" && password == "good" {
			return nil
		}
		return &regtest.Fault{Status: 401, Header: http.Header{"Www-Authenticate": {`Basic realm="test"`}}}
	})
	list, _ := b.doctorOf(s.ref)
	f := findingOf(t, list, s.addr)
	require.Equal(t, broken, f.Grade)
	require.Contains(t, f.Detail, "asked without credentials")
	require.Contains(t, f.Remedy, "docker login "+s.addr)
	login := func(password string) {
		auth := base64.StdEncoding.EncodeToString([]byte("alice:" + password))
		b.write("config.json", fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, s.addr, auth))
	}
	login("expired")
	list, r := b.doctorOf(s.ref)
	f = findingOf(t, list, s.addr)
	require.Equal(t, broken, f.Grade)
	require.Contains(t, f.Detail, "asked as alice")
	require.Contains(t, f.Remedy, "docker login "+s.addr)
	login("good")
	list, more := b.doctorOf(s.ref)
	require.Equal(t, fine, findingOf(t, list, s.addr).Grade)
	require.Contains(t, findingOf(t, list, s.addr).Detail, "asked as alice")
	require.NotContains(t, r.stdout+more.stdout, "expired")
	login("expired")
	require.NoError(t, os.MkdirAll(b.root, 0o700))
	b.write("state/secrets.json", fmt.Sprintf(`{"version":1,"secrets":{%q:{"username":"alice","password":"good"}}}`, strings.TrimSuffix(s.ref, ":obd")))
	list, r = b.doctorOf(s.ref)
	require.Equal(t, fine, findingOf(t, list, s.addr).Grade)
	require.Contains(t, findingOf(t, list, s.addr).Detail, "asked as alice, by the image pull secret")
	require.NotContains(t, r.stdout, "good")
	b.write("config.json", "{")
	list, _ = b.doctorOf(s.ref)
	require.Equal(t, broken, findingOf(t, list, "credentials").Grade)
}

// TestDoctorMirrors has hosts.toml name mirrors that are and are not there, and
// hosts whose certificates nobody trusts.
func TestDoctorMirrors(t *testing.T) {
	skipUnprivileged(t) // to convert the image
	b := newBench(t)
	s := b.ownSite(false)
	other, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("other")})
	require.NoError(t, err)
	empty := b.site("0s,unlimited", other)
	gone := unusedAddr(t)
	secret := httptest.NewUnstartedServer(http.NotFoundHandler())
	secret.Config.ErrorLog = log.New(io.Discard, "", 0)
	secret.StartTLS()
	defer secret.Close()
	untrusted := secret.Listener.Addr().String()
	dir := b.mkdir("hosts")
	hosts := func(registry, text string) {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, registry), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, registry, "hosts.toml"), []byte(text), 0o600))
	}
	host := func(url string) string { return "[host.\"" + url + "\"]\ncapabilities = [\"pull\", \"resolve\"]\n" }

	hosts("example.test", "server = \"http://"+s.addr+"\"\n"+host("http://"+empty.addr)+host("http://"+gone)+host("https://"+untrusted))
	ref := "example.test" + smallName
	list, _ := b.doctorOf(ref, "--hosts-dir", dir)
	require.Equal(t, fine, findingOf(t, list, empty.addr).Grade)
	require.Contains(t, findingOf(t, list, empty.addr).Detail, "does not have the image")
	require.Equal(t, lacking, findingOf(t, list, gone).Grade, "another host has the image")
	require.Contains(t, findingOf(t, list, gone).Detail, "connection refused")
	require.Equal(t, lacking, findingOf(t, list, untrusted).Grade)
	require.Contains(t, findingOf(t, list, untrusted).Remedy, "CA")
	require.Contains(t, findingOf(t, list, empty.addr).Detail, "mirror: ")
	require.Equal(t, fine, findingOf(t, list, s.addr).Grade)
	require.NotContains(t, findingOf(t, list, s.addr).Detail, "mirror: ")
	require.Equal(t, fine, findingOf(t, list, "ranges").Grade)

	hosts("example.test", "server = \"https://"+s.addr+"\"\n")
	list, _ = b.doctorOf(ref, "--hosts-dir", dir)
	require.Equal(t, broken, findingOf(t, list, s.addr).Grade)
	require.Contains(t, findingOf(t, list, s.addr).Remedy, "plain HTTP")
	hosts("example.test", "server = [")
	list, _ = b.doctorOf(ref, "--hosts-dir", dir)
	require.Contains(t, findingOf(t, list, "hosts").Remedy, "correct hosts.toml")
}

// unusedAddr is where nobody listens.
func unusedAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}
