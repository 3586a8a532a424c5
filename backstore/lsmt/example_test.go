package lsmt_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// Two layers are written and merged, and a range of the device is looked up.
func Example() {
	const size = 1 << 20
	makeLayer := func(fill func(w *lsmt.Writable) error) (*lsmt.Layer, error) {
		f, err := os.CreateTemp("", "layer")
		if err != nil {
			return nil, err
		}
		defer os.Remove(f.Name())
		w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: size})
		if err != nil {
			f.Close()
			return nil, err
		}
		defer w.Close()
		if err := fill(w); err != nil {
			return nil, err
		}
		var b bytes.Buffer
		if err := w.Commit(context.Background(), &b, lsmt.CommitOptions{}); err != nil {
			return nil, err
		}
		return lsmt.OpenLayer(bytes.NewReader(b.Bytes()), int64(b.Len()))
	}
	lower, err := makeLayer(func(w *lsmt.Writable) error {
		_, err := w.WriteAt(make([]byte, 32768), 0)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	upper, err := makeLayer(func(w *lsmt.Writable) error {
		if err := w.Discard(4096, 4096); err != nil {
			return err
		}
		_, err := w.WriteAt(make([]byte, 4096), 8192)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	index, err := lsmt.Merge([]*lsmt.Layer{lower, upper})
	if err != nil {
		log.Fatal(err)
	}
	for _, s := range index.Lookup(nil, 0, 40960) {
		fmt.Printf("%5d+%d %v", s.Off, s.Len, s.Kind)
		if s.Kind == lsmt.Data {
			fmt.Printf(" in layer %d at %d", s.Layer, s.LayerOff)
		}
		fmt.Println()
	}
	// Output:
	//     0+4096 data in layer 0 at 4096
	//  4096+4096 zero
	//  8192+4096 data in layer 1 at 4096
	// 12288+20480 data in layer 0 at 16384
	// 32768+8192 hole
}
