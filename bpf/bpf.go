// Package bpf holds the programs that recorder/probe loads into the kernel, and
// the bindings that bpf2go makes for them. It has no logic.
//
// probe.bpf.c is compiled ahead of time, and what comes of it is committed: one
// object for all little-endian machines, since it is relocated against the types
// of the running kernel when it is loaded. `go generate` needs the very compiler
// that has made the committed object, of the packages clang-14 and llvm-14.
package bpf

//go:generate go tool -modfile=../.ci/tools/go.mod bpf2go -target bpfel -cc clang-14 -strip llvm-strip-14 -cflags "-Wall -Werror" -type kind -type flags -type read -type done -type listen Probe probe.bpf.c
