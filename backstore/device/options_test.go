package device

import (
	"io"
	"strings"
	"testing"
	"time"
)

type backendRW struct {
	io.ReaderAt
	io.WriterAt
}

func TestOptions(t *testing.T) {
	ro := strings.NewReader("")
	rw := backendRW{}
	tests := []struct {
		name string
		b    Backend
		size int64
		o    *Options
		want string // part of the error
	}{
		{"nil", rw, 4096, nil, ""},
		{"no backend", nil, 4096, nil, "no backend"},
		{"read-only backend", ro, 4096, nil, "set ReadOnly"},
		{"read-only", ro, 4096, &Options{ReadOnly: true}, ""},
		{"empty", rw, 0, nil, "size 0"},
		{"negative", rw, -512, nil, "size -512"},
		{"odd size", rw, 1000, nil, "size 1000"},
		{"odd for the sector", rw, 512, &Options{SectorSize: 4096}, "multiple of the sector size 4096"},
		{"odd sector", rw, 4096, &Options{SectorSize: 1000}, "sector size 1000"},
		{"small sector", rw, 4096, &Options{SectorSize: 256}, "sector size 256"},
		{"large sector", rw, 1 << 20, &Options{SectorSize: 65536}, "sector size 65536"},
		{"transport", rw, 4096, &Options{Transport: "smoke"}, `transport "smoke"`},
		{"in flight", rw, 4096, &Options{MaxInFlight: -1}, "MaxInFlight -1"},
		{"timeout", rw, 4096, &Options{CloseTimeout: -1}, "CloseTimeout -1ns"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.o.fill(tt.b, tt.size)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("got %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	for size, sector := range map[int64]int{4096: 4096, 3 * 512: 512, 2048: 2048, 1<<40 + 1024: 1024} {
		o, err := (*Options)(nil).fill(backendRW{}, size)
		if err != nil {
			t.Fatal(err)
		}
		if o.SectorSize != sector || o.ReadAheadKB != 128 || o.MaxInFlight != 128 || o.CloseTimeout != 10*time.Second || o.Name != "reprise" {
			t.Errorf("size %d: %+v", size, o)
		}
	}
}

func TestFileName(t *testing.T) {
	for name, want := range map[string]string{
		"": "reprise", ".": "reprise", "..": "reprise", "a/b\x00c": "a_b_c",
		"docker.io/x@sha256:1": "docker.io_x@sha256:1", strings.Repeat("x", 300): strings.Repeat("x", 255),
	} {
		if got := fileName(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestWithoutJournal(t *testing.T) {
	for _, tt := range [][3]string{
		{"ext4", "", "noload"}, {"ext4", "noatime", "noatime,noload"}, {"ext4", "noload,noatime", "noload,noatime"},
		{"ext4", "norecovery", "norecovery"}, {"xfs", "", "norecovery"}, {"erofs", "", ""}, {"ext2", "x", "x"},
	} {
		if got := withoutJournal(tt[0], tt[1]); got != tt[2] {
			t.Errorf("%s %q: %q, want %q", tt[0], tt[1], got, tt[2])
		}
	}
}
