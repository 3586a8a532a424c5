package tracefmt

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An Access is a file, or a part of one, that a workload used, as other tools
// record it.
type Access struct {
	Path string        // absolute and clean, in the image; in a list of paths it may be a pattern (see path.Match) or a directory
	Off  int64         // bytes, in the file
	Len  int64         // bytes; 0 is up to the end
	At   time.Duration // since the start; 0 also if it is not known: the order counts
}

// Names of the formats that ReadAccesses knows.
const (
	AccessPaths   = "paths"   // absolute paths, one a line
	AccessEStargz = "estargz" // what eStargz's optimizer records, JSON lines
	AccessNydus   = "nydus"   // what Nydus's optimizer records, CSV
)

// Limits of a list of accesses.
const (
	maxAccesses   = 1 << 18
	maxAccessLine = 64 << 10 // bytes
	maxAccessFile = 64 << 20 // bytes of the file
)

// ReadAccesses reads what a workload has accessed, in order, and tells in which
// format that is: one of
//
//   - a list of absolute paths, one a line, as overlaybd takes it in the place
//     of a trace. Empty lines and those that begin with # are skipped.
//   - the record of eStargz's optimizer (ctr-remote image optimize
//     --record-out): a JSON object a line, of which path counts. Its paths are
//     relative to the root.
//   - the record of Nydus's optimizer (its .csv file): columns path, size and
//     elapsed, the latter in microseconds, or in the optimizer's readable form
//     with a unit. Its reads are of whole files.
//
// The first line tells which. Whether a path has a pattern, and whether it
// exists, is up to the caller. A line that is not of the format is an error
// with its number. Lines are at most 64 KiB, paths 4 KiB, accesses 262144 with
// 16 MiB of paths, the file 64 MiB.
func ReadAccesses(r io.Reader) ([]Access, string, error) {
	in := &io.LimitedReader{R: r, N: maxAccessFile + 1}
	list := accessList{lines: bufio.NewScanner(in)}
	list.lines.Buffer(nil, maxAccessLine)
	err := list.read()
	switch {
	case in.N <= 0:
		err = fmt.Errorf("more than %d bytes", maxAccessFile)
	case errors.Is(err, bufio.ErrTooLong):
		err = fmt.Errorf("line %d is longer than %d bytes", list.line+1, maxAccessLine)
	case err != nil && list.line > 0:
		err = fmt.Errorf("line %d: %w", list.line, err)
	}
	if err != nil {
		return nil, "", fmt.Errorf("read accesses: %w", err)
	}
	return list.all, list.format, nil
}

// An accessList is one that is being read, line by line.
type accessList struct {
	lines  *bufio.Scanner
	line   int // number of the last, from 1
	format string
	parse  func(line []byte) (Access, error)
	all    []Access
	bytes  int // of paths
}

func (l *accessList) read() error {
	for l.lines.Scan() {
		l.line++
		line := bytes.TrimSuffix(l.lines.Bytes(), []byte("\r"))
		if l.line == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		if len(bytes.TrimSpace(line)) == 0 || line[0] == '#' && (l.format == "" || l.format == AccessPaths) {
			continue
		}
		if l.format == "" && l.recognise(line) {
			continue
		}
		a, err := l.parse(line)
		if err == nil {
			err = l.add(a)
		}
		if err != nil {
			return err
		}
	}
	if err := l.lines.Err(); err != nil {
		return err
	}
	if l.format == "" {
		l.line = 0
		return errors.New("it lists nothing")
	}
	return nil
}

// recognise takes the first line that says something, and tells whether it is
// a heading.
func (l *accessList) recognise(line []byte) bool {
	switch {
	case line[0] == '{':
		l.format, l.parse = AccessEStargz, parseEStargz
	case line[0] == '/':
		l.format, l.parse = AccessPaths, parsePath
	default:
		names := strings.Split(string(line), ",")
		p, at := slices.Index(names, "path"), slices.Index(names, "elapsed")
		if p < 0 || at < 0 {
			l.parse = func([]byte) (Access, error) {
				return Access{}, fmt.Errorf("%.32q: neither an absolute path, nor a JSON object, nor the columns path and elapsed", line)
			}
			return false
		}
		l.format = AccessNydus
		l.parse = func(line []byte) (Access, error) { return parseNydus(line, len(names), p, at) }
		return true
	}
	return false
}

func (l *accessList) add(a Access) error {
	switch {
	case a.Path == "":
		return errors.New("no path")
	case len(a.Path) > maxString:
		return fmt.Errorf("path of %d bytes: at most %d", len(a.Path), maxString)
	case strings.IndexByte(a.Path, 0) >= 0:
		return fmt.Errorf("path %.64q has a zero byte", a.Path)
	case len(l.all) == maxAccesses:
		return fmt.Errorf("more than %d accesses", maxAccesses)
	case l.bytes+len(a.Path) > maxTable:
		return fmt.Errorf("more than %d bytes of paths", maxTable)
	}
	a.Path = path.Clean("/" + a.Path)
	l.bytes += len(a.Path)
	l.all = append(l.all, a)
	return nil
}

func parsePath(line []byte) (Access, error) {
	if line[0] != '/' {
		return Access{}, fmt.Errorf("%.64q is not an absolute path", line)
	}
	return Access{Path: string(line)}, nil
}

// parseEStargz parses an entry; it has manifestDigest and layerIndex too, which
// are those of the image that was recorded.
func parseEStargz(line []byte) (Access, error) {
	var e struct {
		Path string `json:"path"`
	}
	if err := json.Unmarshal(line, &e); err != nil {
		return Access{}, err
	}
	return Access{Path: e.Path}, nil
}

func parseNydus(line []byte, columns, pathColumn, atColumn int) (Access, error) {
	r := csv.NewReader(bytes.NewReader(line))
	r.FieldsPerRecord = columns
	row, err := r.Read()
	if err != nil {
		return Access{}, err
	}
	at, err := parseElapsed(row[atColumn])
	if err != nil {
		return Access{}, fmt.Errorf("elapsed %.32q: %w", row[atColumn], err)
	}
	return Access{Path: row[pathColumn], At: at}, nil
}

// parseElapsed parses microseconds, or a number with a unit: "7 us", "1.250
// ms", "3.000 s".
func parseElapsed(s string) (time.Duration, error) {
	number, unit, _ := strings.Cut(strings.TrimSpace(s), " ")
	scale, known := map[string]float64{"": 1, "us": 1, "ms": 1e3, "s": 1e6}[unit]
	if !known {
		return 0, errors.New("unknown unit")
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, err
	}
	if v *= scale; !(v >= 0 && v <= maxMicros/2) {
		return 0, errors.New("out of range")
	}
	return time.Duration(v) * time.Microsecond, nil
}
