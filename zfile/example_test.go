package zfile_test

import (
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/reprise-project/reprise/zfile"
)

// A layer is compressed into a blob for a registry, and one range of it is read
// back.
func Example() {
	f, err := os.CreateTemp("", "layer-*.zfile")
	if err != nil {
		log.Fatal(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()

	w, err := zfile.NewWriter(f, &zfile.Options{Algo: zfile.LZ4, Tar: true})
	if err != nil {
		log.Fatal(err)
	}
	for i := range 20000 {
		fmt.Fprintf(w, "line %5d\n", i)
	}
	if err := w.Close(); err != nil {
		log.Fatal(err)
	}

	st, err := f.Stat()
	if err != nil {
		log.Fatal(err)
	}
	r, err := zfile.Open(f, st.Size())
	if err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 22)
	if _, err := r.ReadAt(p, 11*12345); err != nil {
		log.Fatal(err)
	}
	info := r.Info()
	off, n := r.CompressedRange(11*12345, int64(len(p)))
	fmt.Println(strings.TrimSpace(string(p)))
	fmt.Println(info.Algo, info.Size, "bytes in", info.Blocks, "blocks, at", info.Base)
	fmt.Println("behind the two lines:", n < 4096 && off > info.Base)
	// Output:
	// line 12345
	// line 12346
	// lz4 220000 bytes in 54 blocks, at 1536
	// behind the two lines: true
}
