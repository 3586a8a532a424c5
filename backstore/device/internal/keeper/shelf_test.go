package keeper

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func memfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.MemfdCreate("shelf", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	return fd
}

// checkShelf compares with the names that are to be kept, in their order.
func checkShelf(t *testing.T, s *shelf, want []string) {
	t.Helper()
	names := make([]string, 0, len(want))
	last := s.top + 1
	for _, k := range s.kept {
		names = append(names, k.name)
		require.Less(t, k.fd, last, "each below all earlier ones")
		require.GreaterOrEqual(t, k.fd, tableLow)
		last = k.fd
		flags, err := unix.FcntlInt(uintptr(k.fd), unix.F_GETFD, 0)
		require.NoError(t, err)
		require.Equal(t, unix.FD_CLOEXEC, flags)
	}
	require.Equal(t, want, names)
}

func TestShelf(t *testing.T) {
	s, err := newShelf(2*(tableLow+30), 0)
	require.NoError(t, err)
	defer func() { s.clear() }()
	occupied := memfd(t) // somebody's file where the shelf wants to put one
	defer unix.Close(occupied)
	n, err := unix.FcntlInt(uintptr(occupied), unix.F_DUPFD_CLOEXEC, s.top-3)
	require.NoError(t, err)
	defer unix.Close(n)

	want := []string{}
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 2000 {
		if len(want) > 0 && rnd.IntN(2) == 0 {
			j := rnd.IntN(len(want))
			s.remove(want[j])
			want = slices.Delete(want, j, j+1)
		} else {
			name := fmt.Sprintf("%d.x", i)
			err := s.put(name, memfd(t))
			if len(want) == s.most {
				require.ErrorIs(t, err, unix.EXFULL)
				continue
			}
			require.NoError(t, err)
			want = append(want, name)
		}
		checkShelf(t, s, want)
	}
}

func TestShelfFull(t *testing.T) {
	s, err := newShelf(1024, 3)
	require.NoError(t, err)
	defer func() { s.clear() }()
	for range 3 {
		require.NoError(t, s.put("x", memfd(t)))
	}
	require.ErrorIs(t, s.put("x", memfd(t)), unix.EXFULL)
	s.remove("x")
	require.Empty(t, s.kept)
	_, err = newShelf(200, 0)
	require.Error(t, err)
}
