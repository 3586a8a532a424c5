package keeper

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// beBusy stores and removes without end, saying before and after each step what
// it is. First it says what it was handed.
func beBusy(s *Store, control int) int {
	say := func(text string) { _ = unix.Sendto(control, []byte(text), unix.MSG_NOSIGNAL, nil) }
	say(fmt.Sprintf("up %d %s", os.Getpid(), strings.Join(s.Names(), ",")))
	kept := s.Names()
	for i := 0; ; i++ {
		var name, verb string
		var err error
		if len(kept) > 20 || i%3 == 2 && len(kept) > 1 {
			verb, name = "remove", kept[len(kept)-1]
			if name == "control" {
				name = kept[0]
			}
			say("begin remove " + name)
			err = s.Remove(name)
			kept = slices.DeleteFunc(kept, func(k string) bool { return k == name })
		} else {
			verb, name = "store", fmt.Sprintf("%d-%d.x", os.Getpid(), i)
			say("begin store " + name)
			fd, merr := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
			if merr != nil {
				return 95
			}
			err = s.Store(name, fd)
			unix.Close(fd)
			kept = append(kept, name)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 94
		}
		say("end " + verb + " " + name)
	}
}

// What was stored when Store returned is handed over, what was removed when
// Remove returned is not, wherever the child was when it was killed.
func TestKillsWhileStoring(t *testing.T) {
	kills := 100
	if testing.Short() {
		kills = 20
	}
	r := newRig(t, Options{Env: append(os.Environ(), envChild+"=busy")})
	rnd := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	kept := map[string]bool{"control": true}
	doubtful := "" // what was being stored or removed at the kill
	for kill := 0; kill <= kills; {
		text := r.hear()
		words := strings.Fields(text)
		switch words[0] {
		case "up":
			got := make(map[string]bool)
			for name := range strings.SplitSeq(words[2], ",") {
				got[name] = true
			}
			if doubtful != "" {
				delete(kept, doubtful)
				if got[doubtful] {
					kept[doubtful] = true
				}
			}
			require.Equal(t, slices.Sorted(maps.Keys(kept)), slices.Sorted(maps.Keys(got)), "after %d kills", kill)
			_, err := fmt.Sscanf(words[1], "%d", &r.pid)
			require.NoError(t, err)
			doubtful = ""
			if kill++; kill <= kills {
				pid := r.pid
				time.AfterFunc(time.Duration(rnd.IntN(3000))*time.Microsecond, func() { _ = unix.Kill(pid, unix.SIGKILL) })
			}
		case "begin":
			doubtful = words[2]
		case "end":
			doubtful = ""
			if words[1] == "store" {
				kept[words[2]] = true
			} else {
				delete(kept, words[2])
			}
		}
	}
}
