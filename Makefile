# `make demo` and `make test` are all a newcomer needs: each first installs what it lacks (see deps).
#
#   make demo     the whole job on this machine, as root     ARGS='--runs 5 --link 30ms,1gbit'
#   make test     go test ./...; as root also the tests that need devices and mounts
#   make root     those tests alone, uncached, and none may skip for want of root
#   make vmtest   devices of every kind, served and killed, and eBPF, in an emulated machine with Linux 6.12
#   make torture  1,000 kills of the daemon and of devices, a minute of fio, a registry that is away for another
#   make coldstart  cold starts of real images, as root: packages are fetched and images made the first time
#                   WHAT='matrix adversarial fleet gaps recording stability overhead kills containerd' IMAGES='java python node' LINKS='10ms,200mbit 30ms,1gbit' RUNS=5 KEEP=DIR
#                   STARTS='other workload,truncated' (of adversarial) CODEC='zstd 16'
#                   WHAT=containerd: through the containerd that make containerd has built, or else, and with REPRISE_CONTAINERD=, the machine's own
#   make race     go test -race ./...
#   make fuzz     each fuzz target for FUZZTIME (10s)
#   make bench    all benchmarks, with fio as a second opinion
#   make containerd  containerd 2.x, of the version in .ci/containerd/go.mod, which tests then run beside the machine's own
#   make lint     golangci-lint, built from the version in .ci/tools/go.mod
#   make generate what is generated: the BPF object and its bindings; fails if that changes anything
#   make package  a .deb and an image of the daemon, a Helm chart and a DaemonSet, in bin/package
#                   ARCHS='amd64 arm64' IMAGE=registry.example.com/reprise, the name that the image will have
#   make install, make uninstall  the program, and the unit where there is systemd   PREFIX=/usr/local DESTDIR=
#   make deps     Debian packages for test, demo and bench   WHAT='test browser demo bench race vmtest generate'

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory

# Login shells of ordinary users leave out sbin, and sudo leaves out Go.
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin
# Programs and tests are built without cgo; only the race detector needs it.
export CGO_ENABLED := 0

GO        ?= go
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BUILD     := -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)'
PREFIX    ?= /usr/local
UNITDIR   ?= $(PREFIX)/lib/systemd/system
ARCHS     ?= amd64 arm64
IMAGE     ?= registry.example.com/reprise
FUZZTIME  ?= 10s
VMTIMEOUT ?= 15m
BENCH     ?= .
BENCHTIME ?= 1s
WHAT      ?= test demo bench

# Where tests find containerd 2.x: by default what make containerd has built.
REPRISE_CONTAINERD ?= $(dir $(wildcard $(CURDIR)/bin/tools/containerd/containerd))
export REPRISE_CONTAINERD

.PHONY: build test race root vmtest torture coldstart fuzz bench generate lint containerd demo deps package install uninstall clean
.DEFAULT_GOAL := build

build:
	$(GO) build $(BUILD) -o bin/reprise ./cmd/reprise

test:
	@.ci/deps test
	$(GO) test $(TESTFLAGS) ./...

race:
	@.ci/deps race
	CGO_ENABLED=1 $(GO) test -race $(TESTFLAGS) ./...

root:
	@.ci/deps test
	@GO='$(GO)' .ci/root

vmtest:
	@.ci/deps vmtest
	$(GO) run ./backstore/device/devicetest/vm -timeout $(VMTIMEOUT) $(addprefix ./backstore/device/internal/,apart fuse nbd tcmu ublk uring) ./recorder/probe
	$(GO) run ./backstore/device/devicetest/vm -timeout $(VMTIMEOUT) -run 'Conformance$$|Kill$$|UnderKills$$' ./backstore/device

# Some 15 minutes. Each test prints what it has seen, the longest stall among it.
torture:
	@.ci/deps test bench
	REPRISE_KILLS=1000 REPRISE_FIO_SECONDS=60 REPRISE_AWAY=60s $(GO) test -count=1 -v -timeout 40m -p 1 \
		-run '^(TestKill|TestWrittenUnderKills|TestDaemonKills|TestDaemonUpgrades|TestSystemd|TestRegistryAway)$$' \
		./backstore/device ./cmd/reprise 2>&1 | grep -v 'the child ended: starting it again'

# Some 20 minutes. Needs npm for the image of Node.js. Images, packages and recordings stay in KEEP, by default
# a folder of the user's cache; results are there as JSON. REPRISE measures another program than this tree's.
coldstart: WHAT = matrix adversarial fleet
coldstart:
	@.ci/deps test
	@$(MAKE) build
	@REPRISE_COLDSTART='$(WHAT)' REPRISE_COLDSTART_DIR='$(KEEP)' REPRISE_COLDSTART_IMAGES='$(IMAGES)' \
	REPRISE_COLDSTART_LINKS='$(LINKS)' REPRISE_COLDSTART_RUNS='$(RUNS)' REPRISE_COLDSTART_STARTS='$(STARTS)' REPRISE_COLDSTART_CODEC='$(CODEC)' REPRISE_COLDSTART_PROGRAM='$(abspath $(or $(REPRISE),bin/reprise))' \
		$(GO) test -count=1 -v -timeout 3h -run '^TestColdStart$$' ./replayer/compare

fuzz:
	@GO='$(GO)' FUZZTIME='$(FUZZTIME)' .ci/fuzz

bench:
	@.ci/deps bench
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchtime $(BENCHTIME) -timeout 60m ./...

# Fails if the generators change anything: generated files are committed.
generate:
	@.ci/deps generate
	@before=$$(.ci/state); $(GO) generate ./...; after=$$(.ci/state); \
	if [ "$$before" != "$$after" ]; then \
		echo 'go generate changed these files; commit them:' >&2; git status --short >&2; exit 1; \
	fi

lint:
	$(GO) -C .ci/tools build -buildvcs=false -o ../../bin/tools/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	bin/tools/golangci-lint run ./...

containerd:
	mkdir -p bin/tools/containerd
	$(GO) -C .ci/containerd build -buildvcs=false -trimpath -o ../../bin/tools/containerd/ tool

demo:
	@.ci/deps demo
	@$(MAKE) build
	@[ "$$(id -u)" = 0 ] || { echo 'the demo mounts images, so it needs root:  sudo bin/reprise demo $(ARGS)' >&2; exit 1; }
	bin/reprise demo $(ARGS)

deps:
	@.ci/deps $(WHAT)

# Starting the daemon is left to whoever installs; 'reprise daemon install' does it all.
install: build
	install -D -m 0755 bin/reprise $(DESTDIR)$(PREFIX)/bin/reprise
	install -d $(DESTDIR)$(UNITDIR)
	sed 's|^ExecStart=/usr/bin/|ExecStart=$(PREFIX)/bin/|' cmd/reprise/deploy/reprise.service >$(DESTDIR)$(UNITDIR)/reprise.service

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/reprise $(DESTDIR)$(UNITDIR)/reprise.service

# The same sources make the same packages, byte for byte: their time is that of the commit.
package:
	@mkdir -p bin/package
	for arch in $(ARCHS); do GOARCH=$$arch $(GO) build $(BUILD) -o bin/package/$$arch/reprise ./cmd/reprise; done
	$(GO) -C .ci/package build -buildvcs=false -o ../../bin/tools/package .
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} \
		bin/tools/package -version '$(VERSION)' -image '$(IMAGE)' $(ARCHS)

clean:
	rm -rf bin
