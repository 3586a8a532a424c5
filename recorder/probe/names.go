package probe

import (
	"fmt"
	"os"
	"regexp"
	"strings"
)

// names of containers, by the inode of their mount namespace.
type names struct {
	host  map[uint64]bool // these are no container's
	ids   map[uint64]string
	tried map[uint64]int // how many processes have not told
}

func newNames() names {
	n := names{host: map[uint64]bool{0: true}, ids: map[uint64]string{}, tried: map[uint64]int{}}
	for _, pid := range []int{1, os.Getpid()} {
		if ns, err := mountNamespace(pid); err == nil {
			n.host[ns] = true
		}
	}
	return n
}

// tries is how many events of a mount namespace are asked for its name: the first
// process may be gone by now, or not yet be in its cgroup.
const tries = 16

// of names what a process in a mount namespace is in. The process may be gone.
func (n *names) of(ns uint64, pid int) string {
	if n.host[ns] {
		return ""
	}
	if id := n.ids[ns]; id != "" {
		return id
	}
	if n.tried[ns] < tries {
		n.tried[ns]++
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if id := containerID(string(b)); id != "" {
			n.ids[ns] = id
			return id
		}
	}
	return fmt.Sprintf("mnt:[%d]", ns)
}

// hexID is the id of a container in the last part of a cgroup's path:
// /docker/ID, cri-containerd-ID.scope, crio-ID.scope.
var hexID = regexp.MustCompile(`(?:^|[-:])([0-9a-f]{64})(?:\.scope)?$`)

// containerID finds the id in what /proc/PID/cgroup holds: of containers within
// containers the innermost.
func containerID(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		path := line[strings.LastIndexByte(line, ':')+1:]
		id := ""
		for part := range strings.SplitSeq(strings.TrimSpace(path), "/") {
			if m := hexID.FindStringSubmatch(part); m != nil {
				id = m[1]
			}
		}
		if id != "" {
			return id
		}
	}
	return ""
}
