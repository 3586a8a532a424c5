package main

import (
	"cmp"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/platforms"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/replayer/node"
)

// nodeFlags are the flags of every command that opens the state directory.
type nodeFlags struct {
	root, transport, hostsDir, platform string
	plainHTTP                           bool
	cacheSize, chunkSize, decodedSize   int64
	prefetch                            backstore.Limits
	retryFor, outageFor                 time.Duration
	noDevice                            bool // the command itself reads

	// Of the daemon: containerd's socket, and what repositories have of their own.
	containerd  string
	credentials func(repository, host string) []registry.Credential
	// Likewise: where it logs to, and how long it looks for traces.
	log       *slog.Logger
	traceWait time.Duration
}

func (f *nodeFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.root, "root", node.DefaultRoot, "state directory")
	fs.StringVar(&f.transport, "transport", "auto", "how the device reaches the kernel: "+strings.Join(transports, ", ")+"; see doctor")
	fs.StringVar(&f.platform, "platform", "", "os/arch[/variant] of a multi-platform image (default: this machine's)")
	fs.Int64Var(&f.cacheSize, "cache-size", backstore.DefaultCacheBytes, "bytes of image data kept on this node")
	fs.Int64Var(&f.chunkSize, "chunk-size", backstore.DefaultChunkSize, "granularity of the chunk cache, bytes")
	fs.Int64Var(&f.decodedSize, "decoded-size", backstore.DefaultDecodedBytes, "bytes of decoded blocks kept in memory, for images with blocks of more than 4 KiB; 0 for none")
	fs.Int64Var(&f.prefetch.Rate, "prefetch-rate", 0, "bytes a second that replays and downloads take at most, 0 for what the link has")
	fs.Int64Var(&f.prefetch.InFlight, "prefetch-in-flight", 0, "bytes that they have asked for and not yet received, at most; 0 for what keeps the link busy")
	fs.IntVar(&f.prefetch.PerMinute, "requests-per-minute", 0, "requests that a registry allows: replays and downloads keep to it, reads count but never wait; 0 for any number")
	fs.DurationVar(&f.retryFor, "retry-for", time.Minute, "how long opening an image asks again for what the registry does not give; and reads, unless --outage is given")
	fs.DurationVar(&f.outageFor, "outage", 0, "how long reads wait for a registry that is away, 0 for as long as it takes")
	f.addRegistry(cmd)
}

func (f *nodeFlags) addRegistry(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.plainHTTP, "plain-http", false, "talk http to the registry")
	cmd.Flags().StringVar(&f.hostsDir, "hosts-dir", "", "containerd's hosts.toml directory (default /etc/containerd/certs.d)")
}

// transports are those that a device can be asked to have.
var transports = []string{"auto", "fuse", "erofs", "ublk", "nbd", "tcmu"}

// check finds what is wrong with the flags themselves.
func (f *nodeFlags) check(cmd *cobra.Command) error {
	switch {
	case !slices.Contains(transports, f.transport):
		return usagef(cmd, "--transport %s: one of %s", f.transport, strings.Join(transports, ", "))
	case f.root == "":
		return usagef(cmd, "--root is empty")
	case f.cacheSize < 1:
		return usagef(cmd, "--cache-size %d: at least 1", f.cacheSize)
	case f.chunkSize < 512 || f.chunkSize > 1<<20 || f.chunkSize&(f.chunkSize-1) != 0:
		return usagef(cmd, "--chunk-size %d: a power of two from 512 to %d", f.chunkSize, 1<<20)
	case f.decodedSize < 0:
		return usagef(cmd, "--decoded-size %d: it cannot be negative", f.decodedSize)
	case f.prefetch.Rate < 0:
		return usagef(cmd, "--prefetch-rate %d: it cannot be negative", f.prefetch.Rate)
	case f.prefetch.InFlight < 0:
		return usagef(cmd, "--prefetch-in-flight %d: it cannot be negative", f.prefetch.InFlight)
	case f.prefetch.PerMinute < 0:
		return usagef(cmd, "--requests-per-minute %d: it cannot be negative", f.prefetch.PerMinute)
	case f.retryFor < 1:
		return usagef(cmd, "--retry-for %v: more than nothing", f.retryFor)
	case f.outageFor < 0:
		return usagef(cmd, "--outage %v: it cannot be negative", f.outageFor)
	}
	if f.platform != "" {
		if _, err := platforms.Parse(f.platform); err != nil {
			return usagef(cmd, "--platform: %v", err)
		}
	}
	return nil
}

func (f *nodeFlags) registry() registry.Options {
	return registry.Options{HostsDir: f.hostsDir, PlainHTTP: f.plainHTTP, Credentials: f.credentials}
}

func (f *nodeFlags) open(cmd *cobra.Command) (*node.Node, error) {
	if err := f.check(cmd); err != nil {
		return nil, err
	}
	return node.Open(&node.Config{
		Root: f.root, Registry: f.registry(), Platform: f.platform, Transport: f.transport,
		Cache: backstore.CacheOptions{
			MaxBytes: f.cacheSize, ChunkSize: f.chunkSize, RetryFor: f.retryFor, Outage: f.outage(cmd),
			Background: f.prefetch, DecodedBytes: cmp.Or(f.decodedSize, -1), // there, 0 is the default
		},
		TraceWait: f.traceWait, Tool: tool(), Log: cmp.Or(f.log, logger(cmd)),
	})
}

// outage is how long reads wait for a registry that is away: for ever, unless
// --outage or --retry-for was given, or the command itself reads, which may fail.
func (f *nodeFlags) outage(cmd *cobra.Command) time.Duration {
	if !cmd.Flags().Changed("outage") && (f.noDevice || cmd.Flags().Changed("retry-for")) {
		return f.retryFor
	}
	return f.outageFor
}

// processFlags are those of a server as a whole, not of one image.
var processFlags = []string{
	"cache-size", "chunk-size", "decoded-size", "prefetch-rate", "prefetch-in-flight", "requests-per-minute", "retry-for", "outage",
}

// ofProcess are the process flags that were given, as arguments of a server.
func (f *nodeFlags) ofProcess(cmd *cobra.Command) (args []string) {
	for _, name := range processFlags {
		if fl := cmd.Flags().Lookup(name); fl != nil && fl.Changed {
			args = append(args, "--"+name+"="+fl.Value.String())
		}
	}
	return args
}

// request asks for the device of an image as the flags say.
func (f *nodeFlags) request(ref string, t *traceFlags) node.Request {
	cwd, _ := os.Getwd()
	r := node.Request{
		ID: node.NewID(), Ref: ref, Cwd: cwd, Begun: time.Now(), Plan: t.plan(), Trace: t.trace, Workload: t.workload,
		PlainHTTP: f.plainHTTP, HostsDir: f.hostsDir, Platform: f.platform, Transport: f.transport,
	}
	if r.HostsDir != "" && !filepath.IsAbs(r.HostsDir) {
		r.HostsDir = filepath.Join(cwd, r.HostsDir)
	}
	return r
}

func logger(cmd *cobra.Command) *slog.Logger {
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// traceFlags choose the trace that is replayed.
type traceFlags struct {
	trace, workload string
	explain         bool
	gap             int64
}

func (f *traceFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.trace, "trace", "auto", "trace to replay: auto (beside the image: the workload's, else the default, else all there are), none, a file, or sha256:…")
	f.addWorkload(cmd)
	fs.BoolVar(&f.explain, "explain", false, "say why a trace was used or not, and what it gave")
	fs.Int64Var(&f.gap, "gap", 0, "bytes fetched along rather than sending another request; 0 for what the link makes them worth, negative for none")
}

func (f *traceFlags) addWorkload(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.workload, "workload", "", "name of what is started (default: from the command)")
}

// check finds what is wrong with the flags themselves.
func (f *traceFlags) check(cmd *cobra.Command) error {
	if len(f.workload) > 128 || strings.ContainsFunc(f.workload, unicode.IsControl) {
		return usagef(cmd, "--workload %.140q: a name has at most 128 bytes and no control characters", f.workload)
	}
	return nil
}

func (f *traceFlags) plan() replayer.Options { return replayer.Options{Gap: f.gap} }

// containerFlags say how a container is run and when it is ready.
type containerFlags struct {
	net, entrypoint, log, http, user, cwd string
	env, exec                             []string
	port                                  int
	exit                                  bool
}

func (f *containerFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.net, "net", "host", "network of the container: host, or own (a loopback device only)")
	fs.StringVar(&f.entrypoint, "entrypoint", "", "replaces the image's entrypoint and command")
	fs.StringArrayVarP(&f.env, "env", "e", nil, "KEY=VALUE for the container; may be given again")
	fs.StringVar(&f.user, "user", "", "name|uid[:group|gid] instead of the image's")
	fs.StringVar(&f.cwd, "workdir", "", "working directory instead of the image's")
	fs.IntVar(&f.port, "ready-port", 0, "ready when the container listens on this TCP port")
	fs.StringVar(&f.log, "ready-log", "", "ready when a line of output matches this regular expression")
	fs.StringVar(&f.http, "ready-http", "", "ready when this URL answers 2xx or 3xx")
	fs.StringArrayVar(&f.exec, "ready-exec", nil, "ready when this shell command succeeds in the container")
	fs.BoolVar(&f.exit, "ready-exit", false, "ready when the container exits with 0")
}

func (f *containerFlags) config(cmd *cobra.Command) (container.Config, error) {
	c := container.Config{
		Env: f.env, User: f.user, Cwd: f.cwd, Network: container.Network(f.net),
		Ready: container.Ready{Port: f.port, HTTP: f.http, Exit: f.exit},
	}
	if err := f.check(cmd); err != nil {
		return c, err
	}
	if f.entrypoint != "" {
		c.Entrypoint = []string{f.entrypoint}
	}
	if len(f.exec) > 0 {
		c.Ready.Exec = []string{"/bin/sh", "-c", f.exec[0]}
	}
	if f.log != "" {
		re, err := regexp.Compile(f.log)
		if err != nil {
			return c, usagef(cmd, "--ready-log: %v", err)
		}
		c.Ready.Log = re
	}
	return c, nil
}

// check finds what is wrong with the flags themselves.
func (f *containerFlags) check(cmd *cobra.Command) error {
	if f.net != "host" && f.net != "own" {
		return usagef(cmd, "--net %s: neither host nor own", f.net)
	}
	if f.port < 0 || f.port > 65535 || f.port == 0 && cmd.Flags().Changed("ready-port") {
		return usagef(cmd, "--ready-port %d: not a port", f.port)
	}
	if u, err := url.Parse(f.http); f.http != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		return usagef(cmd, "--ready-http %s: not a URL such as http://127.0.0.1:8080/", f.http)
	}
	for _, kv := range f.env {
		if key, _, ok := strings.Cut(kv, "="); !ok || key == "" {
			return usagef(cmd, "--env %s: not KEY=VALUE", kv)
		}
	}
	rules := len(f.exec)
	for _, set := range []bool{f.port != 0, f.log != "", f.http != "", f.exit} {
		if set {
			rules++
		}
	}
	if rules > 1 {
		return usagef(cmd, "give one --ready-… rule only")
	}
	return nil
}

// needRoot fails early, with a line that says why.
func needRoot(what, why string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root (CAP_SYS_ADMIN) %s; try sudo", what, why)
	}
	return nil
}

// refAndArgs splits "REF [-- CMD…]".
func refAndArgs(cmd *cobra.Command, a []string) (ref string, rest []string, err error) {
	dash := cmd.ArgsLenAtDash()
	if len(a) == 0 || dash == 0 {
		return "", nil, usagef(cmd, "an image reference is missing")
	}
	if dash < 0 && len(a) > 1 || dash > 1 {
		return "", nil, usagef(cmd, "%q: put the container's command behind --", a[1])
	}
	return a[0], a[1:], nil
}
