package lsmt

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// benchIndex is n segments of 1 to 16 sectors with a gap behind most of them.
func benchIndex(n int) *Index {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	ents := make([]entry, n)
	off := uint64(0)
	for i := range ents {
		length := 1 + r.Uint64N(16)
		ents[i] = newEntry(off, length, 8+off, r.IntN(8) == 0)
		off += length + r.Uint64N(8)
	}
	return newIndex(ents)
}

// BenchmarkLookup looks up 4 KiB at random places. The reference
// implementation does 31.6, 24.9, 16.6 and 6.2 million lookups a second on
// such a core.
func BenchmarkLookup(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x := benchIndex(n)
			size := x.ents[n-1].end()
			dst := make([]Segment, 0, 64)
			rng := uint64(1)
			b.ReportAllocs()
			for b.Loop() {
				rng = rng*6364136223846793005 + 1442695040888963407
				off := (rng >> 32) * (size >> 3) >> 32 << 12
				dst = x.Lookup(dst[:0], int64(off), 4096)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds()/1e6, "M/s")
		})
	}
}

// BenchmarkLookupSector looks up one sector each: one segment, as a rule.
func BenchmarkLookupSector(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x := benchIndex(n)
			size := x.ents[n-1].end()
			dst := make([]Segment, 0, 64)
			rng := uint64(1)
			b.ReportAllocs()
			for b.Loop() {
				rng = rng*6364136223846793005 + 1442695040888963407
				off := (rng >> 32) * size >> 32 << 9
				dst = x.Lookup(dst[:0], int64(off), SectorSize)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds()/1e6, "M/s")
		})
	}
}

func BenchmarkMerge44x10k(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	var layers []*Layer
	for range 44 {
		x := benchIndex(10_000)
		shift := r.Uint64N(1 << 20)
		for i := range x.entries() {
			x.ents[i].key += shift << lengthBits
		}
		layers = append(layers, &Layer{index: x})
	}
	b.ReportAllocs()
	for b.Loop() {
		x, err := Merge(layers)
		if err != nil || x.Len() < 10_000 {
			b.Fatal(err)
		}
	}
}

func benchWritable(b *testing.B, sparse bool, size int64) *Writable {
	b.Helper()
	o := &WritableOptions{VirtualSize: size}
	var w *Writable
	var err error
	if sparse {
		w, err = CreateSparse(newFile(b), o)
	} else {
		w, err = CreateAppend(newFile(b), newFile(b), o)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { w.Close() })
	return w
}

func benchKinds(b *testing.B, run func(b *testing.B, w *Writable)) {
	for _, sparse := range []bool{false, true} {
		name := "append"
		if sparse {
			name = "sparse"
		}
		b.Run(name, func(b *testing.B) { run(b, benchWritable(b, sparse, 1<<30)) })
	}
}

// BenchmarkWrite4K writes 4 KiB at random places of 1 GiB. The data go to the
// page cache.
func BenchmarkWrite4K(b *testing.B) {
	benchKinds(b, func(b *testing.B, w *Writable) {
		r := rand.New(rand.NewPCG(1, 2))
		p := bytes.Repeat([]byte("data"), 1024)
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := w.WriteAt(p, r.Int64N(1<<18)<<12); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkRead4K(b *testing.B) {
	benchKinds(b, func(b *testing.B, w *Writable) {
		r := rand.New(rand.NewPCG(1, 2))
		p := bytes.Repeat([]byte("data"), 1024)
		for range 20_000 {
			if _, err := w.WriteAt(p, r.Int64N(1<<15)<<12); err != nil {
				b.Fatal(err)
			}
		}
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := w.ReadAt(p, r.Int64N(1<<15)<<12); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkInsert maps 4 KiB at random places of 8 GiB, in memory only.
func BenchmarkInsert(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	var m extentMap
	b.ReportAllocs()
	for i := int64(0); b.Loop(); i++ {
		m.insert(extent{r.Int64N(1<<21) * 8, 8, 8 + 8*i})
	}
	b.ReportMetric(float64(m.count), "extents")
}

func BenchmarkCommit(b *testing.B) {
	benchKinds(b, func(b *testing.B, w *Writable) {
		r := rand.New(rand.NewPCG(1, 2))
		p := bytes.Repeat([]byte("data"), 4096)
		for range 8_000 {
			if _, err := w.WriteAt(p, r.Int64N(1<<16)<<14); err != nil {
				b.Fatal(err)
			}
		}
		var n int64
		for _, x := range w.ext.all() {
			n += x.n * SectorSize
		}
		b.SetBytes(n)
		for b.Loop() {
			if err := w.Commit(context.Background(), io.Discard, CommitOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
