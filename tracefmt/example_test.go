package tracefmt_test

import (
	"bytes"
	"fmt"
	"time"

	"github.com/reprise-project/reprise/tracefmt"
)

// A file that is cut off has the events up to its last whole frame.
func Example() {
	var file bytes.Buffer
	w, err := tracefmt.NewWriter(&file, tracefmt.Header{Image: "registry.example/app:1"})
	if err != nil {
		panic(err)
	}
	for i := range int64(3) {
		e := tracefmt.Event{At: time.Duration(i) * time.Millisecond, Off: i * 8192, Len: 4096}
		if err := w.Add(e); err != nil {
			panic(err)
		}
		if err := w.Flush(); err != nil {
			panic(err)
		}
	}
	file.Truncate(file.Len() - 1)

	t, err := tracefmt.Read(&file)
	if err != nil {
		panic(err)
	}
	fmt.Println(t.Image, len(t.Events), t.Bytes(), t.End == nil)
	// Output: registry.example/app:1 2 8192 true
}
