package backstore_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"path"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

const (
	benchLayers = 8
	benchLayer  = 24 << 20
)

var benchLinks = []string{"10ms,200mbit", "30ms,1gbit", "2ms,2gbit"}

// benchSite serves some blobs over a shaped link, on real sockets.
type benchSite struct {
	link  *regtest.Link
	addr  string
	blobs []ocispec.Descriptor
}

func newBenchSite(b *testing.B, link string) *benchSite {
	b.Helper()
	spec, err := regtest.ParseLink(link)
	require.NoError(b, err)
	data := map[string][]byte{}
	s := &benchSite{}
	for i := range benchLayers {
		p := make([]byte, benchLayer)
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(p)
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(p), Size: benchLayer}
		data[d.Digest.String()] = p
		s.blobs = append(s.blobs, d)
	}
	s.link = regtest.NewLink(spec, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data[path.Base(r.URL.Path)]))
	}))
	srv, err := regtest.Start(b.Context(), s.link)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, srv.Close()) })
	s.addr = srv.Addr
	return s
}

// open opens the blobs with a cache and connections that know nothing yet.
func (s *benchSite) open(b *testing.B) (blobs backstore.Stack, done func()) {
	b.Helper()
	dir := b.TempDir()
	c, err := registry.New(&registry.Options{HostsDir: dir, DockerConfigDir: dir, LockDir: dir, PlainHTTP: true})
	require.NoError(b, err)
	cache, err := backstore.OpenCache(b.TempDir(), &backstore.CacheOptions{Log: slog.New(slog.DiscardHandler)})
	require.NoError(b, err)
	for _, d := range s.blobs {
		f, err := c.Blob(s.addr+"/some/repo", d)
		require.NoError(b, err)
		blob, err := cache.Blob(d.Digest, d.Size, f)
		require.NoError(b, err)
		blobs = append(blobs, blob)
	}
	return blobs, func() {
		for _, blob := range blobs {
			require.NoError(b, blob.Close())
		}
		require.NoError(b, cache.Close())
		require.NoError(b, c.Close())
	}
}

// ranges is a plan like that of a start: ranges of 4 KiB to 1 MiB, most of them
// short, all over the first half of each layer, in no order.
type ranges struct {
	wants []backstore.Want
	bytes int64
}

func newRanges(total int64) *ranges {
	r := rand.New(rand.NewPCG(1, 2))
	p := &ranges{}
	next := make([]int64, benchLayers)
	for p.bytes < total {
		w := backstore.Want{Layer: r.IntN(benchLayers), Len: int64(4<<10) << r.IntN(9)}
		w.Off = next[w.Layer]
		if next[w.Layer] += w.Len + 128<<10; next[w.Layer] > benchLayer*3/4 {
			continue
		}
		p.wants = append(p.wants, w)
		p.bytes += w.Len
	}
	r.Shuffle(len(p.wants), func(i, j int) { p.wants[i], p.wants[j] = p.wants[j], p.wants[i] })
	return p
}

func (p *ranges) plan() backstore.Plan { return &asListed{wants: p.wants} }

type asListed struct{ wants []backstore.Want }

func (l *asListed) Next(backstore.Estimate) (w backstore.Want, ok bool) {
	if len(l.wants) == 0 {
		return w, false
	}
	w, l.wants = l.wants[0], l.wants[1:]
	return w, true
}

func (l *asListed) Around(w backstore.Want, _ backstore.Estimate) backstore.Want { return w }

// BenchmarkReplay is a replay alone, by a process that knows nothing of the link
// yet: how much of the link it uses, the first round trips included.
func BenchmarkReplay(b *testing.B) {
	for _, link := range benchLinks {
		for _, mib := range []int64{16, 48} {
			b.Run(fmt.Sprintf("%s/%dMiB", link, mib), func(b *testing.B) {
				s := newBenchSite(b, link)
				plan := newRanges(mib << 20)
				b.SetBytes(plan.bytes)
				for b.Loop() {
					b.StopTimer()
					blobs, done := s.open(b)
					b.StartTimer()
					_, err := blobs.Prefetch(b.Context(), plan.plan(), nil)
					require.NoError(b, err)
					b.StopTimer()
					done()
					b.StartTimer()
				}
				rate := float64(s.link.Spec().Rate) / 8
				took := b.Elapsed().Seconds() / float64(b.N)
				b.ReportMetric(100*float64(plan.bytes)/rate/took, "%link")
				b.ReportMetric(float64(len(plan.wants)), "ranges")
			})
		}
	}
}

// BenchmarkDemandAmidReplay is what a reader waits for 4 KiB that no plan knows,
// one read after the other, alone and while a replay is running.
func BenchmarkDemandAmidReplay(b *testing.B) {
	for _, link := range benchLinks {
		for _, replay := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/replay=%v", link, replay), func(b *testing.B) {
				s := newBenchSite(b, link)
				plan := newRanges(48 << 20)
				var waits []time.Duration
				var replayed int64
				for b.Loop() {
					w, n := readAmid(b, s, plan, replay)
					waits, replayed = append(waits, w...), replayed+n
				}
				b.ReportMetric(float64(replayed)/1e6/b.Elapsed().Seconds(), "MB/s-replayed")
				slices.Sort(waits)
				for _, q := range []int{50, 95} {
					b.ReportMetric(float64(waits[len(waits)*q/100].Microseconds())/1000, fmt.Sprintf("ms/p%d", q))
				}
			})
		}
	}
}

func readAmid(b *testing.B, s *benchSite, plan *ranges, replay bool) (waits []time.Duration, replayed int64) {
	blobs, done := s.open(b)
	defer done()
	ctx, stop := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if replay {
			_, _ = blobs.Prefetch(ctx, plan.plan(), nil)
		}
	}()
	r := rand.New(rand.NewPCG(3, 4))
	p := make([]byte, 4096)
	for range 40 {
		time.Sleep(time.Millisecond) // the reader's own work
		l, off := r.IntN(benchLayers), benchLayer*3/4+r.Int64N(benchLayer/4-4096)
		start := time.Now()
		_, err := blobs[l].ReadAt(p, off)
		require.NoError(b, err)
		waits = append(waits, time.Since(start))
	}
	stop()
	<-ended
	return waits, blobs.Stats().BackgroundBytes
}
