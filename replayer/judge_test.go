package replayer

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
)

// TestJudge runs the scripts in testdata/judge: what happens to a replay, one
// event a line, and the judge's verdict after each group. All numbers are KiB.
//
//	plan                     the reads of a trace, as in testdata/plan
//	look [fetched]           events, then the judge looks, as it does all the time
//	    next N               so many pieces are sent, if there are, and arrive
//	    read N               demand reads so much of what was brought
//	    miss LAYER:OFF+LEN   demand has to fetch, which gives what it does fetch
func TestJudge(t *testing.T) {
	datadriven.Walk(t, "testdata/judge", func(t *testing.T, path string) {
		var (
			s             planScript
			j             judge
			used, brought int64
		)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "plan" {
				j, used, brought = judge{}, 0, 0
				return s.run(t, d)
			}
			require.Equal(t, "look", d.Cmd)
			var got []string
			for line := range strings.SplitSeq(d.Input, "\n") {
				f, n := strings.Fields(line), int64(1)
				switch f[0] {
				case "next":
					_, err := fmt.Sscan(f[1], &n)
					require.NoError(t, err)
					for range n {
						w, _ := s.p.Next(s.link)
						brought += w.Len
					}
				case "read":
					_, err := fmt.Sscan(f[1], &n)
					require.NoError(t, err)
					used += n << 10
				case "miss":
					for _, w := range f[1:] {
						got = append(got, strings.TrimSpace(wantString(s.p.Around(parseWant(t, w), s.link))))
					}
				default:
					d.Fatalf(t, "unknown event %q", line)
				}
			}
			v := s.p.judge(&j, used, brought)
			out := fmt.Sprintf("%v (%s brought, %s read)\n", v, kib(brought), kib(used))
			if d.HasArg("fetched") {
				out += "fetched " + strings.Join(got, " ") + "\n"
			}
			if v == endWrong || v == endLate {
				out += s.p.why(v) + "\n"
			}
			return out
		})
	})
}

// A plan that is held gives nothing out, and goes on where it was.
func TestPlanHeld(t *testing.T) {
	p, err := NewPlan(parseTrace(t, "0:0+900 1:0+900"), halved(layerInfos(2<<20, 2<<20)), nil)
	require.NoError(t, err)
	var j judge
	p.Next(backstore.Estimate{})
	for i := range int64(wrongReads) {
		p.Around(backstore.Want{Layer: 1, Off: 920<<10 + i*4096, Len: 4096}, backstore.Estimate{})
	}
	require.Equal(t, hold, p.judge(&j, 0, wrongBytes))
	_, ok := p.Next(backstore.Estimate{})
	require.False(t, ok)
	require.True(t, p.wasHeld())
	require.False(t, p.wasHeld(), "it is told once")
	require.Equal(t, goOn, p.judge(&j, 100<<10, wrongBytes))
	w, ok := p.Next(backstore.Estimate{})
	require.True(t, ok)
	require.Equal(t, backstore.Want{Off: 256 << 10, Len: 256 << 10}, w)
}
