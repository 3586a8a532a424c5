package container

import (
	"fmt"
	"io"
	"math"
	"os"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// maxAccounts bounds what is read of an image's passwd and group files, in bytes.
const maxAccounts = 4 << 20

// identity is who the container's process is.
type identity struct {
	UID, GID uint32
	Groups   []uint32
	Home     string
}

// lookupUser resolves spec, name|uid[:group|gid], in the image's passwd and
// group files, as Docker does: an empty spec is uid 0, a number needs no entry,
// and additional groups come with a user whose group is not given. Either file
// may be nil.
func lookupUser(spec string, passwd, group io.Reader) (identity, error) {
	u, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, bounded(passwd), bounded(group))
	if err != nil {
		return identity{}, fmt.Errorf("user %q: %w: give a number, or a name that is in the image's /etc/passwd and /etc/group", spec, err)
	}
	id := identity{Home: u.Home}
	if id.Home == "" {
		id.Home = "/"
	}
	for _, n := range append([]int{u.Uid, u.Gid}, u.Sgids...) {
		if n < 0 || n >= math.MaxUint32 {
			return identity{}, fmt.Errorf("user %q: the image's /etc/passwd or /etc/group gives it the number %d, which is out of range", spec, n)
		}
	}
	id.UID, id.GID = uint32(u.Uid), uint32(u.Gid)
	for _, g := range u.Sgids {
		id.Groups = append(id.Groups, uint32(g))
	}
	return id, nil
}

// bounded keeps a nil reader nil: it stands for a file that is not there.
func bounded(r io.Reader) io.Reader {
	if r == nil {
		return nil
	}
	return io.LimitReader(r, maxAccounts)
}

// userIn is lookupUser in the root file system at dir.
func userIn(dir, spec string) (identity, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return identity{}, fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(root)
	passwd, group := openIn(root, "etc/passwd"), openIn(root, "etc/group")
	var p, g io.Reader
	if passwd != nil {
		defer passwd.Close()
		p = passwd
	}
	if group != nil {
		defer group.Close()
		g = group
	}
	return lookupUser(spec, p, g)
}

// openIn opens a regular file below root, following links as if root were the
// root directory; nil if there is none. The image chooses the links, and what
// the name stands for.
func openIn(root int, path string) *os.File {
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), path)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return nil
	}
	return f
}
