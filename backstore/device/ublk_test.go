package device_test

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/device/internal/ublk"
)

func needUblk(t *testing.T) {
	t.Helper()
	devicetest.RequireRoot(t)
	if err := ublk.Missing(); err != nil {
		t.Skip(err)
	}
}

func attachUblk(ctx context.Context, b device.Backend, size int64, o *device.Options) (devicetest.Device, error) {
	var opts device.Options
	if o != nil {
		opts = *o
	}
	opts.Transport = "ublk"
	d, err := device.Attach(ctx, b, size, &opts)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func TestUblkConformance(t *testing.T) {
	needUblk(t)
	devicetest.Run(t, attachUblk, devicetest.Caps{
		Write:   true,
		Discard: true,
		Sectors: []int{512, 4096},
		MaxSize: 64 << 40,
	})
}

// TestUblkKill kills 20 servers, or as many as REPRISE_KILLS says, at any
// moment then: half of them before they are ready.
func TestUblkKill(t *testing.T) {
	needUblk(t)
	o := devicetest.KillOptions{Transport: "ublk"}
	if kills, err := strconv.Atoi(os.Getenv("REPRISE_KILLS")); err == nil {
		o.Kills = kills
		o.Pause = func(_ int, r *rand.Rand) time.Duration { return time.Duration(r.IntN(1000)) * time.Millisecond }
	}
	devicetest.Kill(t, o)
}
