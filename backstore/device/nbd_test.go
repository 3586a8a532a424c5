package device_test

import (
	"context"
	"os"
	"testing"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/device/devicetest"
	"github.com/reprise-project/reprise/backstore/device/internal/nbd"
)

func needNBD(t *testing.T) {
	t.Helper()
	devicetest.RequireRoot(t)
	if err := nbd.Missing(); err != nil {
		if os.Getenv("REPRISE_VM") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func attachNBD(ctx context.Context, b device.Backend, size int64, o *device.Options) (devicetest.Device, error) {
	var opts device.Options
	if o != nil {
		opts = *o
	}
	opts.Transport = "nbd"
	d, err := device.Attach(ctx, b, size, &opts)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func TestNBDConformance(t *testing.T) {
	needNBD(t)
	devicetest.Run(t, attachNBD, devicetest.Caps{
		Write:   true,
		Discard: true,
		Sectors: []int{512, 4096},
		MaxSize: 64 << 40,
	})
}

func TestNBDKill(t *testing.T) {
	needNBD(t)
	devicetest.Kill(t, devicetest.KillOptions{Transport: "nbd"})
}
