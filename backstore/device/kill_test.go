package device_test

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// TestKill kills the servers of devices of every writable transport. How often
// is for REPRISE_KILLS to say; from 100 on the last tenth are 1 to 5 s apart.
func TestKill(t *testing.T) {
	kills, err := strconv.Atoi(os.Getenv("REPRISE_KILLS"))
	if err != nil {
		kills = 20
	}
	for _, transport := range []string{"fuse"} {
		t.Run(transport, func(t *testing.T) {
			o := devicetest.KillOptions{Transport: transport, Kills: kills}
			if kills >= 100 {
				o.Pause = func(i int, r *rand.Rand) time.Duration {
					if i >= kills-kills/10 {
						return time.Duration(1000+r.IntN(4000)) * time.Millisecond
					}
					return time.Duration(5+r.IntN(55)) * time.Millisecond
				}
			}
			devicetest.Kill(t, o)
		})
	}
}
