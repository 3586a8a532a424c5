package main

import (
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// TestExplain starts containers with all kinds of trouble with their trace: each
// says why in one line, and ends as it ends without.
func TestExplain(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.ownSite(false)
	const script = "cat /data/a /data/sub/new > /dev/null; exit "
	b.ok("record", "--root", b.mkdir("recorded"), "--workload", "mine", "--attach", "-o", b.path("trace"), s.ref, "--", "/bin/sh", "-c", script+"0")
	prefetch := func(f regtest.Fault) func(*http.Request) *regtest.Fault {
		return func(r *http.Request) *regtest.Fault {
			if r.Header.Get("Purpose") != "prefetch" {
				return nil
			}
			return &f
		}
	}
	lookup := func(f regtest.Fault) func(*http.Request) *regtest.Fault {
		return func(r *http.Request) *regtest.Fault {
			if !strings.Contains(r.URL.Path, "reprise-") && !strings.Contains(r.URL.Path, "/referrers/") {
				return nil
			}
			return &f
		}
	}
	tests := map[string]struct {
		fault func(*http.Request) *regtest.Fault
		flags []string
		says  string
	}{
		"used":      {says: "used: "},
		"union":     {flags: []string{"--workload", "another"}, says: "used: .*; union of the traces of other workloads: mine"},
		"forbidden": {fault: lookup(regtest.Fault{Status: http.StatusForbidden}), says: "not used: trace of "},
		"garbage":   {fault: lookup(regtest.Fault{Status: http.StatusOK, Body: "garbage"}), says: "not used: trace of "},
		"failing":   {fault: prefetch(regtest.Fault{Status: http.StatusNotFound}), says: "used: "},
		"file":      {flags: []string{"--trace", b.path("missing")}, says: "not used: "},
		"off":       {flags: []string{"--trace", "none"}, says: "not used: no trace was asked for"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s.SetFault(tt.fault)
			defer s.SetFault(nil)
			args := append([]string{"run", "--root", b.mkdir("root-" + name), "--explain", "--workload", "mine"}, tt.flags...)
			r := b.run(append(args, s.ref, "--", "/bin/sh", "-c", script+"7")...)
			require.Equal(t, 7, r.code, r.stderr)
			require.Regexp(t, `(?m)^trace:    .*`+tt.says, r.stderr)
		})
	}

	// A mount says it once it is mounted.
	dir := b.mkdir("mnt")
	cmd := b.command("mount", "--root", b.mkdir("root-mount"), "--explain", "--workload", "another", s.ref, dir)
	r := b.finish(cmd)
	require.Zero(t, r.code, r.stderr)
	require.Regexp(t, `(?m)^trace:    (not )?(used|needed).*; union of the traces of other workloads: mine`, r.stderr)
	b.ok("umount", "--root", b.path("root-mount"), dir)
}
