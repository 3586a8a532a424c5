package device

import (
	"errors"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// Support says whether, and how well, devices of a transport can be made here.
type Support struct {
	Transport string // as in Options.Transport
	Available bool
	// Survives tells whether devices outlive a kill of the process that serves
	// them, as far as the kernel is concerned.
	Survives bool
	// Since is the Linux version from which on the kernel can have what it needs.
	Since string
	// Detail is what was found, in a few words.
	Detail string
	// Auto is what "auto" chooses it for, in a few words; mostly empty.
	Auto string
	// Missing is what the kernel lacks, a *[FeatureError]; nil where Available.
	Missing error
}

// Probe tells what the kernel offers, in the order in which it is best looked
// at. It only looks at files: it makes no device and loads no module, and says
// nothing of the privileges that a process needs.
func Probe() []Support {
	k := runningKernel()
	var all []Support
	for _, name := range []string{"fuse", "erofs", "ublk", "nbd", "tcmu"} {
		if t := transports[name]; t != nil {
			all = append(all, k.support(name, t.missing()))
		}
	}
	chosen(all)
	return all
}

// chosen says which transports auto takes.
func chosen(all []Support) {
	kept := keptElsewhere{}
	every := (&Options{ReadOnly: true, Keeper: kept}).choose()
	erofs := (&Options{ReadOnly: true, Keeper: kept, FSType: "erofs"}).choose()
	for i := range all {
		switch s := &all[i]; {
		case !s.Available:
		case s.Transport == every && every == erofs:
			s.Auto = "all images"
		case s.Transport == every:
			s.Auto = "all images but read-only EROFS ones"
		case s.Transport == erofs:
			s.Auto = "read-only EROFS images"
		}
	}
}

// keptElsewhere is any Keeper.
type keptElsewhere struct{}

func (keptElsewhere) Store(string, int) error { return nil }
func (keptElsewhere) Remove(string) error     { return nil }

// FileSystem tells whether the kernel can mount a file system, or could load the
// module for it. If not, that is a *[FeatureError].
func FileSystem(name string) error { return runningKernel().needFileSystem(name) }

// requirement is what a transport needs.
type requirement struct {
	module   string // that makes it available
	load     string // what loads that, and what else it needs
	since    string // Linux version that first has it
	survives func(kernel) bool
	detail   string
}

var requirements = map[string]requirement{
	"fuse":  {"fuse", "modprobe fuse; modprobe loop", "5.8", kernel.resends, "any file system, through FUSE and a loop device"},
	"erofs": {"erofs", "modprobe erofs", "6.12", kernel.resends, "read-only EROFS images, through FUSE, without a loop device"},
	"ublk":  {"ublk_drv", "modprobe ublk_drv", "6.4", func(k kernel) bool { return k.atLeast(6, 4) }, "any file system, through io_uring"},
	"nbd":   {"nbd", "modprobe nbd", "4.19", always, "any file system, through a socket"},
	"tcmu": {"target_core_user", "modprobe -a target_core_user tcm_loop", "4.18", always,
		"any file system, through a SCSI target; never chosen by auto"},
}

func always(kernel) bool { return true }

// resends tells whether FUSE sends requests again that a dead server had taken:
// FUSE_NOTIFY_RESEND, Linux 6.9. Before, devices of fuse and erofs end with the
// process that serves them, and Adopt says so.
func (k kernel) resends() bool { return k.atLeast(6, 9) }

func (k kernel) support(name string, missing error) Support {
	r := requirements[name]
	s := Support{Transport: name, Since: r.since, Detail: r.detail, Missing: missing, Survives: r.survives(k)}
	if missing == nil && name == "ublk" && k.uringDisabled() {
		s.Missing = &FeatureError{Feature: "io_uring", Err: unix.EPERM, Hint: "it is switched off: sysctl kernel.io_uring_disabled=0"}
	}
	s.Available = s.Missing == nil
	var f *FeatureError
	if errors.As(s.Missing, &f) {
		if hint := k.remedy(r); hint != "" {
			s.Missing = &FeatureError{Feature: f.Feature, Hint: hint, Err: f.Err}
		}
	}
	return s
}

// remedy says how to come by a module, "" if the module is not what is missing
// or nothing is known of it.
func (k kernel) remedy(r requirement) string {
	switch state := k.module(r.module); {
	case state == loadable:
		return r.load
	case state == present || !k.knowsModules():
		return ""
	case !k.takesModules():
		return "a kernel that has " + r.module + " built in: this one takes no modules"
	}
	return "install the kernel's package that has the module " + r.module + ", if there is one"
}

// uringDisabled tells whether not even root can use io_uring.
func (k kernel) uringDisabled() bool {
	b, err := fs.ReadFile(k.root, "proc/sys/kernel/io_uring_disabled")
	return err == nil && strings.TrimSpace(string(b)) == "2"
}

// choose is the transport that "auto" means. EROFS without a loop device is
// first where the image is EROFS. Then comes fuse: it needs no module that is
// not there anyway, and is measured and tested most. Where FUSE sessions cannot
// be passed on and somebody keeps descriptors, so that the device is meant to
// outlive its server, what can be passed on is tried first. Drivers that are not
// loaded are not looked for, and tcmu, which needs a host set up for it, is
// never chosen.
func (o *Options) choose() string {
	return o.chooseFor(runningKernel(), func(name string) bool {
		t := transports[name]
		return t != nil && t.missing() == nil
	})
}

func (o *Options) chooseFor(k kernel, has func(name string) bool) string {
	order := []string{"fuse", "ublk", "nbd"}
	if o.Keeper != nil && !k.resends() {
		order = []string{"ublk", "nbd", "fuse"}
	}
	if o.FSType == "erofs" && o.ReadOnly {
		order = append([]string{"erofs"}, order...)
	}
	for _, name := range order {
		r := requirements[name]
		loaded := name == "fuse" || name == "erofs" || k.module(r.module) == present
		if loaded && has(name) && (name != "ublk" || r.survives(k) && !k.uringDisabled()) {
			return name
		}
	}
	return "fuse" // whose error tells most
}
