package lsmt

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The header of an index log has, at byte 4032, which the LSMT format leaves
// unused, up to where its records were durable at the last Sync, and in which
// boot of the machine the rest was written:
//
//	0   8  magic "RPRSSYN\1"
//	8   36 boot id, the text of /proc/sys/kernel/random/boot_id
//	44  8  end of the durable records in the file, little-endian
//	52  4  CRC-32C of the bytes before this field
//
// It is written after a Sync and becomes durable with the next one, at the
// latest. After another boot a record behind that end counts only if its data
// are no hole of the data file: it may have reached the disk and they not.
const (
	syncedMagic = "RPRSSYN\x01"
	syncedAt    = 4032
	syncedSize  = 56
	bootIDSize  = 36
)

type bootID [bootIDSize]byte

// thisBoot is zero where it cannot be known.
func thisBoot() (id bootID) {
	p, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err == nil {
		copy(id[:], p)
	}
	return id
}

// readSynced reads what the header of an index log says; boot is zero if it
// says nothing.
func readSynced(log *os.File) (boot bootID, end int64, err error) {
	var b [syncedSize]byte
	if _, err := log.ReadAt(b[:], syncedAt); err != nil && !errors.Is(err, io.EOF) {
		return boot, 0, err
	}
	le := binary.LittleEndian
	if string(b[:8]) != syncedMagic || le.Uint32(b[52:]) != crc32.Checksum(b[:52], castagnoli) {
		return boot, 0, nil
	}
	copy(boot[:], b[8:44])
	return boot, int64(le.Uint64(b[44:])), nil
}

// writeSynced says that the records before end are durable, and that this boot
// writes what follows.
func (w *Writable) writeSynced(end int64) error {
	if w.boot == (bootID{}) {
		return nil
	}
	b := append([]byte(syncedMagic), w.boot[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(end))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	_, err := w.log.WriteAt(b, syncedAt)
	return err
}

// isThere tells whether the data of x are no hole of the data file.
func (w *Writable) isThere(x extent) (bool, error) {
	off := x.moff * SectorSize
	from, to, err := nextData(w.data, off)
	if errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	return from == off && to >= off+x.n*SectorSize, err
}
