package container

import (
	"bytes"
	"os"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxLine is how much of one line of output a regular expression sees, in bytes.
const maxLine = 64 << 10

// logWatch looks for a line in a stream that passes by.
type logWatch struct {
	mu      sync.Mutex // guards what follows
	want    *regexp.Regexp
	found   func(time.Time)
	partial []byte // the line so far, at most maxLine of it
}

// expect begins to look; found is called once, with the time of the first line
// that matches.
func (w *logWatch) expect(want *regexp.Regexp, found func(time.Time)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.want, w.found = want, found
}

// line takes the next bytes of the stream.
func (w *logWatch) line(p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.want != nil {
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			w.keep(p)
			return
		}
		w.keep(p[:i])
		w.match()
		p = p[i+1:]
	}
}

// end takes a last line that has no newline.
func (w *logWatch) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.want != nil && len(w.partial) > 0 {
		w.match()
	}
}

func (w *logWatch) keep(p []byte) {
	w.partial = append(w.partial, p[:min(len(p), maxLine-len(w.partial))]...)
}

func (w *logWatch) match() {
	if w.want.Match(bytes.TrimSuffix(w.partial, []byte("\r"))) {
		w.found(time.Now())
		w.want = nil
	}
	w.partial = w.partial[:0]
}

// tail keeps the last bytes written to it.
type tail struct {
	mu sync.Mutex // guards b
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p[max(0, len(p)-maxText):]...)
	if over := len(t.b) - maxText; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

// ownership undoes what runc does to a standard input that it hands on: it gives
// the file to the container's user.
type ownership struct {
	file     *os.File
	uid, gid uint32
}

func (o *ownership) save(f *os.File) {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil {
		*o = ownership{file: f, uid: st.Uid, gid: st.Gid}
	}
}

func (o *ownership) restore() {
	var st unix.Stat_t
	if o.file == nil || unix.Fstat(int(o.file.Fd()), &st) != nil {
		return
	}
	if st.Uid != o.uid || st.Gid != o.gid {
		_ = unix.Fchown(int(o.file.Fd()), int(o.uid), int(o.gid))
	}
}
