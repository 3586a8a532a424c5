package registry

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// A Reference names an image at a registry: registry/repository[:tag][@digest].
// The registry is always written out.
type Reference struct {
	Registry   string // host[:port], or docker.io
	Repository string
	Tag        string        // "" where there is none
	Digest     digest.Digest // "" where there is none
}

var (
	// https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#pulling-manifests
	repositoryRE = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	registryRE   = regexp.MustCompile(`^([a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?$`)
)

// ParseReference splits ref. docker.io/NAME becomes docker.io/library/NAME. The
// tag is not defaulted.
func ParseReference(ref string) (Reference, error) {
	r, err := parseReference(ref)
	if err != nil {
		return Reference{}, fmt.Errorf("reference %.300q: %w", ref, err)
	}
	return r, nil
}

func parseReference(ref string) (r Reference, err error) {
	if strings.Contains(ref, "://") {
		return r, errors.New("leave out the scheme")
	}
	name, dgst, hasDigest := strings.Cut(ref, "@")
	if hasDigest {
		r.Digest = digest.Digest(dgst)
		if err := r.Digest.Validate(); err != nil {
			return r, err
		}
	}
	registry, rest, ok := strings.Cut(name, "/")
	if !ok || !isRegistry(registry) {
		return r, errors.New("name the registry too, as in docker.io/library/alpine:3 or localhost:5000/name")
	}
	r.Registry = registry
	r.Repository = rest
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		r.Repository, r.Tag = rest[:i], rest[i+1:]
		if !tagRE.MatchString(r.Tag) {
			return r, fmt.Errorf("%q is not a tag", r.Tag)
		}
	}
	if r.Registry == "docker.io" && !strings.Contains(r.Repository, "/") {
		r.Repository = "library/" + r.Repository
	}
	if len(r.Repository) > 255 || !repositoryRE.MatchString(r.Repository) {
		return r, fmt.Errorf("%q is not a repository name (lower-case letters, digits, . _ - and /)", r.Repository)
	}
	return r, nil
}

// isRegistry tells a registry from the first part of a repository name, by
// Docker's rule.
func isRegistry(s string) bool {
	return registryRE.MatchString(s) && (strings.ContainsAny(s, ".:") || s == "localhost")
}

// String is the reference with all that is known of it.
func (r Reference) String() string {
	s := r.Name()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}

// Name is registry/repository.
func (r Reference) Name() string { return r.Registry + "/" + r.Repository }

// WithTag is the same repository with that tag and no digest.
func (r Reference) WithTag(tag string) Reference {
	r.Tag, r.Digest = tag, ""
	return r
}

// WithDigest is the same repository with that digest and no tag.
func (r Reference) WithDigest(d digest.Digest) Reference {
	r.Tag, r.Digest = "", d
	return r
}

// object is what the manifests endpoint is asked for: the digest where there is
// one, else the tag, else "latest".
func (r Reference) object() string {
	switch {
	case r.Digest != "":
		return r.Digest.String()
	case r.Tag != "":
		return r.Tag
	}
	return "latest"
}
