package compare

import (
	"fmt"
)

// notAFile stands for what belongs to no file.
const notAFile = "(no file: the file system's own blocks, or not known)"

// traceTables are the tables of a page, by what they break down by.
var traceTables = map[string]struct {
	title, name, about, unnamed string
	files                       bool // whether they count files
}{
	ByFile:    {"Files", "file", "What was read of each file. The size of a file is not in a trace: only what was read of it.", notAFile, false},
	ByDir:     {"Directories", "directory", "The same, for the files of each directory, without those of directories in it.", notAFile, true},
	ByProcess: {"Processes", "process", "Who read. Bytes that several read count for the first.", "(not known: the kernel's own reads, or nobody was watching)", true},
	ByLayer:   {"Layers", "layer", "What was read of each layer of the image, from the bottom up.", "", true},
}

func (b *traceView) table(by string) (*pageTable, error) {
	d, err := breakDown(b.t, b.first, BreakdownOptions{By: by})
	if err != nil {
		return nil, err
	}
	words := traceTables[by]
	t := &pageTable{ID: by, Title: words.title, About: words.about, Missing: d.Missing}
	if d.Missing != "" && by != ByLayer {
		return t, nil
	}
	columns := d.columns(words.name, words.unnamed, words.files)
	for _, c := range columns {
		t.Columns = append(t.Columns, c.pageColumn)
	}
	rows := d.Rows
	if len(rows) > maxPageRows {
		rows = rows[:maxPageRows]
		rest := d.rest(maxPageRows)
		t.More = fmt.Sprintf("And %d more, of which %s were read: 'reprise trace show --by %s FILE' has all of them.", len(d.Rows)-maxPageRows, pageSize(rest), by)
	}
	for i := range rows {
		cells := make([]pageCell, len(columns))
		for k, c := range columns {
			cells[k] = c.cell(&rows[i])
		}
		t.Rows = append(t.Rows, cells)
	}
	return t, nil
}

// rest is the bytes of the rows from the n-th on.
func (d *Breakdown) rest(n int) (sum int64) {
	for i := range d.Rows[min(n, len(d.Rows)):] {
		sum = satAdd(sum, d.Rows[n+i].Bytes)
	}
	return sum
}

// A shareColumn shows one field of a share.
type shareColumn struct {
	pageColumn
	cell func(*Share) pageCell
}

// columns are those that the trace knows something for.
func (d *Breakdown) columns(name, unnamed string, files bool) []shareColumn {
	columns := []shareColumn{
		{pageColumn{Name: name, Kind: pageText}, func(s *Share) pageCell { return pageCell{Text: s.label(unnamed)} }},
		{pageColumn{"bytes", "read at least once", pageShare}, func(s *Share) pageCell { return pageCell{pageSize(s.Bytes), float64(s.Bytes)} }},
	}
	if d.By == ByLayer && d.Missing == "" {
		columns[0].Name = "layer, and digest of its blob"
		columns = append(columns, shareColumn{pageColumn{"of", "the layer's bytes, uncompressed", pageNumber}, func(s *Share) pageCell {
			if s.Of == 0 {
				return pageCell{Text: "?"}
			}
			return pageCell{pageSize(s.Of), float64(s.Of)}
		}})
	}
	if files {
		columns = append(columns, shareColumn{pageColumn{"files", "that were read", pageNumber}, func(s *Share) pageCell { return pageNumberCell(s.Files) }})
	}
	columns = append(columns,
		shareColumn{pageColumn{"pieces", "parts without a gap between them", pageNumber}, func(s *Share) pageCell { return pageNumberCell(s.Extents) }},
		shareColumn{pageColumn{"reads", "", pageNumber}, func(s *Share) pageCell { return pageNumberCell(s.Reads) }})
	if d.Timed {
		columns = append(columns,
			shareColumn{pageColumn{"first read", "since the recording began", pageNumber}, func(s *Share) pageCell { return pageCell{pageTime(s.First), s.First.Seconds()} }},
			shareColumn{pageColumn{"last read", "since the recording began", pageNumber}, func(s *Share) pageCell { return pageCell{pageTime(s.Last), s.Last.Seconds()} }},
			shareColumn{pageColumn{"waited", "all its reads together", pageNumber}, func(s *Share) pageCell { return pageCell{pageTime(s.Wait), s.Wait.Seconds()} }})
	}
	if d.Runs > 1 {
		columns = append(columns, shareColumn{pageColumn{"in runs", "share of the merged recordings that read it", pageNumber}, func(s *Share) pageCell {
			return pageCell{fmt.Sprintf("%.0f %%", 100*s.Seen), s.Seen}
		}})
	}
	return columns
}

func pageNumberCell(n int) pageCell { return pageCell{fmt.Sprint(n), float64(n)} }

// label is the name of a row for a reader.
func (s *Share) label(unnamed string) string {
	name := pageName(s.Name, maxPageName)
	if name == "" {
		name = unnamed
	}
	if s.Pid != 0 {
		name += fmt.Sprintf(" (process %d)", s.Pid)
	}
	if s.Container != "" {
		name += " in " + pageName(s.Container, maxPageName)
	}
	if s.Digest != "" {
		name += " " + Printable(string(s.Digest))
	}
	return name
}
