package tracefmt

import (
	"bufio"
	"bytes"
	"flag"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// tableRows returns the cells of the rows of FORMAT.md below a heading.
func tableRows(t *testing.T, heading string) [][]string {
	t.Helper()
	f, err := os.Open("FORMAT.md")
	require.NoError(t, err)
	defer f.Close()
	var rows [][]string
	in := false
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if strings.HasPrefix(line, "## ") {
			in = strings.HasPrefix(line, "## "+heading)
		}
		if in && strings.HasPrefix(line, "| ") {
			rows = append(rows, strings.Split(strings.Trim(line, "|"), "|"))
		}
	}
	return rows
}

// names returns the first cells that are code.
func names(rows [][]string) []string {
	code := regexp.MustCompile("^ *` ?([A-Za-z_]+)` *$")
	var list []string
	for _, r := range rows {
		if m := code.FindStringSubmatch(r[0]); m != nil {
			list = append(list, m[1])
		}
	}
	return list
}

func TestFormatLimits(t *testing.T) {
	want := map[string]int{
		"Version": Version, "MaxEvents": MaxEvents, "MaxLayers": MaxLayers, "frameHead": frameHead,
		"maxFrame": maxFrame, "maxFrameEvents": maxFrameEvents, "maxFrames": maxFrames, "maxUnit": maxUnit, "maxFile": maxFile,
		"maxWindow": maxWindow, "maxString": maxString, "maxArgs": maxArgs, "maxArg": maxArg,
		"maxStrings": maxStrings, "maxTable": maxTable, "maxRuns": maxRuns, "maxPid": maxPid,
	}
	got := map[string]int{}
	for _, r := range tableRows(t, "Limits") {
		name := strings.Trim(r[0], " `")
		if v, err := strconv.Atoi(strings.TrimSpace(r[1])); err == nil {
			got[name] = v
		}
	}
	require.Equal(t, want, got)
}

func TestFormatKeys(t *testing.T) {
	require.Equal(t, []string{
		keyVersion, keyImage, keyManifest, keyPlatform, keyLayers, keyDigest, keySize, keyDecoded,
		keyWorkload, keyArgs, keyTool, keyStart, keyReadAhead, keySpace, keyRuns,
	}, names(tableRows(t, "Header")))
	require.Equal(t, append([]string{keyCount, keyUnit, keyStrings}, columnNames[:]...), names(tableRows(t, "Events")))
	require.Equal(t, []string{keyReason, keyReady, keyEvents, keyBytes, keyDuration}, names(tableRows(t, "End")))
}

var rewrite = flag.Bool("rewrite", false, "write the files in testdata anew")

// TestKnownFile reads the files of version 1 in testdata, and writes them again.
func TestKnownFile(t *testing.T) {
	// The first of them is as it was before there were blob ranges.
	checkKnown(t, "testdata/v1.trace", sample())
	checkKnown(t, "testdata/v1-blobs.trace", withBlobs())
	checkKnown(t, "testdata/v1-runs.trace", withRuns())
}

func checkKnown(t *testing.T, path string, tr *Trace) {
	var b bytes.Buffer
	require.NoError(t, writeAll(&b, tr))
	if *rewrite {
		require.NoError(t, os.WriteFile(path, b.Bytes(), 0o666))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, want, b.Bytes(), "the encoding has changed: raise Version, or see to it that old files read")
	got, err := Open(path)
	require.NoError(t, err)
	require.Equal(t, tr, got)
}
