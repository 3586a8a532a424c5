package keeper

import (
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkRestart kills a child and waits for the next: exec-ms is when its
// program has been executed, up-ms when it has got its descriptors back and
// says so. Medians, in milliseconds.
func BenchmarkRestart(b *testing.B) {
	for _, kept := range []int{0, 100} {
		b.Run(fmt.Sprintf("kept=%d", kept), func(b *testing.B) {
			started := make(chan time.Time, 1)
			r := newRig(b, Options{OnStart: func(int) { started <- time.Now() }})
			<-started
			r.up()
			for i := range kept {
				r.ok("store %d.x -", i)
			}
			var exec, up []time.Duration
			for b.Loop() {
				begin := time.Now()
				r.kill()
				exec = append(exec, (<-started).Sub(begin))
				r.up()
				up = append(up, time.Since(begin))
			}
			reportMedian(b, exec, "exec-ms")
			reportMedian(b, up, "up-ms")
		})
	}
}

func reportMedian(b *testing.B, times []time.Duration, unit string) {
	slices.Sort(times)
	b.ReportMetric(times[len(times)/2].Seconds()*1e3, unit)
}

// BenchmarkStart is the number beside: a program is started, and says that it is
// up, by nobody who keeps anything.
func BenchmarkStart(b *testing.B) {
	var exec, up []time.Duration
	for b.Loop() {
		r, w, err := os.Pipe()
		require.NoError(b, err)
		cmd := osexec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), envChild+"=nothing")
		cmd.Stdout = w
		begin := time.Now()
		require.NoError(b, cmd.Start())
		exec = append(exec, time.Since(begin))
		_, err = r.Read(make([]byte, 1))
		require.NoError(b, err)
		up = append(up, time.Since(begin))
		require.NoError(b, cmd.Wait())
		require.NoError(b, errors.Join(r.Close(), w.Close()))
	}
	reportMedian(b, exec, "exec-ms")
	reportMedian(b, up, "up-ms")
}

// BenchmarkStore keeps and removes a descriptor, each with its barrier.
func BenchmarkStore(b *testing.B) {
	r := newRig(b, Options{})
	r.up()
	for b.Loop() {
		r.ok("store a.x -")
		r.ok("remove a.x")
	}
}
