package node

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/recorder"
)

func TestRecordRules(t *testing.T) {
	for name, tt := range map[string]struct {
		rules RecordRules
		want  recorder.Options
	}{
		"default": {RecordRules{}, recorder.Options{Tail: time.Minute, Settle: 2 * time.Second}},
		"never": {
			RecordRules{Tail: -1, Settle: -1, Quiet: -1, MaxDuration: -1, MaxBytes: -1},
			recorder.Options{Tail: -1, Settle: -1, Quiet: -1, MaxDuration: -1},
		},
		"given": {
			RecordRules{Tail: 1, Settle: 2, Quiet: 3, MaxDuration: 4, MaxBytes: 5},
			recorder.Options{Tail: 1, Settle: 2, Quiet: 3, MaxDuration: 4, MaxBytes: 5},
		},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tt.want, tt.rules.options())
		})
	}
}

func TestRecordings(t *testing.T) {
	var r recordings
	web, batch := recordingKey{"sha256:1", "web"}, recordingKey{"sha256:1", "batch"}
	require.True(t, r.enter(web))
	require.True(t, r.enter(batch))
	require.False(t, r.enter(web), "one at a time")
	r.leave(web)
	require.True(t, r.enter(web))
	require.True(t, r.first("this"))
	require.False(t, r.first("this"))
	require.True(t, r.first("that"))
}

func TestRootPlaceIsLower(t *testing.T) {
	at := rootPlace{dir: "/var/lib/reprise/snapshotter/snapshots/7/fs"}
	for options, want := range map[string]bool{
		"rw,lowerdir=/var/lib/reprise/snapshotter/snapshots/7/fs,upperdir=/x/fs,workdir=/x/work":                                            true,
		"rw,lowerdir=/var/lib/reprise/snapshotter/snapshots/9/fs:/var/lib/reprise/snapshotter/snapshots/7/fs,upperdir=/x":                   true,
		"rw,lowerdir=9/fs:7/fs,upperdir=12/fs,workdir=12/work":                                                                              true,
		"rw,lowerdir=/var/lib/reprise/snapshotter/snapshots/77/fs,upperdir=/x":                                                              false,
		"rw,lowerdir=17/fs,upperdir=12/fs":                                                                                                  false,
		"rw,lowerdir=/other/snapshots/7/fs,upperdir=/x":                                                                                     false,
		"rw,lowerdir=/other,upperdir=/var/lib/reprise/snapshotter/snapshots/7/fs,workdir=/var/lib/reprise/snapshotter/snapshots/7/work":     false,
		"rw,lowerdir=/var/lib/reprise/snapshotter/snapshots/7/fs/deeper:/var/lib/reprise/snapshotter/snapshots,upperdir=/var/lib/reprise/x": false,
		"":   false,
		"rw": false,
	} {
		require.Equal(t, want, at.isLower(options), options)
	}
	require.False(t, rootPlace{}.isLower("rw,lowerdir=,upperdir=/x"), "a device that is not mounted")
	require.False(t, at.has(os.Getpid()))
	require.False(t, at.inUse())
}
