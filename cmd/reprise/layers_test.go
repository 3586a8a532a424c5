package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// manyLayers is an image of n layers, of which the command reads files in most.
// Sizes are as a long Dockerfile makes them: most layers change or add a few
// small files, some bring hundreds of kilobytes, a few are packages of
// megabytes of which a part is read.
func manyLayers(t testing.TB, n int) ([]testLayer, ocispec.ImageConfig) {
	base := append(programs(t, "bin/sh", "bin/cat", "bin/sleep"), dirs("proc", "dev", "sys", "tmp", "etc", "app")...)
	layers := []testLayer{base}
	var script strings.Builder
	for i := 1; i < n; i++ {
		dir := fmt.Sprintf("app/l%d", i)
		l := dirs("app", dir)
		add := func(name string, size int) {
			l = append(l, testFile{name: dir + "/" + name, body: program(uint64(i*100+len(l)), size)})
		}
		read := func(names ...string) {
			script.WriteString("cat")
			for _, name := range names {
				fmt.Fprintf(&script, " /%s/%s", dir, name)
			}
			script.WriteString(" > /dev/null\n")
		}
		switch {
		case i%13 == 7: // a package
			for j := range 10 {
				add(fmt.Sprintf("lib%d", j), 300_000+10_000*i)
			}
			read("lib1", "lib6")
		case i%5 == 2: // a component
			for j := range 18 {
				add(fmt.Sprintf("part%d", j), 4_000+500*i)
			}
			read("part3", "part17")
		case i%4 == 1: // a few files of which none is read
			add("doc", 9_000)
			add("changes", 30_000)
		default: // a setting, a script
			add("conf", 300)
			add("run", 12_000)
			read("conf", "run")
		}
		layers = append(layers, l)
	}
	layers[n-1] = append(layers[n-1], testFile{name: "app/start", body: []byte(script.String() + "echo done\n")})
	return layers, ocispec.ImageConfig{Cmd: []string{"/bin/sh", "/app/start"}, Env: []string{"PATH=/bin"}}
}

// program is content that compresses to about a half, as programs do.
func program(seed uint64, n int) []byte {
	p := randomBytes(seed, n)
	for i := range p {
		if i%64 >= 28 {
			p[i] = byte(i % 7)
		}
	}
	return p
}

// TestManyLayers counts the requests of a start of 44 layers with its trace.
func TestManyLayers(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	// The layers' indexes, the manifest, two lookups, and some 15 ranges: more on a
	// machine that is slow to ask for the indexes.
	const n, manyLink = 44, "10ms,200mbit"
	most := int64(72)
	if raceEnabled { // which is slower still
		most = 100
	}
	b := newBench(t)
	layers, config := manyLayers(t, n)
	writeLayout(t, b.path("source"), layers, config)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	s := b.site(manyLink, g)
	ref := s.addr + "/tests/many:obd"
	b.ok("convert", "oci:"+b.path("source"), ref)
	b.ok("record", "--root", b.mkdir("recorded"), "--attach", "-o", b.path("trace"), ref)

	start := func(trace string) regtest.Stats {
		s.Reset()
		r := b.run("run", "--root", b.mkdir("root-"+trace), "--trace", trace, "--explain", ref)
		require.Zero(t, r.code, r.stderr)
		require.Equal(t, "done\n", r.stdout)
		if trace == "auto" {
			require.Contains(t, r.stderr, "replay:   replayed")
		}
		stats := s.Stats()
		t.Logf("trace %s: %d requests, %d KiB, %v\n%s", trace, stats.Requests, stats.BytesSent>>10, stats.ByKind, r.stderr)
		return stats
	}
	lazy, replay := start("none"), start("auto")
	if !testing.Verbose() && replay.Requests < most {
		return
	}
	for _, r := range replay.Log {
		t.Logf("%8.1f ms %4s %-9s %-3d %s %s", r.Start.Sub(replay.Log[0].Start).Seconds()*1000, r.Method, r.Kind, r.Status,
			r.Path[max(0, len(r.Path)-30):], r.Range)
	}
	kinds := func(s regtest.Stats) (all []string) {
		for k, v := range s.ByKind {
			all = append(all, fmt.Sprintf("%s %d", k, v))
		}
		slices.Sort(all)
		return all
	}
	t.Logf("lazy: %d, %v; replay: %d, %v", lazy.Requests, kinds(lazy), replay.Requests, kinds(replay))
	require.Less(t, replay.Requests, most)
}
