package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The program and its stage speak JSON, one message a packet, over a pair of
// connected sockets. Descriptors travel beside a message. What may be long, the
// Config, travels as a memory file.

const (
	maxMessage = 64 << 10 // bytes of one packet
	maxConfig  = 16 << 20 // bytes of the Config
	maxText    = 8 << 10  // bytes of an error's text
)

// Operations that the program asks for.
const (
	opStart = "start" // descriptors: Config, then those of mountRoot
	opExec  = "exec"
)

// Events that the stage reports.
const (
	evReady   = "ready"
	evMounted = "mounted"
	evRunc    = "runc"
	evStarted = "started" // descriptor: pidfd of the container's first process
	evFailed  = "failed"
	evExited  = "exited"
	evExec    = "exec"
)

// request is a message to the stage.
type request struct {
	Op   string   `json:"op"`
	ID   int      `json:"id,omitempty"`
	Args []string `json:"args,omitempty"`
}

// report is a message from the stage.
type report struct {
	Event  string `json:"event"`
	At     int64  `json:"at"` // CLOCK_MONOTONIC, ns
	ID     int    `json:"id,omitempty"`
	Pid    int    `json:"pid,omitempty"`
	Status int    `json:"status,omitempty"`
	Text   string `json:"text,omitempty"`
}

// monotonic is the clock that both processes share.
func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
	return ts.Nano()
}

// moment turns a reading of monotonic into a time.
func moment(ns int64) time.Time {
	return time.Now().Add(time.Duration(ns - monotonic()))
}

// send writes one message and its descriptors, which stay open here.
func send(conn *net.UnixConn, msg any, files ...*os.File) error {
	b, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("message of %d bytes is over the limit of %d", len(b), maxMessage)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one message and its descriptors; io.EOF once the peer is gone.
func receive(conn *net.UnixConn, buf []byte, msg any) ([]*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) {
			err = io.EOF
		}
		return nil, err
	}
	files, err := rights(oob[:oobn])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = io.ErrShortBuffer
	}
	if err == nil {
		err = json.Unmarshal(buf[:n], msg)
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

// rights takes the descriptors out of a control message.
func rights(oob []byte) ([]*os.File, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// memFile is a file in memory that holds b.
func memFile(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memory file: %w", err)
	}
	return f, nil
}

// clip bounds a text that goes into a message.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "…"
	}
	return s
}
