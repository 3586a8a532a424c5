package main

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/replayer/node"
)

// uncommented is the sample with its keys in effect.
func uncommented() string {
	return regexp.MustCompile(`(?m)^#([a-z_]+ = |\[\[)`).ReplaceAllString(configSample, "$1")
}

// keys are the names of the keys of a table, those of tables in it too.
func keys(table reflect.Type, prefix string) (all []string) {
	for i := range table.NumField() {
		field := table.Field(i)
		key, t := prefix+field.Tag.Get("toml"), field.Type
		switch {
		case key == prefix: // not of the file
		case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
			all = append(all, keys(t.Elem(), key+".")...)
		case t.Kind() == reflect.Struct && t != reflect.TypeFor[duration]() && t != reflect.TypeFor[byteSize]():
			all = append(all, keys(t, key+".")...)
		default:
			all = append(all, key)
		}
	}
	return all
}

// keysOf are those that a document has.
func keysOf(v any, prefix string) (all []string) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			all = append(all, keysOf(value, prefix+"."+key)...)
		}
		return all
	case []any:
		if len(v) > 0 && reflect.TypeOf(v[0]).Kind() == reflect.Map {
			return keysOf(v[0], prefix)
		}
	}
	return []string{strings.TrimPrefix(prefix, ".")}
}

// TestConfigSample: the sample has all keys, and their defaults.
func TestConfigSample(t *testing.T) {
	c, err := parseConfig([]byte(configSample))
	require.NoError(t, err)
	require.Equal(t, defaultConfig(), c)

	c, err = parseConfig([]byte(uncommented()))
	require.NoError(t, err)
	require.Len(t, c.Policy.Rules, 1, "an example")
	r := c.Policy.Rules[0]
	require.Equal(t, []bool{true, true}, []bool{*r.Replay == c.Policy.Replay, *r.LookupTime == c.Policy.LookupTime})
	c.Policy.Rules = nil

	var f daemonFlags
	cmd := &cobra.Command{}
	f.add(cmd)
	require.NoError(t, c.apply(cmd, &f.nodeFlags))
	require.Empty(t, cmd.Flags().Lookup("config"))
	for _, key := range keys(reflect.TypeFor[config](), "") {
		if flag := flagOf(reflect.TypeFor[config](), key); flag != "" {
			fl := cmd.Flags().Lookup(flag)
			require.True(t, fl.Changed, key)
			require.Equal(t, fl.DefValue, fl.Value.String(), key)
		}
	}
	clearFlags(reflect.ValueOf(c).Elem())
	require.Equal(t, defaultConfig(), c)

	var doc map[string]any
	require.NoError(t, toml.Unmarshal([]byte(uncommented()), &doc))
	require.ElementsMatch(t, keys(reflect.TypeFor[config](), ""), keysOf(doc, ""))
	require.Equal(t, configSample, newBench(t).ok("daemon", "config"))
}

// flagOf is the flag of a key.
func flagOf(table reflect.Type, key string) string {
	first, rest, _ := strings.Cut(key, ".")
	for i := range table.NumField() {
		f := table.Field(i)
		if f.Tag.Get("toml") != first {
			continue
		}
		if rest != "" && f.Type.Kind() == reflect.Struct {
			return flagOf(f.Type, rest)
		}
		return f.Tag.Get("flag")
	}
	return ""
}

// clearFlags takes the keys away that are flags.
func clearFlags(table reflect.Value) {
	for i := range table.NumField() {
		switch f := table.Type().Field(i); {
		case f.Tag.Get("flag") != "":
			table.Field(i).SetZero()
		case f.Type.Kind() == reflect.Struct:
			clearFlags(table.Field(i))
		}
	}
}

// TestConfigBad: what is wrong is said in the words of the file.
func TestConfigBad(t *testing.T) {
	tests := []struct{ file, says string }{
		{"roof = \"/x\"", "line 1: unknown key roof"},
		{"\n[cache]\nsise = 1\n[log]\ncolour = true", "line 3: unknown key cache.sise; line 5: unknown key log.colour"},
		{"[polizei]\nreplay = true", "line 1: unknown key polizei"},
		{"[[policy.rule]]\nmatch = [\"a.b\"]\ntrace = false", "line 3: unknown key policy.rule.trace"},
		{"root", "line 1: expected '=' after key"},
		{"root = /x", "line 1: unexpected character U+002F '/' at start of value"},
		{"root = \"/x\"\nroot = \"/y\"", "line 2: root: key root is already defined"},
		{"root = 3", "line 1: root: it cannot be of type integer"},
		{"root = \"\"", "root is empty"},
		{"transport = \"pigeon\"", "transport pigeon: one of auto, fuse, erofs, ublk, nbd, tcmu"},
		{"platform = \"a/b/c/d\"", "platform: \"a/b/c/d\": cannot parse platform specifier: invalid argument"},
		{"cache = 3", "line 1: cache: it cannot be of type integer"},
		{"[cache]\nsize = 0", "cache.size 0: at least 1"},
		{"[cache]\nsize = \"big\"", "cache.size: \"big\" is not a size such as 65536 or \"512MiB\""},
		{"[cache]\nsize = true", "cache.size: \"true\" is not a size such as 65536 or \"512MiB\""},
		{"[cache]\nchunk_size = 3", "cache.chunk_size 3: a power of two from 512 to 1048576"},
		{"[cache]\ndecoded_size = -1", "cache.decoded_size -1: it cannot be negative"},
		{"[registry]\nplain_http = \"yes\"", "line 2: registry.plain_http: it cannot be of type string"},
		{"[registry]\nretry_for = 5", "registry.retry_for: \"5\" is not a duration such as \"300ms\" or \"1m30s\""},
		{"[registry]\nretry_for = \"0s\"", "registry.retry_for 0s: more than nothing"},
		{"[registry]\noutage = \"-1s\"", "registry.outage -1s: it cannot be negative"},
		{"[prefetch]\nrate = -1", "prefetch.rate -1: it cannot be negative"},
		{"[prefetch]\nin_flight = -1", "prefetch.in_flight -1: it cannot be negative"},
		{"[prefetch]\nrequests_per_minute = -1", "prefetch.requests_per_minute -1: it cannot be negative"},
		{"[snapshotter]\nlinger = \"0s\"", "snapshotter.linger 0s: more than nothing"},
		{"[snapshotter]\nwritable = \"floor\"", "snapshotter.writable \"floor\": one of overlayfs, dir, dev"},
		{"[policy]\nlookup_time = \"-1s\"", "policy.lookup_time -1s: more than nothing"},
		{"[policy]\nrecord = true", "line 2: policy.record: it cannot be of type boolean"},
		{"[policy]\nrecord = \"always\"", "policy.record \"always\": off or missing"},
		{"[[policy.rule]]\nreplay = false", "policy.rule 1: match is missing"},
		{"[[policy.rule]]\nmatch = [\"a.b\"]\n[[policy.rule]]\nmatch = [\"a.b\", \"https://c.d\"]", "policy.rule 2: match \"https://c.d\": leave out the scheme"},
		{"[[policy.rule]]\nmatch = [\"a.b/c:1\"]", "policy.rule 1: match \"a.b/c:1\": leave out the tag and the digest: a pattern names repositories"},
		{"[[policy.rule]]\nmatch = [\"alpine\"]", "policy.rule 1: match \"alpine\": name the registry too, as in docker.io/library/alpine"},
		{"[[policy.rule]]\nmatch = [\"a.b/\"]", "policy.rule 1: match \"a.b/\": a part is empty"},
		{"[[policy.rule]]\nmatch = [\"\"]", "policy.rule 1: match \"\": a part is empty"},
		{"[[policy.rule]]\nmatch = [\"a.b/[c\"]", "policy.rule 1: match \"a.b/[c\": a '[' has no end, or a '\\' nothing behind it"},
		{"[[policy.rule]]\nmatch = [\"a.b\"]\nlookup_time = \"0s\"", "policy.rule 1: lookup_time 0s: more than nothing"},
		{"[[policy.rule]]\nmatch = [\"a.b\"]\nrecord = \"\"", "policy.rule 1: record \"\": off or missing"},
		{"[[policy.rule]]\nmatch = [\"a.b\"]\nlookup_time = 1", "policy.rule 1.lookup_time: \"1\" is not a duration such as \"300ms\" or \"1m30s\""},
		{"[record]\nmax_bytes = false", "record.max_bytes: \"false\" is not a size such as 65536 or \"512MiB\""},
		{"[record]\nmax_bytes = -1", "record.max_bytes -1: it cannot be negative"},
		{"[log]\nlevel = \"loud\"", "log.level \"loud\": one of debug, info, warn, error"},
		{"[log]\nformat = \"xml\"", "log.format \"xml\": text or json"},
		{"[tracing]\nendpoint = \"localhost:4317\"", "tracing.endpoint \"localhost:4317\": not a URL such as http://127.0.0.1:4318"},
		{"[tracing]\nsample = 2.0", "tracing.sample 2: from 0 to 1"},
		{"[tracing]\nsample = nan", "tracing.sample NaN: from 0 to 1"},
	}
	b := newBench(t)
	for _, tt := range tests {
		path := b.write("config.toml", tt.file)
		if err := checkConfig(path); err == nil || err.Error() != path+": "+tt.says {
			t.Errorf("%s\n%v\nis not %s", tt.file, err, tt.says)
		}
	}
	// As the commands say it, before the question of privilege.
	path := b.write("config.toml", "[cache]\nsise = 1")
	want := "reprise: " + path + ": line 2: unknown key cache.sise\n"
	for _, args := range [][]string{{"daemon", "--config", path}, {"daemon", "config", "--check", "--config", path}} {
		r := b.run(args...)
		require.Equal(t, exitFailed, r.code)
		require.Equal(t, want, r.stderr)
	}
	b.fails(exitFailed, []string{"daemon", "--config", b.path("none")}, "configuration: open "+b.path("none")+": no such file or directory")
	b.fails(exitUsage, []string{"daemon", "--config", path, "--transport", "pigeon"}, "--transport pigeon: one of")
	b.fails(exitUsage, []string{"daemon", "config", "x"}, "unknown command")
	require.Empty(t, b.ok("daemon", "config", "--check", "--config", b.write("config.toml", uncommented())))
}

// TestConfigFlags: flags override the file, which overrides the defaults.
func TestConfigFlags(t *testing.T) {
	b := newBench(t)
	path := b.write("config.toml", `
root = "/file"
platform = "linux/arm64"
[registry]
plain_http = true
hosts_dir = "/hosts"
retry_for = "90s"
[cache]
size = "1.5GiB"
chunk_size = 4096
[prefetch]
rate = 1_000_000
requests_per_minute = 600
[containerd]
address = "/c.sock"
[metrics]
address = "127.0.0.1:1"
[policy]
lookup_time = "300ms"
[log]
level = "debug"
`)
	load := func(args ...string) *daemonFlags {
		var f daemonFlags
		cmd := &cobra.Command{}
		f.add(cmd)
		f.config = path
		require.NoError(t, cmd.ParseFlags(args))
		require.NoError(t, f.load(cmd))
		f.retryFor = f.outage(cmd)
		return &f
	}
	f := load()
	require.Equal(t, []any{"/file", "linux/arm64", true, "/hosts", 90 * time.Second, "auto"},
		[]any{f.root, f.platform, f.plainHTTP, f.hostsDir, f.retryFor, f.transport}, "reads are asked for as long as retry_for, which was given")
	require.Equal(t, []any{int64(3 << 29), int64(4096), int64(1_000_000), 600, int64(0)},
		[]any{f.cacheSize, f.chunkSize, f.prefetch.Rate, f.prefetch.PerMinute, f.prefetch.InFlight})
	require.Equal(t, []any{"/c.sock", "127.0.0.1:1", 300 * time.Millisecond, "debug"},
		[]any{f.containerd, f.metrics, f.file.Policy.LookupTime.Duration, f.file.Log.Level})

	f = load("--root", "/flag", "--plain-http=false", "--cache-size", "7", "--prefetch-rate", "0", "--outage", "5s", "--metrics=", "--containerd", "/d.sock")
	require.Equal(t, []any{"/flag", false, int64(7), int64(0), 5 * time.Second, "", "/d.sock"},
		[]any{f.root, f.plainHTTP, f.cacheSize, f.prefetch.Rate, f.retryFor, f.metrics, f.containerd})
	require.Equal(t, []any{"linux/arm64", int64(4096), 600}, []any{f.platform, f.chunkSize, f.prefetch.PerMinute})
}

// TestConfigOptions: what the file says reaches the snapshotter and the recorder.
func TestConfigOptions(t *testing.T) {
	c, err := parseConfig([]byte(`
[snapshotter]
linger = "5s"
writable = "dev"
remap_ids = true
lookup_ahead = false
[policy]
lookup_time = "300ms"
[[policy.rule]]
match = ["staging.example.com"]
record = "missing"
[[policy.rule]]
match = ["*.example.com/plain"]
replay = false
lookup_time = "1s"
[record]
tail = "-1s"
max_bytes = "1MiB"
`))
	require.NoError(t, err)
	f := daemonFlags{file: c, nodeFlags: nodeFlags{plainHTTP: true, hostsDir: "/hosts", platform: "linux/arm64", transport: "nbd"}}
	o := f.snapshotter()
	require.Equal(t, []any{5 * time.Second, "dev", true, true}, []any{o.Linger, o.Writable, o.RemapIDs, o.NoAhead})
	require.Equal(t, node.RecordRules{
		Tail: -time.Second, Settle: 2 * time.Second, Quiet: 5 * time.Second, MaxDuration: time.Minute, MaxBytes: 1 << 20,
	}, o.Record.Rules)
	for ref, wanted := range map[string]bool{"staging.example.com/a:1": true, "registry.example.com/a:1": false} {
		require.Equal(t, wanted, o.Record.Wanted(ref), ref)
	}
	r := &node.Request{Ref: "registry.example.com/a:1"}
	o.Request(r)
	require.False(t, r.Begun.IsZero())
	require.Equal(t, []any{"auto", 300 * time.Millisecond}, []any{r.Trace, r.TraceWait})
	require.Equal(t, []any{true, "/hosts", "linux/arm64", "nbd"}, []any{r.PlainHTTP, r.HostsDir, r.Platform, r.Transport})
	r = &node.Request{Ref: "registry.example.com/plain/b:1"}
	o.Request(r)
	require.Equal(t, []any{"none", time.Second}, []any{r.Trace, r.TraceWait})

	f.file = defaultConfig()
	require.Nil(t, f.snapshotter().Record)
	f.file.Policy.Record = recordMissing
	require.NotNil(t, f.snapshotter().Record)
}

func TestPolicyPatterns(t *testing.T) {
	const digest = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	tests := []struct {
		pattern    string
		yes, other []string
	}{
		{"a.example.com", []string{"a.example.com/x", "a.example.com/x/y:tag"}, []string{"b.example.com/x", "a.example.com:5000/x"}},
		{"a.example.com/x", []string{"a.example.com/x", "a.example.com/x:1", "a.example.com/x" + digest, "a.example.com/x/y"}, []string{"a.example.com/xy", "a.example.com/y/x"}},
		{"*.example.com", []string{"a.example.com/x", "a.b.example.com/x"}, []string{"example.com/x", "a.example.com.org/x"}},
		{"*", []string{"a.example.com/x", "localhost:5000/x/y"}, nil},
		{"*:5000/x", []string{"localhost:5000/x"}, []string{"localhost/x"}},
		{"a.example.com/*/app", []string{"a.example.com/x/app", "a.example.com/x/app/y"}, []string{"a.example.com/app", "a.example.com/x/y/app"}},
		{"a.example.com/team-?", []string{"a.example.com/team-a/x"}, []string{"a.example.com/team-ab"}},
		{"a.example.com/[a-c]*", []string{"a.example.com/cat"}, []string{"a.example.com/dog"}},
		{"docker.io", []string{"docker.io/alpine", "docker.io/bitnami/redis"}, []string{"ghcr.io/alpine"}},
		{"docker.io/alpine", []string{"docker.io/alpine:3", "docker.io/library/alpine"}, []string{"docker.io/bitnami/alpine"}},
		{"docker.io/library", []string{"docker.io/alpine"}, []string{"docker.io/bitnami/redis"}},
		{"docker.io/bitnami", []string{"docker.io/bitnami/redis"}, []string{"docker.io/alpine"}},
		{"[[]::1]:5000", []string{"[::1]:5000/x"}, []string{"localhost:5000/x"}},
	}
	for _, tt := range tests {
		no := false
		p := policy{Replay: true, Record: recordOff, Rules: []policyRule{{Match: []string{"other.example.org", tt.pattern}, Replay: &no}}}
		p.LookupTime.Duration = time.Second
		require.NoError(t, p.check(), tt.pattern)
		for _, ref := range tt.yes {
			require.False(t, p.of(ref).replay, "%s is of %s", ref, tt.pattern)
		}
		for _, ref := range slices.Concat(tt.other, []string{"oci:/dir", "/config.v1.json", "alpine"}) {
			require.True(t, p.of(ref).replay, "%s is not of %s", ref, tt.pattern)
		}
	}
}

// TestPolicyRules: the first rule that matches counts, key by key.
func TestPolicyRules(t *testing.T) {
	c, err := parseConfig([]byte(`
[policy]
replay = false
lookup_time = "1s"
record = "missing"
[[policy.rule]]
match = ["a.example.com/x", "b.example.com"]
replay = true
[[policy.rule]]
match = ["a.example.com"]
lookup_time = "3s"
record = "off"
`))
	require.NoError(t, err)
	for ref, want := range map[string]decision{
		"a.example.com/x/1": {true, time.Second, recordMissing},
		"b.example.com/y":   {true, time.Second, recordMissing},
		"a.example.com/y":   {false, 3 * time.Second, recordOff},
		"c.example.com/y":   {false, time.Second, recordMissing},
	} {
		require.Equal(t, want, c.Policy.of(ref), ref)
	}
}

func TestConfigLog(t *testing.T) {
	for _, tt := range []struct {
		level, format string
		lines         int
	}{{"debug", "text", 4}, {"info", "json", 3}, {"warn", "text", 2}, {"error", "json", 1}} {
		c := defaultConfig()
		c.Log.Level, c.Log.Format = tt.level, tt.format
		require.NoError(t, c.check())
		var out bytes.Buffer
		log := c.logger(&out)
		for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
			log.Log(t.Context(), l, "word", "image", "a b")
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		require.Len(t, lines, tt.lines)
		for _, line := range lines {
			var v map[string]any
			if tt.format == "text" {
				require.Contains(t, line, `msg=word image="a b"`)
			} else {
				require.NoError(t, json.Unmarshal([]byte(line), &v))
				require.Equal(t, "a b", v["image"])
			}
		}
	}
}
