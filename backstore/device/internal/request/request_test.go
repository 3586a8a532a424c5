package request

import (
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fake is a backend whose calls return err, after gate if that is set.
type fake struct {
	err   error
	short bool
	gate  chan struct{}
}

func (f *fake) call() error {
	if f.gate != nil {
		<-f.gate
	}
	return f.err
}

func (f *fake) ReadAt(p []byte, _ int64) (int, error) {
	err := f.call()
	if f.short {
		return len(p) / 2, err
	}
	if err != nil {
		return 0, err
	}
	return len(p), io.EOF
}

func (f *fake) WriteAt(p []byte, _ int64) (int, error) { return len(p), f.call() }
func (f *fake) Discard(int64, int64) error             { return f.call() }
func (f *fake) Sync() error                            { return f.call() }

func TestErrno(t *testing.T) {
	boom := errors.New("boom")
	p := make([]byte, 4096)
	read := func(off int64) func(*Worker) unix.Errno {
		return func(w *Worker) unix.Errno { return w.Read(p, off) }
	}
	write := func(w *Worker) unix.Errno { return w.Write(p, 0) }
	discard := func(off, n int64) func(*Worker) unix.Errno {
		return func(w *Worker) unix.Errno { return w.Discard(off, n) }
	}
	for name, tt := range map[string]struct {
		b        fake
		readOnly bool
		do       func(*Worker) unix.Errno
		want     unix.Errno
		reported string
	}{
		"read":                 {do: read(0)},
		"read the end":         {do: read(4096)},
		"read past the end":    {do: read(4097), want: unix.EINVAL},
		"read before":          {do: read(-1), want: unix.EINVAL},
		"read far past":        {do: read(1<<63 - 1), want: unix.EINVAL},
		"read fails":           {b: fake{err: boom}, do: read(4096), want: unix.EIO, reported: "read 4096 bytes at 4096: boom"},
		"read short":           {b: fake{short: true}, do: read(0), want: unix.EIO, reported: "read 4096 bytes at 0: unexpected EOF"},
		"write":                {do: write},
		"write read-only":      {readOnly: true, do: write, want: unix.EROFS},
		"write fails":          {b: fake{err: boom}, do: write, want: unix.EIO, reported: "write 4096 bytes at 0: boom"},
		"write, disk full":     {b: fake{err: unix.ENOSPC}, do: write, want: unix.ENOSPC, reported: "write 4096 bytes at 0: no space left on device"},
		"discard":              {do: discard(0, 8192)},
		"discard too much":     {do: discard(4096, 8192), want: unix.EINVAL},
		"discard overflow":     {do: discard(4096, 1<<63-1), want: unix.EINVAL},
		"discard read-only":    {readOnly: true, do: discard(0, 1), want: unix.EROFS},
		"discard, cannot":      {b: fake{err: errors.ErrUnsupported}, do: discard(0, 1), want: unix.ENOSYS},
		"sync":                 {do: (*Worker).Sync},
		"sync read-only":       {readOnly: true, do: (*Worker).Sync},
		"sync fails":           {b: fake{err: boom}, do: (*Worker).Sync, want: unix.EIO, reported: "sync: boom"},
		"sync, needs not":      {b: fake{err: errors.ErrUnsupported}, do: (*Worker).Sync, want: unix.ENOSYS},
		"sync after an outage": {b: fake{err: unix.EIO}, do: (*Worker).Sync, want: unix.EIO, reported: "sync: input/output error"},
	} {
		t.Run(name, func(t *testing.T) {
			var reported error
			s := New(&tt.b, Config{Size: 8192, ReadOnly: tt.readOnly, OnError: func(e *Error) { reported = e }})
			defer s.Stop()
			w := s.Worker()
			defer w.Release()
			require.Equal(t, tt.want, tt.do(w))
			if tt.reported == "" {
				require.NoError(t, reported)
			} else {
				require.EqualError(t, reported, tt.reported)
				require.ErrorIs(t, reported, errors.Unwrap(reported))
			}
			s.Refuse()
			require.Equal(t, unix.EIO, tt.do(w))
		})
	}
}

func TestWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &fake{gate: make(chan struct{})}
		var seen []Slow
		s := New(b, Config{Size: 1 << 20, OnSlow: func(x Slow) { seen = append(seen, x) }, SlowAfter: 8 * time.Second})
		w, idle := s.Worker(), s.Worker()
		done := make(chan unix.Errno)
		go func() { done <- w.Read(make([]byte, 512), 4096) }()
		time.Sleep(33 * time.Second)
		synctest.Wait()
		want := []Slow{}
		for _, d := range []time.Duration{8, 16, 32} {
			want = append(want, Slow{Op: "read", Off: 4096, N: 512, For: d * time.Second})
		}
		require.Equal(t, want, seen)
		close(b.gate)
		require.Zero(t, <-done)
		time.Sleep(time.Minute)
		require.Len(t, seen, 3, "nothing is in the backend")
		w.Release()
		idle.Release()
		require.Empty(t, s.workers)
		s.Stop()
		s.Stop()
	})
}

func BenchmarkRead(b *testing.B) {
	s := New(&fake{}, Config{Size: 1 << 20, OnSlow: func(Slow) {}, SlowAfter: time.Minute})
	defer s.Stop()
	w := s.Worker()
	p := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		w.Read(p, 0)
	}
}
