package keeper

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestParseMessage(t *testing.T) {
	for _, c := range []struct {
		text string
		want message
	}{
		{"", message{}},
		{"READY=1", message{ready: true}},
		{"READY=1\nSTATUS=a=b\n", message{ready: true, status: "a=b"}},
		{"READY=0\nREADY=1", message{}}, // the first counts
		{"READY", message{}},
		{"FDSTORE=1\nFDNAME=a.b\nFDPOLL=0", message{store: true, name: "a.b"}},
		{"FDSTORE=1\nFDNAME=a:b", message{store: true}},
		{"FDSTORE=1\nFDNAME=\x7f", message{store: true}},
		{"FDSTORE=1\nFDNAME=" + strings.Repeat("x", 256), message{store: true}},
		{"FDSTOREREMOVE=1\nFDNAME=x y", message{remove: true, name: "x y"}},
		{"BARRIER=1", message{barrier: true}},
		{"BARRIER=1\n", message{barrier: true}},
		{"BARRIER=2", message{}},
		{"WATCHDOG=trigger\nSTOPPING=1", message{watchdog: "trigger", stopping: true}},
		{"X_REPRISE_EXEC=/a b", message{exec: "/a b"}},
		{"MAINPID=1\nUNKNOWN=2\n=3\n\n", message{}},
	} {
		got, err := parseMessage([]byte(c.text))
		require.NoError(t, err, c.text)
		require.Equal(t, c.want, got, c.text)
	}
	for _, bad := range []string{"BARRIER=1\nREADY=1", "READY=1\nBARRIER=1", "READY=1\x00", strings.Repeat("x", 4097)} {
		_, err := parseMessage([]byte(bad))
		require.Error(t, err, bad)
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, s := range []string{
		"READY=1\nSTATUS=x", "BARRIER=1", storeMessage("vol.fuse"), removeMessage("vol.fuse"), "X_REPRISE_EXEC=/bin/reprise", "A\n=\n\n\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := parseMessage(text)
		if err != nil {
			require.Equal(t, message{}, m)
			return
		}
		require.NoError(t, checkName(m.name))
		require.False(t, m.barrier && (m.store || m.ready || m.exec != ""), "a barrier is alone")
		require.NotContains(t, m.exec+m.status, "\n")
		if m.store && m.name != "" { // what a Store would send for it says the same
			again, err := parseMessage([]byte(storeMessage(m.name)))
			require.NoError(t, err)
			require.Equal(t, message{store: true, name: m.name}, again)
		}
	})
}

func FuzzEnvironment(f *testing.F) {
	f.Add("2", "a:b.c", "7", "1:5", "@x", "100", "10")
	f.Add("-1", ":", "x", "1:2:3", "vsock:1:2", "-", "18446744073709551616")
	f.Fuzz(func(t *testing.T, fds, names, pid, keeper, notify, limit, watchdog string) {
		e := environment{pid: 7, ppid: 1, first: 1 << 20, values: map[string]string{
			envListenFDs: fds, envListenNames: names, envListenPID: pid, envNotify: notify, envStoreMax: limit, envWatchdog: watchdog,
		}}
		_, _, _ = environment{first: 3, values: map[string]string{envKeeper: keeper}}.lifeline()
		if s, err := openStore(e); err == nil { // no descriptor is that high
			require.Empty(t, s.IDs())
			require.GreaterOrEqual(t, s.Watchdog(), time.Duration(0))
		}
	})
}

func TestParseStat(t *testing.T) {
	st, err := readStat(unix.Getpid())
	require.NoError(t, err)
	require.Equal(t, unix.Getppid(), st.ppid)
	require.False(t, st.exiting())
	line := []byte("42 (a) b (c)) Z 41 42 42 0 -1 4194308 " + strings.Repeat("0 ", 42) + "256\n")
	st, err = parseStat(line)
	require.NoError(t, err)
	require.Equal(t, procStat{ppid: 41, tty: 0, flags: 4194308, exit: exited(1)}, st)
	require.True(t, st.exiting())
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("42 (a) b (c)) Z 41 42 42 0 -1 4194308 " + strings.Repeat("0 ", 42) + "256\n"))
	f.Add([]byte("1 (x) R"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStat(b) })
}
