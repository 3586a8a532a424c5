package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// message is what a notification says that a keeper acts upon.
type message struct {
	barrier  bool // alone in its message
	store    bool
	remove   bool
	name     string // of the descriptors; "" if none was given, or no valid one
	ready    bool
	stopping bool
	watchdog string // "1", "trigger"
	status   string
	exec     string
}

// parseMessage reads the text of a notification: lines of NAME=VALUE, of which
// the first of a name counts. Assignments that are not known are ignored.
func parseMessage(text []byte) (message, error) {
	var m message
	if len(text) > maxMessage {
		return m, fmt.Errorf("notification of more than %d bytes", maxMessage)
	}
	if bytes.IndexByte(text, 0) >= 0 {
		return m, errors.New("notification with a zero byte")
	}
	var barrier bool
	lines := 0
	seen := make(map[string]bool)
	for line := range strings.SplitSeq(string(text), "\n") {
		key, value, ok := strings.Cut(line, "=")
		if line == "" {
			continue
		}
		lines++
		if !ok || seen[key] {
			continue
		}
		seen[key] = true
		barrier = m.assign(key, value) || barrier
	}
	if barrier && lines > 1 {
		return message{}, errors.New("BARRIER=1 beside something else")
	}
	m.barrier = barrier
	return m, nil
}

// assign takes in one assignment and tells whether it is a barrier.
func (m *message) assign(key, value string) bool {
	switch key {
	case "BARRIER":
		return value == "1"
	case "FDSTORE":
		m.store = value == "1"
	case "FDSTOREREMOVE":
		m.remove = value == "1"
	case "FDNAME":
		if checkName(value) == nil {
			m.name = value
		}
	case "READY":
		m.ready = value == "1"
	case "STOPPING":
		m.stopping = value == "1"
	case "WATCHDOG":
		m.watchdog = value
	case "STATUS":
		m.status = value
	case strings.TrimSuffix(assignmentExec, "="):
		m.exec = value
	}
	return false
}

// checkName says what is wrong with a descriptor's name.
func checkName(name string) error {
	if len(name) > maxName {
		return fmt.Errorf("descriptor name of %d bytes: more than %d", len(name), maxName)
	}
	for i := range len(name) {
		if c := name[i]; c < ' ' || c >= 127 || c == ':' {
			return fmt.Errorf("descriptor name %q: byte %#x is not allowed", name, c)
		}
	}
	return nil
}

// storeMessage asks for descriptors to be kept.
func storeMessage(name string) string {
	return "FDSTORE=1\nFDNAME=" + name + "\nFDPOLL=0"
}

func removeMessage(name string) string {
	return "FDSTOREREMOVE=1\nFDNAME=" + name
}

// oneLine is text as the value of an assignment.
func oneLine(text string) string {
	return strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r == 0 || r == '\n' || r == '\r' {
			return ' '
		}
		return r
	}, text), "?")
}
