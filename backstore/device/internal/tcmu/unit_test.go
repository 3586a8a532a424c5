package tcmu

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

func testUnitServer(m *memory) *request.Server { return request.New(m, m.config()) }

// ask is inquire without a session.
func ask(t *testing.T, u *unit, cdb ...byte) []byte {
	t.Helper()
	var p [replySize]byte
	var c [16]byte
	copy(c[:], cdb)
	n, bad := u.inquire(&p, &c)
	require.Zero(t, bad)
	return p[:n]
}

func TestNames(t *testing.T) {
	require.Len(t, vendor, 8)
	require.Len(t, product, 16)
	require.Len(t, revision, 4)
	u := testUnit(testUnitServer(&memory{data: make([]byte, 1<<20)}), 512)
	require.Equal(t, []byte{0, 0, 0, 6, 0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2}, ask(t, u, opInquiry, 1, 0))
	require.Equal(t, "\x00\x80\x00\x0creprise-test", string(ask(t, u, opInquiry, 1, 0x80)))
	names := ask(t, u, opInquiry, 1, 0x83)
	require.Equal(t, u.target.naa(), names[8:16])
	require.Equal(t, byte(0x30), names[8]&0xf0, "locally assigned")
	require.Equal(t, "\x02\x01\x00\x14REPRISE reprise-test", string(names[16:]))
	require.Equal(t, len(names)-4, int(binary.BigEndian.Uint16(names[2:])))
}

func TestCapacity(t *testing.T) {
	for _, tt := range []struct {
		size     int64
		sector   int
		short    uint32
		last     uint64
		readOnly bool
	}{
		{512, 512, 0, 0, false},
		{1 << 30, 4096, 1<<18 - 1, 1<<18 - 1, false},
		{2 << 40, 512, 0xffffffff, 1<<32 - 1, false},
		{64 << 40, 512, 0xffffffff, 1<<37 - 1, false},
		{64 << 40, 4096, 0xffffffff, 1<<34 - 1, true},
	} {
		srv := request.New(&memory{}, request.Config{Size: tt.size, CanDiscard: true, ReadOnly: tt.readOnly})
		u := testUnit(srv, tt.sector)
		p := ask(t, u, opReadCapacity)
		require.Equal(t, tt.short, binary.BigEndian.Uint32(p))
		require.EqualValues(t, tt.sector, binary.BigEndian.Uint32(p[4:]))
		p = ask(t, u, opServiceIn16, serviceReadCapacity)
		require.Len(t, p, 32)
		require.Equal(t, tt.last, binary.BigEndian.Uint64(p))
		require.EqualValues(t, tt.sector, binary.BigEndian.Uint32(p[8:]))
		require.Equal(t, !tt.readOnly, p[14] == 0xc0, "thin, reads zeros")
	}
}

// TestAbilities shows what the disk says of itself for each kind of backend.
func TestAbilities(t *testing.T) {
	for name, tt := range map[string]struct {
		c           request.Config
		cache       byte // of the caching page
		flags       byte // of the mode header
		unmap, thin byte
	}{
		"plain":     {c: request.Config{}},
		"sync":      {c: request.Config{CanSync: true}, cache: 4, flags: 0x10},
		"discard":   {c: request.Config{CanDiscard: true}, unmap: 0xe4, thin: 2},
		"read-only": {c: request.Config{CanDiscard: true, CanSync: true, ReadOnly: true}, flags: 0x80},
	} {
		t.Run(name, func(t *testing.T) {
			tt.c.Size = 1 << 20
			u := testUnit(request.New(&memory{}, tt.c), 4096)
			p := ask(t, u, opModeSense6, 8, 0x08, 0, 255)
			require.Equal(t, []byte{23, 0, tt.flags, 0, 0x08, 18, tt.cache}, p[:7])
			require.Len(t, p, 24)
			p = ask(t, u, opModeSense10, 8, 0x3f, 0xff, 0, 0, 0, 0, 255)
			require.Equal(t, []byte{0, 38, 0, tt.flags, 0, 0, 0, 0, 0x08, 18, tt.cache}, p[:11])
			require.Equal(t, []byte{0x0a, 10}, p[28:30])
			p = ask(t, u, opModeSense6, 8, 0x48, 0, 255) // changeable: nothing
			require.Equal(t, append([]byte{23, 0, tt.flags, 0, 0x08, 18}, make([]byte, 18)...), p)
			p = ask(t, u, opInquiry, 1, 0xb2)
			require.Equal(t, []byte{0, 0xb2, 0, 4, 0, tt.unmap, tt.thin, 0}, p)
			p = ask(t, u, opInquiry, 1, 0xb0)
			require.Len(t, p, 64)
			require.EqualValues(t, maxTransfer/4096, binary.BigEndian.Uint32(p[8:]))
			require.Equal(t, tt.unmap != 0, binary.BigEndian.Uint32(p[20:]) == maxBlocks)
			p = ask(t, u, opMaintenanceIn, serviceOpcodes, 1, opUnmap)
			require.Equal(t, tt.unmap != 0, p[1] == 3)
			p = ask(t, u, opMaintenanceIn, serviceOpcodes, 1, opRead16)
			require.Equal(t, []byte{0, 3, 0, 16, opRead16}, p[:5])
			require.Len(t, p, 20)
		})
	}
}

func TestModeSelect(t *testing.T) {
	disk := &memory{data: make([]byte, 1<<20)}
	k, _ := start(t, disk, disk.config(), 1)
	page := append([]byte{0x08, 18, 4}, make([]byte, 17)...)
	other := bytes.Clone(page)
	other[2] = 0
	for name, tt := range map[string]struct {
		op   byte
		list []byte
		want sense
	}{
		"nothing":           {opModeSelect6, nil, sense{}},
		"as it is":          {opModeSelect6, append(make([]byte, 4), page...), sense{}},
		"as it is, 10":      {opModeSelect10, append(make([]byte, 8), page...), sense{}},
		"no cache":          {opModeSelect6, append(make([]byte, 4), other...), senseParameter},
		"cut":               {opModeSelect6, append(make([]byte, 4), page[:19]...), senseLength},
		"cut header":        {opModeSelect10, make([]byte, 4), senseLength},
		"unknown page":      {opModeSelect6, []byte{0, 0, 0, 0, 1, 0}, senseParameter},
		"block descriptors": {opModeSelect6, []byte{0, 0, 0, 8, 1, 0}, senseLength},
	} {
		t.Run(name, func(t *testing.T) {
			r := await(t, k.submit([]byte{tt.op, 0x10}, tt.list, len(tt.list), 1))
			require.Equal(t, tt.want, r.sense)
		})
	}
}
