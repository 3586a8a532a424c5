package backstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
)

// The presence map of a cached blob, little-endian:
//
//	0   8  magic "RPRSMAP\1"
//	8   8  size of the blob in bytes
//	16  4  chunk size in bytes
//	20  4  flags: 1 = the whole blob is there and its digest was checked
//	24  4  CRC-32C of the bytes after this header
//	28  4  CRC-32C of the header before this field
//	32  …  one bit a chunk, chunk 0 in the lowest bit of the first byte,
//	       padded to 8 bytes
//
// It is replaced as a whole, after the data it speaks of has been synced. A
// map that does not fit its blob, in any way, counts as empty.
//
// The live map says the same of this boot of the machine, up to the moment. It
// is mapped by every process that has the blob open: a process that is killed
// leaves it as it was, and others see a chunk as soon as one has fetched it.
// Integers are little-endian, the words of the set in the machine's byte order:
//
//	0   8  magic "RPRSLIV\1"
//	8   8  size of the blob in bytes
//	16  8  device number of the data file's file system
//	24  8  inode number of the data file
//	32  8  when the data file was made, in nanoseconds since 1970; 0 unknown
//	40  16 boot id, /proc/sys/kernel/random/boot_id
//	56  4  chunk size in bytes
//	60  4  CRC-32C of the header before this field
//	64  …  one bit a chunk, chunk 0 in the lowest bit of the first 64-bit word
//
// A bit is set, atomically, once the chunk's bytes have been written to the
// data file, and cleared before they are taken away. Where all of the header is
// as expected the live map alone is trusted and the presence map is not;
// otherwise it is made anew of the presence map. A file that is there is only
// replaced by a process that has the blob open alone; one that finds another's
// goes without, and removes it before it takes bytes away. Nothing is promised
// where a file system loses what was not synced though the machine goes on.
const (
	liveMagic  = "RPRSLIV\x01"
	liveHeader = 64
	liveSuffix = ".live"

	mapMagic      = "RPRSMAP\x01"
	mapHeader     = 32
	mapVerified   = 1
	mapSuffix     = ".map"
	dataSuffix    = ".data"
	maxBlobSize   = 1 << 42
	maxMapPayload = maxBlobSize / minChunk / 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encodeMap(size, chunk int64, flags uint32, present bitset) []byte {
	p := make([]byte, mapHeader+8*len(present))
	for i := range present {
		binary.LittleEndian.PutUint64(p[mapHeader+8*i:], present[i].Load())
	}
	copy(p, mapMagic)
	binary.LittleEndian.PutUint64(p[8:], uint64(size))
	binary.LittleEndian.PutUint32(p[16:], uint32(chunk))
	binary.LittleEndian.PutUint32(p[20:], flags)
	binary.LittleEndian.PutUint32(p[24:], crc32.Checksum(p[mapHeader:], castagnoli))
	binary.LittleEndian.PutUint32(p[28:], crc32.Checksum(p[:28], castagnoli))
	return p
}

var errBadMap = errors.New("bad presence map")

// decodeMap adds the chunks of an encoded map to present.
func decodeMap(p []byte, size, chunk int64, present bitset) (flags uint32, err error) {
	switch {
	case len(p) != mapHeader+8*len(present):
		return 0, fmt.Errorf("%w: %d bytes, want %d", errBadMap, len(p), mapHeader+8*len(present))
	case string(p[:8]) != mapMagic:
		return 0, fmt.Errorf("%w: magic", errBadMap)
	case binary.LittleEndian.Uint32(p[28:]) != crc32.Checksum(p[:28], castagnoli),
		binary.LittleEndian.Uint32(p[24:]) != crc32.Checksum(p[mapHeader:], castagnoli):
		return 0, fmt.Errorf("%w: checksum", errBadMap)
	case binary.LittleEndian.Uint64(p[8:]) != uint64(size), binary.LittleEndian.Uint32(p[16:]) != uint32(chunk):
		return 0, fmt.Errorf("%w: made for another blob or chunk size", errBadMap)
	}
	chunks := (size + chunk - 1) / chunk
	for i := range present {
		w := binary.LittleEndian.Uint64(p[mapHeader+8*i:])
		if rest := chunks - int64(i)*64; rest < 64 {
			w &= 1<<rest - 1
		}
		present[i].Or(w)
	}
	return binary.LittleEndian.Uint32(p[20:]), nil
}

// loadMap adds what the map file says to present. A missing or bad file adds
// nothing.
func loadMap(path string, size, chunk int64, present bitset) (flags uint32, err error) {
	fi, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	if fi.Size() > mapHeader+maxMapPayload {
		return 0, fmt.Errorf("%w: %d bytes", errBadMap, fi.Size())
	}
	p, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return decodeMap(p, size, chunk, present)
}

// replaceFile writes a file so that a crash leaves the old or the new content.
func replaceFile(path string, p []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
