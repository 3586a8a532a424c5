package convert

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// Fields of ext4 on disk that are used here, as offsets.
// https://docs.kernel.org/filesystems/ext4/globals.html
const (
	superblockAt   = 1024
	superblockSize = 1024
	ext4Magic      = 0xEF53

	sBlocksCount    = 0x04
	sFirstDataBlock = 0x14
	sLogBlockSize   = 0x18
	sBlocksPerGroup = 0x20
	sInodesPerGroup = 0x28
	sMtime          = 0x2C
	sWtime          = 0x30
	sMountCount     = 0x34 // u16
	sMagic          = 0x38 // u16
	sInodeSize      = 0x58 // u16
	sIncompat       = 0x60
	sROCompat       = 0x64
	sLastMounted    = 0x88 // 64 bytes
	sKbytesWritten  = 0x178
	sWtimeHi        = 0x274
	sMtimeHi        = 0x275

	incompatMetaBG    = 0x10
	incompat64bit     = 0x80
	roMetadataCsum    = 0x400
	bgInodeTable      = 0x08
	bgFlags           = 0x12 // u16
	bgInodeUninit     = 1
	groupDescSize     = 32
	firstOrdinaryIno  = 11
	rootIno           = 2
	iCtime            = 0x0C
	iMtime            = 0x10
	iLinks            = 0x1A // u16
	iFlags            = 0x20
	iVersion          = 0x24
	iBlock            = 0x28
	iBlockSize        = 60
	iGeneration       = 0x64
	iExtraSize        = 0x80 // u16
	iCtimeExtra       = 0x84
	iMtimeExtra       = 0x88
	iCrtime           = 0x90
	iCrtimeExtra      = 0x94
	iVersionHi        = 0x98
	extraSizeNeeded   = 0x9C - 0x80
	ext4InodeSize     = 256
	maxNormalizeChunk = 1 << 20

	flagExtents    = 0x80000
	extentMagic    = 0xF30A
	extentSlot     = 12 // bytes of the node's header and of each entry
	maxExtentDepth = 5
)

// normalize replaces, in what the topmost layer of s wrote of an unmounted
// ext4, all that comes from the clock, the random generator or the history of
// the mount and not from the image: the same input gives the same bytes.
//
//   - superblock: times and number of mounts, amount written
//   - extent tree: what is left in slots that are not used any more
//   - inode: change time := modification time, creation time and generation 0,
//     version 0; an inode that was freed is wiped
//
// With metadata_csum, which covers these fields and which mkfs here leaves
// out, it does nothing.
func normalize(s *stack) error {
	sb := make([]byte, superblockSize)
	if _, err := s.ReadAt(sb, superblockAt); err != nil {
		return err
	}
	g, err := parseGeometry(sb)
	if err != nil || g == nil {
		return err
	}
	cleanSuperblock(sb)
	if _, err := s.WriteAt(sb, superblockAt); err != nil {
		return err
	}
	table := make([]byte, g.groups*groupDescSize)
	if err := s.readSectors(table, g.descriptors); err != nil {
		return err
	}
	for i := range g.groups {
		d := table[i*groupDescSize:][:groupDescSize]
		if binary.LittleEndian.Uint16(d[bgFlags:])&bgInodeUninit != 0 {
			continue
		}
		at := int64(binary.LittleEndian.Uint32(d[bgInodeTable:])) * g.blockSize
		if err := normalizeTable(s, g, at, uint32(i)*g.inodesPerGroup+1); err != nil {
			return fmt.Errorf("group %d: %w", i, err)
		}
	}
	return nil
}

type geometry struct {
	blockSize      int64
	groups         int
	inodesPerGroup uint32
	descriptors    int64 // device offset of the group descriptors
}

// parseGeometry returns nil for a file system that is to be left as it is.
func parseGeometry(sb []byte) (*geometry, error) {
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(sb[at:]) }
	if binary.LittleEndian.Uint16(sb[sMagic:]) != ext4Magic {
		return nil, errors.New("no ext4 superblock")
	}
	if u32(sROCompat)&roMetadataCsum != 0 || u32(sIncompat)&(incompat64bit|incompatMetaBG) != 0 ||
		binary.LittleEndian.Uint16(sb[sInodeSize:]) != ext4InodeSize {
		return nil, nil
	}
	perGroup, blocks := u32(sBlocksPerGroup), u32(sBlocksCount)
	if u32(sLogBlockSize) != 2 || perGroup != 8*4096 || u32(sInodesPerGroup) > 8*4096 || u32(sFirstDataBlock) > blocks {
		return nil, errors.New("ext4 superblock: impossible geometry")
	}
	return &geometry{
		blockSize:      4096,
		groups:         int((int64(blocks) - int64(u32(sFirstDataBlock)) + int64(perGroup) - 1) / int64(perGroup)),
		inodesPerGroup: u32(sInodesPerGroup),
		descriptors:    (int64(u32(sFirstDataBlock)) + 1) * 4096,
	}, nil
}

// readSectors reads any length at a sector's offset.
func (s *stack) readSectors(p []byte, off int64) error {
	n := (len(p) + lsmt.SectorSize - 1) / lsmt.SectorSize * lsmt.SectorSize
	buf := make([]byte, n)
	_, err := s.ReadAt(buf, off)
	copy(p, buf)
	return err
}

func cleanSuperblock(sb []byte) {
	clear(sb[sMtime:][:4])
	clear(sb[sWtime:][:4])
	clear(sb[sMountCount:][:2])
	clear(sb[sLastMounted:][:64])
	clear(sb[sKbytesWritten:][:8])
	sb[sWtimeHi], sb[sMtimeHi] = 0, 0
}

// normalizeTable goes through what the topmost layer has of the inode table at
// off, whose first inode is number ino.
func normalizeTable(s *stack, g *geometry, off int64, ino uint32) error {
	n := int64(g.inodesPerGroup) * ext4InodeSize
	buf := make([]byte, min(n, maxNormalizeChunk))
	for _, seg := range s.top().Lookup(nil, off, n) {
		if seg.Kind != lsmt.Data {
			continue
		}
		for at := seg.Off; at < seg.End(); {
			p := buf[:min(seg.End()-at, int64(len(buf)))]
			if _, err := s.ReadAt(p, at); err != nil {
				return err
			}
			for i := 0; i < len(p); i += ext4InodeSize {
				inode := p[i:][:ext4InodeSize]
				cleanInode(inode, ino+uint32((at-off+int64(i))/ext4InodeSize))
				if binary.LittleEndian.Uint32(inode[iFlags:])&flagExtents == 0 {
					continue
				}
				if err := cleanExtents(s, inode[iBlock:][:iBlockSize], maxExtentDepth); err != nil {
					return err
				}
			}
			if _, err := s.WriteAt(p, at); err != nil {
				return err
			}
			at += int64(len(p))
		}
	}
	return nil
}

func cleanInode(p []byte, ino uint32) {
	if ino < firstOrdinaryIno && ino != rootIno || binary.LittleEndian.Uint16(p[iExtraSize:]) < extraSizeNeeded {
		return
	}
	if binary.LittleEndian.Uint16(p[iLinks:]) == 0 {
		clear(p)
		return
	}
	copy(p[iCtime:][:4], p[iMtime:][:4])
	copy(p[iCtimeExtra:][:4], p[iMtimeExtra:][:4])
	for _, at := range []int{iVersion, iGeneration, iCrtime, iCrtimeExtra, iVersionHi} {
		clear(p[at:][:4])
	}
}

// cleanExtents wipes the unused slots of a node of an extent tree and of all
// nodes below it. How far a file had been written back when its extents were
// split and merged shows there.
func cleanExtents(s *stack, node []byte, depth int) error {
	u16 := func(at int) int { return int(binary.LittleEndian.Uint16(node[at:])) }
	entries, below := u16(2), u16(6)
	end := extentSlot * (1 + entries)
	if u16(0) != extentMagic || below > depth || end > len(node) {
		return nil // not a tree: a device number, or nothing
	}
	clear(node[end:max(end, min(len(node), extentSlot*(1+u16(4))))])
	if below == 0 {
		return nil
	}
	for e := node[extentSlot:end]; len(e) > 0; e = e[extentSlot:] {
		block := int64(binary.LittleEndian.Uint32(e[4:])) | int64(binary.LittleEndian.Uint16(e[8:]))<<32
		if err := cleanNode(s, block*4096, below-1); err != nil {
			return err
		}
	}
	return nil
}

// cleanNode is cleanExtents for a block that the topmost layer has.
func cleanNode(s *stack, off int64, depth int) error {
	top := s.top()
	if off+4096 > top.VirtualSize() {
		return fmt.Errorf("extent tree: block at %d is beyond the device", off)
	}
	if seg := top.Lookup(nil, off, 4096); seg[0].Kind != lsmt.Data || seg[0].Len < 4096 {
		return nil
	}
	p := make([]byte, 4096)
	if _, err := s.ReadAt(p, off); err != nil {
		return err
	}
	if err := cleanExtents(s, p, depth); err != nil {
		return err
	}
	_, err := s.WriteAt(p, off)
	return err
}
