package main

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/node"
)

// The values of the key record.
const (
	recordOff     = "off"
	recordMissing = "missing"
)

// A policy says what is done for the containers of an image.
type policy struct {
	Replay     bool         `toml:"replay"`
	LookupTime duration     `toml:"lookup_time"`
	Record     string       `toml:"record"`
	Rules      []policyRule `toml:"rule"`
}

// A policyRule says what is different for some images; nil is as in the policy.
type policyRule struct {
	Match      []string  `toml:"match"`
	Replay     *bool     `toml:"replay"`
	LookupTime *duration `toml:"lookup_time"`
	Record     *string   `toml:"record"`
}

// A decision is what a policy says of one image.
type decision struct {
	replay bool
	lookup time.Duration // that the lookup of a trace may take
	record string
}

func (p *policy) check() error {
	if err := checkRecord(p.Record); err != nil {
		return fmt.Errorf("policy.record %w", err)
	}
	for i, r := range p.Rules {
		if err := r.check(); err != nil {
			return fmt.Errorf("policy.rule %d: %w", i+1, err)
		}
	}
	return nil
}

func checkRecord(v string) error {
	if v != recordOff && v != recordMissing {
		return fmt.Errorf("%q: %s or %s", v, recordOff, recordMissing)
	}
	return nil
}

func (r *policyRule) check() error {
	if len(r.Match) == 0 {
		return errors.New("match is missing")
	}
	for _, p := range r.Match {
		if err := checkPattern(p); err != nil {
			return fmt.Errorf("match %q: %w", p, err)
		}
	}
	if r.LookupTime != nil && r.LookupTime.Duration <= 0 {
		return fmt.Errorf("lookup_time %v: more than nothing", *r.LookupTime)
	}
	if r.Record != nil {
		if err := checkRecord(*r.Record); err != nil {
			return fmt.Errorf("record %w", err)
		}
	}
	return nil
}

// checkPattern refuses what could match nothing.
func checkPattern(p string) error {
	host, rest, _ := strings.Cut(p, "/")
	switch {
	case strings.Contains(p, "://"):
		return errors.New("leave out the scheme")
	case strings.Contains(p, "@"), strings.Contains(rest, ":"):
		return errors.New("leave out the tag and the digest: a pattern names repositories")
	case p == "", strings.HasPrefix(p, "/"), strings.HasSuffix(p, "/"), strings.Contains(p, "//"):
		return errors.New("a part is empty")
	case host != "localhost" && !strings.ContainsAny(host, ".:*?["):
		return errors.New("name the registry too, as in docker.io/library/alpine")
	}
	if _, err := path.Match(p, ""); err != nil {
		return errors.New("a '[' has no end, or a '\\' nothing behind it")
	}
	return nil
}

// official is what is left out of the names of some repositories.
const official = "docker.io/library/"

// fits tells whether a pattern matches a repository, by its long or its usual name.
func fits(pattern, name string) bool {
	short, ok := strings.CutPrefix(name, official)
	return matches(pattern, name) || ok && matches(pattern, "docker.io/"+short)
}

// matches tells whether a pattern names a repository, or what it is below of.
func matches(pattern, name string) bool {
	parts := strings.Split(name, "/")
	n := strings.Count(pattern, "/") + 1
	if n > len(parts) {
		return false
	}
	ok, _ := path.Match(pattern, strings.Join(parts[:n], "/"))
	return ok
}

// of decides for an image. What is at no registry is of no rule.
func (p *policy) of(ref string) decision {
	d := decision{replay: p.Replay, lookup: p.LookupTime.Duration, record: p.Record}
	parsed, err := registry.ParseReference(ref)
	if err != nil {
		return d
	}
	for _, r := range p.Rules {
		if slices.ContainsFunc(r.Match, func(m string) bool { return fits(m, parsed.Name()) }) {
			return r.change(d)
		}
	}
	return d
}

func (r *policyRule) change(d decision) decision {
	if r.Replay != nil {
		d.replay = *r.Replay
	}
	if r.LookupTime != nil {
		d.lookup = r.LookupTime.Duration
	}
	d.record = *cmp.Or(r.Record, &d.record)
	return d
}

// complete has the device of an image made as the policy says.
func (p *policy) complete(r *node.Request) {
	d := p.of(r.Ref)
	r.Trace, r.TraceWait = "none", d.lookup
	if d.replay {
		r.Trace = "auto"
	}
}

// records tells whether containers on an image are recorded.
func (p *policy) records(ref string) bool { return p.of(ref).record == recordMissing }

// recordsAny tells whether there may be any that are.
func (p *policy) recordsAny() bool {
	return p.Record == recordMissing || slices.ContainsFunc(p.Rules, func(r policyRule) bool {
		return r.Record != nil && *r.Record == recordMissing
	})
}
