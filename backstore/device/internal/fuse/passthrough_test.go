package fuse

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// TestPassthroughRefused has a kernel that offers passthrough, as far as INIT
// goes, and refuses the file: a socket has no such ioctl.
func TestPassthroughRefused(t *testing.T) {
	m := &memory{data: make([]byte, 8192)}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, c := range []struct {
		name              string
		offered, readOnly bool
		want              uint32 // flags2
	}{
		{"offered", true, true, flag2Passthrough},
		{"not offered", false, true, 0},
		{"writable", true, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := request.New(m, request.Config{Size: 8192, ReadOnly: c.readOnly})
			t.Cleanup(srv.Stop)
			ours, theirs := socketPair(t)
			k := &kernel{t: t, fd: ours, unique: 1}
			init := initRequest(40)
			if c.offered {
				native.PutUint32(init[inHeaderSize+16:], flag2Passthrough)
			}
			k.send(init)
			s, err := newSession(theirs, -1, srv, Config{Name: "f", BlockSize: 4096, Workers: 2, Backing: file})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close(0)
			defer unix.Close(ours)
			_, _, body := k.receive()
			if got := native.Uint32(body[32:]); got != c.want {
				t.Errorf("flags2 %#x, want %#x", got, c.want)
			}
			if got, want := native.Uint32(body[36:]), c.want/flag2Passthrough; got != want {
				t.Errorf("stack depth %d, want %d", got, want)
			}
			errno, open := k.call(opOpen, fileNode, make([]byte, 8))
			if errno != 0 || native.Uint32(open[8:])&fopenDirectIO == 0 || native.Uint32(open[12:]) != 0 {
				t.Errorf("OPEN: errno %d, reply %x", errno, open)
			}
		})
	}
}
