package lsmt

import (
	"context"
	"fmt"
	"io"
)

// CommitOptions say what a committed layer states about itself.
type CommitOptions struct {
	// UUID is the layer's UUID as text. Empty means the null UUID.
	UUID string
	// ParentUUID is that of the layer below. Empty means the one that the
	// writable layer was created with.
	ParentUUID string
	// Message is stored in the layer, at most 256 bytes.
	Message string
}

// Commit writes the layer to dst as a sealed layer: header, data, index and
// trailer, front to back. Data lie in the order of the device; a run of them is
// one entry up to 16,320 sectors, whichever way it was written, and neighbouring
// discards are one entry while they are together shorter than 16,383 sectors.
// The reference implementation writes the same bytes, except that it may cut
// runs of data above 8 MiB elsewhere, depending on the sizes of the writes.
//
// The layer goes on unchanged. Writes to an append-only layer go on meanwhile
// and are not in the result; writes to a sparse layer wait. Cancelling ctx
// ends the commit; dst then has a part of a layer.
func (w *Writable) Commit(ctx context.Context, dst io.Writer, o CommitOptions) error {
	if err := w.commit(ctx, dst, &o); err != nil {
		return fmt.Errorf("commit layer: %w", err)
	}
	return nil
}

func (w *Writable) commit(ctx context.Context, dst io.Writer, o *CommitOptions) error {
	if w.closed.Load() {
		return errClosed
	}
	h, err := w.snapshotHeader(o)
	if err != nil {
		return err
	}
	if w.log == nil {
		w.gate.Lock()
		defer w.gate.Unlock()
	}
	w.mu.RLock()
	from := w.ext.all()
	w.mu.RUnlock()

	l := compact(from)
	if len(l.ents) > MaxSegments {
		return fmt.Errorf("%d segments, more than the format's %d: the layer is too fragmented",
			len(l.ents), MaxSegments)
	}
	h.flags = flagHeader | flagData | flagSealed
	if _, err := dst.Write(h.append(nil)); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	if err := w.copyData(ctx, dst, from); err != nil {
		return err
	}
	tail := appendIndex(nil, l.ents, indexPad)
	h.flags &^= flagHeader
	h.indexOffset = uint64(l.end) * SectorSize
	h.indexSize = uint64(len(tail) / entrySize)
	if _, err := dst.Write(h.append(tail)); err != nil {
		return fmt.Errorf("write index and trailer: %w", err)
	}
	return nil
}

// snapshotHeader makes the fields of a committed header that do not depend on
// the data.
func (w *Writable) snapshotHeader(o *CommitOptions) (header, error) {
	w.gate.RLock()
	h := header{virtualSize: w.hdr.virtualSize, parentUUID: w.hdr.parentUUID, userTag: o.Message}
	w.gate.RUnlock()
	var err error
	if h.uuid, err = canonicalUUID(o.UUID); err != nil {
		return h, err
	}
	if o.ParentUUID != "" {
		if h.parentUUID, err = canonicalUUID(o.ParentUUID); err != nil {
			return h, fmt.Errorf("parent: %w", err)
		}
	}
	if len(o.Message) > maxMessage {
		return h, fmt.Errorf("message of %d bytes: at most %d fit", len(o.Message), maxMessage)
	}
	return h, nil
}

// layout is where things will be in a committed layer.
type layout struct {
	ents []entry
	end  int64 // sector behind the data
}

// compact gives the extents of a writable layer their entries in a committed
// one, whose data lie in the order of the device.
func compact(from []extent) layout {
	l := layout{end: firstSector}
	for i := 0; i < len(from); {
		x := from[i]
		i++
		if x.zero() {
			l.addZero(x)
			continue
		}
		for ; i < len(from) && !from[i].zero() && from[i].off == x.end(); i++ {
			x.n += from[i].n
		}
		x.moff = l.end
		for part := range x.cut(maxRun) {
			l.ents = append(l.ents, part.entry())
		}
		l.end += x.n
	}
	return l
}

// addZero adds a discard, as a part of the entry before it if that stays
// shorter than the format's limit.
func (l *layout) addZero(x extent) {
	if n := len(l.ents); n > 0 {
		if e := l.ents[n-1]; e.zeroed() && e.end() == uint64(x.off) && e.len()+uint64(x.n) < maxLength {
			l.ents[n-1] = newEntry(e.off(), e.len()+uint64(x.n), e.moffset(), true)
			return
		}
	}
	x.moff = zeroAt(l.end)
	l.ents = append(l.ents, x.entry())
}

// copyData writes the data of all extents to dst, in their order.
func (w *Writable) copyData(ctx context.Context, dst io.Writer, from []extent) error {
	buf := make([]byte, 1<<20)
	n := 0 // bytes gathered in buf, so that small extents make large writes
	flush := func() error {
		if err := context.Cause(ctx); err != nil || n == 0 {
			return err
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return fmt.Errorf("write data: %w", err)
		}
		n = 0
		return nil
	}
	for _, x := range from {
		if x.zero() {
			continue
		}
		at, left := x.moff*SectorSize, x.n*SectorSize
		for left > 0 {
			p := buf[n:min(int64(len(buf)), int64(n)+left)]
			if err := readFull(w.data, p, at); err != nil {
				return fmt.Errorf("read data of sectors [%d, %d): %w", x.off, x.end(), err)
			}
			n += len(p)
			at += int64(len(p))
			left -= int64(len(p))
			if n == len(buf) {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// appendIndex adds the entries to b, and padding up to a multiple of pad of
// them.
func appendIndex(b []byte, ents []entry, pad int) []byte {
	for _, e := range ents {
		b = e.append(b)
	}
	for n := len(ents); n%pad != 0; n++ {
		b = appendPadding(b)
	}
	return b
}

// Seal makes the data file itself a sealed layer, by writing index and trailer
// behind the data, and syncs it. After that the layer can be read and
// committed but not changed; the index log is not needed any more. OpenLayer
// opens the data file.
func (w *Writable) Seal() error {
	w.gate.Lock()
	defer w.gate.Unlock()
	if err := w.seal(); err != nil {
		return fmt.Errorf("seal layer: %w", err)
	}
	return nil
}

func (w *Writable) seal() error {
	if err := w.writable("seal", 0, 0); err != nil {
		return err
	}
	at := w.dataEnd.Load()
	if w.log == nil {
		at = firstSector + int64(w.hdr.virtualSize)/SectorSize
	}
	var ents []entry
	for _, x := range w.ext.all() {
		for part := range x.cut(maxLength) {
			ents = append(ents, part.entry())
		}
	}
	if len(ents) > MaxSegments {
		return fmt.Errorf("%d segments, more than the format's %d: commit it instead", len(ents), MaxSegments)
	}
	h := w.hdr
	h.flags = h.flags&^flagHeader | flagSealed
	h.indexOffset = uint64(at) * SectorSize
	h.indexSize = uint64(len(ents))
	b := appendIndex(nil, ents, 1)
	b = append(b, make([]byte, -len(b)&(SectorSize-1))...)
	b = h.append(b)
	if _, err := w.data.WriteAt(b, at*SectorSize); err != nil {
		return fmt.Errorf("write index and trailer: %w", err)
	}
	if err := w.data.Truncate(at*SectorSize + int64(len(b))); err != nil {
		return fmt.Errorf("cut behind the trailer: %w", err)
	}
	if err := fdatasync(w.data); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	w.sealed = true
	return nil
}
