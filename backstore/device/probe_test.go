package device

import (
	"errors"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"
)

// machine is the files of a kernel that these tests look at.
func machine(files map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for name, data := range files {
		m[name] = &fstest.MapFile{Data: []byte(data)}
	}
	return m
}

func TestKernelVersion(t *testing.T) {
	for release, want := range map[string][2]int{
		"6.12.117+deb12-cloud-amd64": {6, 12}, "5.4": {5, 4}, "6.9-rc1": {6, 9}, "7.0.0": {7, 0}, "": {0, 0}, "x.y": {0, 0},
	} {
		k := newKernel(release, nil)
		if k.major != want[0] || k.minor != want[1] {
			t.Errorf("%q: %d.%d, want %v", release, k.major, k.minor, want)
		}
		if !k.atLeast(want[0], want[1]) || k.atLeast(want[0], want[1]+1) || k.atLeast(want[0]+1, 0) {
			t.Errorf("%q: atLeast is wrong", release)
		}
	}
}

func TestModules(t *testing.T) {
	k := newKernel("6.1.0", machine(map[string]string{
		"sys/module/loop/uevent":            "",
		"lib/modules/6.1.0/modules.builtin": "kernel/fs/fuse/fuse.ko\nkernel/drivers/block/brd.ko\n",
		"lib/modules/6.1.0/modules.dep":     "kernel/drivers/block/nbd.ko.xz:\nkernel/fs/erofs/erofs.ko.xz: kernel/lib/lz4.ko.xz\nkernel/a/dm-mod.ko:\n",
		"proc/filesystems":                  "nodev\tsysfs\n\text4\nnodev\toverlay\n",
	}))
	for name, want := range map[string]moduleState{
		"loop": present, "fuse": present, "brd": present, "nbd": loadable, "erofs": loadable, "dm_mod": loadable,
		"lz4": absent, "ublk_drv": absent,
	} {
		if got := k.module(name); got != want {
			t.Errorf("module %s: %d, want %d", name, got, want)
		}
	}
	for name, want := range map[string]moduleState{
		"ext4": present, "overlay": present, "sysfs": present, "erofs": loadable, "xfs": absent, "nodev": absent,
	} {
		if got := k.fileSystem(name); got != want {
			t.Errorf("file system %s: %d, want %d", name, got, want)
		}
	}
	if err := k.needFileSystem("xfs"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("needFileSystem: %v", err)
	}
}

func TestSupport(t *testing.T) {
	k := newKernel("6.1.0", machine(map[string]string{
		"lib/modules/6.1.0/modules.dep":     "kernel/drivers/block/ublk_drv.ko:\n",
		"proc/modules":                      "",
		"proc/sys/kernel/io_uring_disabled": "2\n",
	}))
	gone := &FeatureError{Feature: "/dev/ublk-control", Err: unix.ENOENT}
	s := k.support("ublk", gone)
	var f *FeatureError
	if s.Available || !errors.As(s.Missing, &f) || f.Hint != "modprobe ublk_drv" {
		t.Errorf("a module that can be loaded: %+v", s)
	}
	if s := k.support("nbd", gone); s.Available || !errors.As(s.Missing, &f) || !strings.Contains(f.Hint, "package") {
		t.Errorf("a module that is not there: %+v", s)
	}
	if s := k.support("ublk", nil); s.Available || s.Missing == nil {
		t.Errorf("ublk without io_uring: %+v", s)
	}
	fixed := newKernel("6.1.0", machine(nil))
	if s := fixed.support("nbd", gone); !errors.As(s.Missing, &f) || !strings.Contains(f.Hint, "built in") {
		t.Errorf("a kernel without modules: %+v", s)
	}
	unknown := newKernel("6.1.0", machine(map[string]string{"proc/modules": ""}))
	if s := unknown.support("nbd", gone); s.Missing != gone {
		t.Errorf("nothing is known of modules: %+v", s)
	}
	if s := k.support("fuse", nil); !s.Available || s.Survives || s.Missing != nil {
		t.Errorf("fuse: %+v", s)
	}
	if s := newKernel("6.9.0", k.root).support("fuse", nil); !s.Survives {
		t.Errorf("fuse: %+v", s)
	}
}

// TestProbe looks at this machine: what Probe calls missing cannot be attached,
// and auto is something that it calls available.
func TestProbe(t *testing.T) {
	available := map[string]bool{}
	for _, s := range Probe() {
		available[s.Transport] = s.Available
		if s.Available != (s.Missing == nil) || s.Detail == "" || s.Since == "" {
			t.Errorf("%+v", s)
		}
		if s.Available {
			continue
		}
		_, err := Attach(t.Context(), oneSector{}, 512, &Options{Transport: s.Transport, ReadOnly: true})
		var f *FeatureError
		if !errors.As(err, &f) {
			t.Errorf("%s is missing (%v), but Attach says %v", s.Transport, s.Missing, err)
		}
	}
	if len(available) != len(transports) {
		t.Errorf("Probe lists %v, there are %d transports", available, len(transports))
	}
	for _, fstype := range []string{"", "ext4", "erofs"} {
		if c := (&Options{FSType: fstype, ReadOnly: true}).choose(); available["fuse"] && !available[c] {
			t.Errorf("auto for %q is %s, which is not available", fstype, c)
		}
	}
}

type oneSector struct{}

func (oneSector) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

func TestChoose(t *testing.T) {
	loaded := machine(map[string]string{"sys/module/ublk_drv/x": "", "sys/module/nbd/x": "", "sys/module/target_core_user/x": ""})
	switchedOff := machine(map[string]string{"sys/module/ublk_drv/x": "", "sys/module/nbd/x": "", "proc/sys/kernel/io_uring_disabled": "2"})
	none := machine(nil)
	kept := Options{Keeper: keptElsewhere{}}
	erofs := Options{FSType: "erofs", ReadOnly: true}
	tests := []struct {
		name    string
		release string
		root    fstest.MapFS
		o       Options
		lacks   string
		want    string
	}{
		{"all there", "6.12.0", loaded, kept, "", "fuse"},
		{"erofs", "6.12.0", loaded, erofs, "", "erofs"},
		{"writable erofs", "6.12.0", loaded, Options{FSType: "erofs"}, "", "fuse"},
		{"erofs on an old kernel", "6.11.0", none, erofs, "erofs", "fuse"},
		{"no fuse", "6.12.0", loaded, kept, "fuse", "ublk"},
		{"no fuse, no io_uring", "6.12.0", switchedOff, kept, "fuse", "nbd"},
		{"no fuse, drivers not loaded", "6.12.0", none, kept, "fuse", "fuse"},
		{"no RESEND", "6.8.0", loaded, kept, "", "ublk"},
		{"no RESEND, no recovery", "6.0.0", loaded, kept, "", "nbd"},
		{"no RESEND, drivers not loaded", "6.8.0", none, kept, "", "fuse"},
		{"no RESEND, nobody keeps", "6.8.0", loaded, Options{}, "", "fuse"},
	}
	for _, tt := range tests {
		has := func(name string) bool { return name != tt.lacks }
		if got := tt.o.chooseFor(newKernel(tt.release, tt.root), has); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}
