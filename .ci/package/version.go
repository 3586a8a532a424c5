package main

import (
	"regexp"
	"strings"
)

var described = regexp.MustCompile(`^v?(\d+\.\d+\.\d+)((?:-[A-Za-z0-9.]+?)??)(?:-(\d+)-g([0-9a-f]+))?((?:-dirty)?)$`)

// semantic makes a semantic version of what git describe gives: commits behind a tag come after it, and without
// one everything is of version 0.0.0. What is not a part of a version is left out.
func semantic(git string) string {
	m := described.FindStringSubmatch(git)
	if m == nil {
		return "0.0.0+" + build(strings.Split(git, "-")...)
	}
	version := m[1] + m[2]
	more := []string{}
	if m[3] != "" {
		more = append(more, m[3], "g"+m[4])
	}
	if m[5] != "" {
		more = append(more, "dirty")
	}
	if len(more) == 0 {
		return version
	}
	return version + "+" + build(more...)
}

var notInBuild = regexp.MustCompile(`[^A-Za-z0-9]+`)

// build joins the parts of a version's build metadata.
func build(parts ...string) string {
	var kept []string
	for _, p := range parts {
		if p = notInBuild.ReplaceAllString(p, ""); p != "" {
			kept = append(kept, p)
		}
	}
	if len(kept) == 0 {
		return "devel"
	}
	return strings.Join(kept, ".")
}

// debian is the version as Debian orders it: a pre-release comes before its release there only with a tilde.
func debian(version string) string {
	release, more, built := strings.Cut(version, "+")
	release = strings.Replace(release, "-", "~", 1)
	if built {
		return release + "+" + more
	}
	return release
}

// tag is the version as a tag of an image.
func tag(version string) string { return strings.ReplaceAll(version, "+", "-") }
