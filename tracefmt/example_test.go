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

// What one recording happens to read, a majority of three leaves out.
func ExampleMerge() {
	recording := func(offs ...int64) *tracefmt.Trace {
		t := &tracefmt.Trace{}
		for i, off := range offs {
			t.Events = append(t.Events, tracefmt.Event{At: time.Duration(i) * time.Second, Off: off, Len: 4096})
		}
		return t
	}
	runs := []*tracefmt.Trace{recording(0, 8192, 65536), recording(0, 8192), recording(8192, 0)}
	t, agreement, err := tracefmt.Merge(runs, tracefmt.MergeMajority)
	if err != nil {
		panic(err)
	}
	for _, e := range t.Events {
		fmt.Println(e.At, e.Off, e.Hits, "of", t.Runs)
	}
	fmt.Println(t.End.Reason, agreement.BytesAll, "of", agreement.Bytes, "bytes in all;", agreement.Unique)
	// Output:
	// 0s 0 3 of 3
	// 1s 8192 3 of 3
	// merge of 3 runs 8192 of 12288 bytes in all; [4096 0 0]
}
