package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Wrong usage is status 2, says what is wrong and where to read more, and
// happens before anything else: before the question of privilege, too.
func TestUsage(t *testing.T) {
	tests := []struct {
		line string
		says string
	}{
		{"frobnicate", `unknown command "frobnicate"`},
		{"--frob", "unknown flag: --frob"},
		{"blob", "a subcommand is missing"},
		{"blob frob", `unknown command "frob"`},
		{"blob info", "accepts 1 arg(s), received 0"},
		{"blob info a b", "accepts 1 arg(s), received 2"},
		{"blob info --frob a", "unknown flag: --frob"},
		{"blob unpack a", "accepts 2 arg(s), received 1"},
		{"blob verify", "accepts 1 arg(s)"},
		{"image", "a subcommand is missing"},
		{"image info", "accepts 1 arg(s)"},
		{"image info x --chunk-size 3", "--chunk-size 3: a power of two"},
		{"image info x --platform a/b/c/d/e", "--platform:"},
		{"image dump x", "accepts 2 arg(s)"},
		{"trace", "a subcommand is missing"},
		{"trace show", "accepts 1 arg(s)"},
		{"trace show x --platform a/b/c/d/e", "--platform:"},
		{"trace show x --by colour", `--by "colour": not one of layer, dir, file, process, time`},
		{"trace show x --by file --sort size", `--sort "size": not one of bytes, first, wait, reads, name`},
		{"trace show x --sort bytes", "--sort is for --by"},
		{"trace show x --by file --depth 2", "--depth is for --by dir"},
		{"trace show x --by dir --depth -1", "--depth -1: cannot be negative"},
		{"trace show x --top -1", "--top -1: cannot be negative"},
		{"trace show x --html y --json", "give neither --by nor --json"},
		{"trace pull x", "accepts 2 arg(s)"},
		{"attach x", "accepts 2 arg(s)"},
		{"convert x", "accepts 2 arg(s)"},
		{"convert a b --algo gzip", "--algo: "},
		{"convert a b --block 5", "--block 5: one of 4, 8"},
		{"convert a b --device-size 5", "--device-size 5"},
		{"convert a b --level 99 --algo zstd", "--level 99"},
		{"convert a b --platform /", "--platform:"},
		{"mount x", "accepts 2 arg(s)"},
		{"mount x y --transport carrier-pigeon", "--transport carrier-pigeon"},
		{"mount x y --complete-rate -1", "cannot be negative"},
		{"mount x y --root=", "--root is empty"},
		{"umount", "accepts 1 arg(s)"},
		{"umount x --root=", "--root is empty"},
		{"run", "an image reference is missing"},
		{"run -- /bin/true", "an image reference is missing"},
		{"run x /bin/true", "put the container's command behind --"},
		{"run x --net mars", "--net mars: neither host nor own"},
		{"run x --ready-port 70000", "--ready-port 70000: not a port"},
		{"run x --ready-port 0", "--ready-port 0: not a port"},
		{"run x --ready-port eighty", "invalid argument"},
		{"run x --ready-log (", "--ready-log: "},
		{"run x --ready-http localhost", "--ready-http localhost: not a URL"},
		{"run x --ready-port 80 --ready-exit", "give one --ready-… rule only"},
		{"run x --ready-exec a --ready-exec b", "give one --ready-… rule only"},
		{"run x --env NOVALUE", "--env NOVALUE: not KEY=VALUE"},
		{"run x --cache-size 0", "--cache-size 0: at least 1"},
		{"run x --decoded-size=-1", "--decoded-size -1: it cannot be negative"},
		{"mount x y --prefetch-rate=-1", "--prefetch-rate -1: it cannot be negative"},
		{"daemon --prefetch-in-flight=-1", "--prefetch-in-flight -1: it cannot be negative"},
		{"run x --requests-per-minute=-1", "--requests-per-minute -1: it cannot be negative"},
		{"run x --retry-for 0s", "--retry-for 0s"},
		{"run x --workload " + strings.Repeat("w", 200), "--workload "},
		{"record x", "name a file for the trace with -o"},
		{"record", "an image reference is missing"},
		{"record x -o y --for never", "invalid argument"},
		{"record x -o y --max-bytes many", "--max-bytes many: a number of bytes"},
		{"record x -o y --max-bytes 0", "--max-bytes 0: a number of bytes"},
		{"record x -o y --max-events 0", "--max-events 0: from 1"},
		{"record x -o y --tail -1s", "--tail -1s: it cannot be negative"},
		{"record x -o y --runs 0", "--runs 0: from 1"},
		{"record x -o y --merge union", "--merge is for several --runs"},
		{"record x -o y --runs 2 --merge most", "--merge: "},
		{"demo x", "unknown command"},
		{"demo --link fast", "--link: "},
		{"demo --runs 0", "--runs 0: at least 1"},
		{"simulate", "requires at least 1 arg(s)"},
		{"simulate x --link fast", "--link: "},
		{"simulate x --link 1ms,1gbit,stall=0.1", "only DELAY,RATE is modelled"},
		{"simulate x --gap 1X", "--gap: "},
		{"simulate x --piece 1", "--piece 1: a size of at least 4K"},
		{"simulate x --copies 0", "--copies 0: not from 1 to 1000"},
		{"simulate x --round-trips 0", "--round-trips 0: not from 1 to 1000"},
		{"simulate x --lookup -1", "--lookup -1: not from 0 to 1000"},
		{"simulate x --start-cpu -1s", "--start-cpu -1s: cannot be negative"},
		{"simulate x --window 0", "--window 0: above 0"},
		{"daemon install x", "unknown command"},
		{"daemon install --host etc", "etc: not an absolute path"},
		{"daemon uninstall --prefix=", "not an absolute path"},
		{"daemon install --check --stay", "--check does not --stay"},
		{"version x", "unknown command"},
	}
	b := newBench(t)
	for _, tt := range tests {
		t.Run(tt.line, func(t *testing.T) {
			r := b.run(strings.Fields(tt.line)...)
			require.Equal(t, exitUsage, r.code, r.stderr)
			require.Contains(t, r.stderr, tt.says)
			require.True(t, strings.HasPrefix(r.stderr, "reprise: "), r.stderr)
			require.Contains(t, r.stderr, "--help'")
			require.Empty(t, r.stdout)
		})
	}
}

func TestHelp(t *testing.T) {
	b := newBench(t)
	out := b.ok("--help")
	for _, verb := range []string{"convert", "mount", "umount", "run", "record", "attach", "trace", "image", "blob", "demo", "simulate", "version"} {
		require.Contains(t, out, "\n  "+verb+" ")
	}
	require.NotContains(t, out, serveName)
	require.NotContains(t, out, keepName)
	require.Equal(t, out, b.ok())
	require.Contains(t, b.ok("version"), "trace format 1")
}
