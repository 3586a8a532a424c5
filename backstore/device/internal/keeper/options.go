package keeper

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Options of [Supervise]. A zero field means its default.
type Options struct {
	// Command is the child's program, looked up in $PATH, and its arguments.
	Command []string
	// Path is the program if Command[0] is only what it is called. It may be
	// /proc/self/exe.
	Path string
	// Env is the child's environment. Default: this process's. What belongs to
	// the protocol is replaced.
	Env []string
	// Dir is the child's working directory. Default: this process's.
	Dir string
	// Stdout and Stderr are the child's. Default: this process's. Its standard
	// input is /dev/null.
	Stdout, Stderr *os.File
	// Files are handed to every child, before what is kept: listening sockets.
	Files []File
	// Signals are passed on to the child. The first SIGTERM or SIGINT asks it to
	// end, as the end of the context does; after that the next one kills it.
	Signals <-chan os.Signal
	// DeathSignal is sent to the child when this process dies. Default: none.
	DeathSignal syscall.Signal
	// MaxKept is how many descriptors are kept. Default: as many as the limit of
	// open files allows, at most some 3000.
	MaxKept int
	// MaxCrashes is how many crashes in a row end it all, with a *CrashError.
	// Being killed by SIGKILL is none. Default: no limit.
	MaxCrashes int
	// ReadyTimeout is how long the program of an upgrade may take to become
	// ready before the old one is started again. Default 30 s.
	ReadyTimeout time.Duration
	// StopTimeout is how long a child may take to end when asked to before it is
	// killed. Default 90 s.
	StopTimeout time.Duration
	// Watchdog is how long a child that is ready may be silent before it is
	// taken to hang, and is aborted. Default: for ever.
	Watchdog time.Duration
	// OnStart is called with the number of each new child, OnReady when it has
	// said that it is ready, inline: they must be quick. Default nil.
	OnStart, OnReady func(pid int)
	// Log receives what happens. Default: slog.Default().
	Log *slog.Logger
}

// File is a descriptor for every child.
type File struct {
	// Name is found in LISTEN_FDNAMES: ASCII without colons, up to 255 bytes.
	Name string
	// File remains the caller's.
	File *os.File
}

const (
	defaultReadyTimeout = 30 * time.Second
	defaultStopTimeout  = 90 * time.Second
)

// fill returns a checked copy of o with the defaults set.
func (o *Options) fill() (*Options, error) {
	if o == nil || len(o.Command) == 0 || o.Command[0] == "" {
		return nil, errors.New("no command")
	}
	c := *o
	if c.Path == "" {
		c.Path = c.Command[0]
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	c.Env = cleanEnv(c.Env)
	if c.Stdout == nil {
		c.Stdout = os.Stdout
	}
	if c.Stderr == nil {
		c.Stderr = os.Stderr
	}
	if c.ReadyTimeout == 0 {
		c.ReadyTimeout = defaultReadyTimeout
	}
	if c.StopTimeout == 0 {
		c.StopTimeout = defaultStopTimeout
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	for _, f := range c.Files {
		if err := checkName(f.Name); err != nil {
			return nil, err
		}
		if f.File == nil {
			return nil, fmt.Errorf("file %s is nil", f.Name)
		}
	}
	if c.ReadyTimeout < 0 || c.StopTimeout < 0 || c.Watchdog < 0 || c.MaxKept < 0 || c.MaxCrashes < 0 {
		return nil, errors.New("a time or a number is negative")
	}
	return &c, nil
}

// cleanEnv is an environment without what keepers set.
func cleanEnv(env []string) []string {
	clean := make([]string, 0, len(env))
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		if !slices.Contains(ownVariables, name) {
			clean = append(clean, v)
		}
	}
	return clean
}
