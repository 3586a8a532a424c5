package device_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/device/internal/tcmu"
)

// needTCMU skips the test where there are no targets. Its end checks that none
// is left.
func needTCMU(t *testing.T) {
	t.Helper()
	devicetest.RequireRoot(t)
	if err := tcmu.Missing(); err != nil {
		if os.Getenv("REPRISE_VM") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() {
		left, err := filepath.Glob("/sys/kernel/config/target/core/user_*/reprise-*")
		if len(left) > 0 || err != nil {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}

func attachTCMU(ctx context.Context, b device.Backend, size int64, o *device.Options) (devicetest.Device, error) {
	var opts device.Options
	if o != nil {
		opts = *o
	}
	opts.Transport = "tcmu"
	d, err := device.Attach(ctx, b, size, &opts)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func TestTCMUConformance(t *testing.T) {
	needTCMU(t)
	devicetest.Run(t, attachTCMU, devicetest.Caps{
		Write:   true,
		Discard: true,
		Sectors: []int{512, 4096},
		MaxSize: 64 << 40,
	})
}

// TestTCMUKill kills 20 servers, or as many as REPRISE_KILLS says, at any
// moment then: many of them before they are ready.
func TestTCMUKill(t *testing.T) {
	needTCMU(t)
	o := devicetest.KillOptions{Transport: "tcmu"}
	if kills, err := strconv.Atoi(os.Getenv("REPRISE_KILLS")); err == nil {
		o.Kills = kills
		o.Pause = func(_ int, r *rand.Rand) time.Duration { return time.Duration(r.IntN(1000)) * time.Millisecond }
	}
	devicetest.Kill(t, o)
}
