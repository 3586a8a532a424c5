package zfile

import "fmt"

// Slack is the room beyond a block that decoding may use, in bytes. zstd takes
// half as long again without it.
const Slack = zstdSlack

// ReadBlocks decodes blocks side by side, each to a place of its own: block
// first+i to the start of dst[i], which is at least as long as that block, or
// nowhere where dst[i] is nil. Up to [Slack] bytes of dst[i] behind the block
// are scribbled over; blocks are decoded in order, so these may be the place of
// the next one that is wanted. It reads the blob like ReadAt, from the first
// block that is wanted to the last. After an error the content of dst is
// undefined.
func (r *Reader) ReadBlocks(first int, dst [][]byte) error {
	if first < 0 || len(dst) > r.info.Blocks || first > r.info.Blocks-len(dst) {
		return fmt.Errorf("zfile: blocks [%d, +%d) of %d", first, len(dst), r.info.Blocks)
	}
	for len(dst) > 0 && dst[0] == nil {
		first, dst = first+1, dst[1:]
	}
	for len(dst) > 0 && dst[len(dst)-1] == nil {
		dst = dst[:len(dst)-1]
	}
	if len(dst) == 0 {
		return nil
	}
	end := first + len(dst)
	buf := r.buffers(first, end)
	defer buf.release()
	dec := newDecoder(&r.info)
	defer dec.release()
	for first < end {
		next := r.runEnd(first, end, int64(len(buf.run)))
		if err := r.decodeRun(dst[:next-first], first, buf, &dec); err != nil {
			return err
		}
		first, dst = next, dst[next-first:]
	}
	return nil
}

// decodeRun reads the blocks from first on, which fit in buf, and decodes those
// that are wanted.
func (r *Reader) decodeRun(dst [][]byte, first int, buf *buffers, dec *decoder) error {
	run, err := r.readRun(first, first+len(dst), buf)
	if err != nil {
		return err
	}
	for i, p := range dst {
		if p == nil {
			continue
		}
		if err := r.decodeBlock(p, first+i, r.inRun(run, first, first+i), buf, dec); err != nil {
			return err
		}
	}
	return nil
}
