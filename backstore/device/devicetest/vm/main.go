// Vm runs the tests of packages in an emulated machine, for what the kernel at
// hand lacks and for what should not be tried on it:
//
//	go run ./backstore/device/devicetest/vm [-run REGEXP] [-v] [-timeout D] PACKAGE… [-- TEST FLAG…]
//
// The machine is qemu without hardware acceleration, Debian's cloud kernel
// 6.12 and an initramfs that is made anew each time: this program as process
// 1, the test binaries, the kernel modules that devices are made of, and the
// tools that tests call, as far as the host has them. It has two processors, no
// disk and no network but lo. Everything in it runs as root, some twenty times
// slower than outside. Nothing is installed: the kernel is unpacked from its
// package into the user's cache folder and used again.
//
// A test binary runs in its package's folder below /src, which holds go.mod
// and that package's testdata; its environment has REPRISE_VM=1, by which a
// test knows that a missing kernel feature is a failure, and what the caller's
// environment has in variables whose names begin with REPRISE_. The binaries
// run one after the other; flags after -- are for all of them.
//
// The first serial line carries the tests' output and, as its last line, the
// result; the second is the kernel's console. That is shown with -v as it
// comes, and its end when a test fails or the machine does.
//
// The exit status is 0 if all tests passed, 2 for wrong usage, otherwise 1.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() == 1 {
		bootstrap() // does not return
	}
	if len(os.Args) == 2 && os.Args[1] == runnerArg {
		os.Exit(runTests())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	runtime.LockOSThread() // qemu dies with the thread that started it
	status := command(ctx, os.Args[1:])
	stop()
	os.Exit(status)
}

// options are what the command line says.
type options struct {
	run       string
	verbose   bool
	timeout   time.Duration
	packages  []string
	testFlags []string
}

func command(ctx context.Context, args []string) int {
	var o options
	fs := flag.NewFlagSet("vm", flag.ContinueOnError)
	fs.StringVar(&o.run, "run", "", "run the tests that match `REGEXP`")
	fs.BoolVar(&o.verbose, "v", false, "show the kernel's console too")
	fs.DurationVar(&o.timeout, "timeout", 10*time.Minute, "stop the machine after `D`")
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "usage: vm [-run REGEXP] [-v] [-timeout D] PACKAGE… [-- TEST FLAG…]")
		fs.PrintDefaults()
	}
	if i := slices.Index(args, "--"); i >= 0 {
		args, o.testFlags = args[:i], args[i+1:]
	}
	if err := fs.Parse(args); err != nil {
		return 2
	}
	o.packages = fs.Args()
	if len(o.packages) == 0 {
		fs.Usage()
		return 2
	}
	ok, err := run(ctx, &o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	if err != nil || !ok {
		return 1
	}
	return 0
}

// run builds the machine and runs it; ok tells whether all tests passed.
func run(ctx context.Context, o *options) (ok bool, err error) {
	if runtime.GOARCH != "amd64" {
		return false, fmt.Errorf("the machine is an amd64 one, and runs programs of the host, which is %s", runtime.GOARCH)
	}
	dir, err := os.MkdirTemp("", "reprise-vm-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	k, err := openKernel(ctx)
	if err != nil {
		return false, err
	}
	begin := time.Now()
	initrd, err := buildImage(ctx, dir, k, o)
	if err != nil {
		return false, err
	}
	fmt.Fprintf(os.Stderr, "vm: built in %.1f s; Linux %s\n", time.Since(begin).Seconds(), k.version)
	return boot(ctx, dir, k, initrd, o)
}
