package snapshotter

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/reprise-project/reprise/backstore/registry"
)

// Secrets are the image pull secrets of the images on the node, by repository:
// those with which containerd has pulled them last, and those with which it is
// about to. They are in a file that only its owner can read, so that devices
// are served after a restart too, and in no log. Safe for concurrent use.
type Secrets struct {
	path string
	log  *slog.Logger

	saving sync.Mutex // one at a time writes the file; taken before mu

	mu      sync.Mutex           // guards what follows
	good    map[string]*secret   // by registry/repository
	offered map[string][]*secret // of pulls under way, latest first
}

// A secret is what a registry knows somebody by.
type secret struct {
	cred   registry.Credential
	server string // the only host that it is for; empty for those of the repository
}

// secretsFile is the file: JSON, of mode 0600.
type secretsFile struct {
	Version int                    `json:"version"`
	Secrets map[string]savedSecret `json:"secrets"` // by registry/repository
}

type savedSecret struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Server   string `json:"server,omitempty"`
}

const secretsVersion = 1

// OpenSecrets reads the file at path, if there is one; its directory is there. A
// file that cannot be read is logged, and replaced by the next pull.
func OpenSecrets(path string, log *slog.Logger) *Secrets {
	s := &Secrets{path: path, log: log, good: map[string]*secret{}, offered: map[string][]*secret{}}
	if err := s.load(); err != nil {
		log.Warn("image pull secrets are not known before the next pull of each image", "err", err)
	}
	return s
}

func (s *Secrets) load() error {
	p, err := os.ReadFile(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var f secretsFile
	if json.Unmarshal(p, &f) != nil { // whose error may show a part of the file
		return fmt.Errorf("%s: not valid JSON", s.path)
	}
	if f.Version != secretsVersion {
		return fmt.Errorf("%s: version %d, not %d", s.path, f.Version, secretsVersion)
	}
	for repository, v := range f.Secrets {
		s.good[repository] = &secret{registry.Credential{Username: v.Username, Password: v.Password}, v.Server}
	}
	return nil
}

// Credentials are for [registry.Options].
func (s *Secrets) Credentials(repository, host string) (list []registry.Credential) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.good[repository]; g != nil && g.isFor(host) {
		list = append(list, g.cred)
	}
	for _, o := range s.offered[repository] {
		if o.isFor(host) && !slices.Contains(list, o.cred) {
			list = append(list, o.cred)
		}
	}
	return list
}

// offer has a secret used from now on, where a good one is missing or refused. The
// end says whether it is good; else it is forgotten.
func (s *Secrets) offer(repository string, o *secret) (end func(good bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offered[repository] = append([]*secret{o}, s.offered[repository]...)
	return func(good bool) {
		if s.settle(repository, o, good) {
			s.save()
		}
	}
}

// settle ends an offer, and tells whether that changes what is to be saved.
func (s *Secrets) settle(repository string, o *secret, good bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := slices.DeleteFunc(s.offered[repository], func(p *secret) bool { return p == o })
	if s.offered[repository] = left; len(left) == 0 {
		delete(s.offered, repository)
	}
	old := s.good[repository]
	if !good || old != nil && *old == *o {
		return false
	}
	s.good[repository] = o
	return true
}

// known are the repositories that have a secret now.
func (s *Secrets) known() map[string]*secret {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.good)
}

// drop forgets those of the known that are still the same and do not fit.
func (s *Secrets) drop(known map[string]*secret, fits map[string]bool) {
	s.mu.Lock()
	dropped := false
	for repository, v := range known {
		if !fits[repository] && s.good[repository] == v {
			delete(s.good, repository)
			dropped = true
		}
	}
	s.mu.Unlock()
	if dropped {
		s.save()
	}
}

// save writes the file. What goes wrong is logged: until a restart nothing is lost.
func (s *Secrets) save() {
	s.saving.Lock()
	defer s.saving.Unlock()
	if err := s.write(); err != nil {
		s.log.Warn("image pull secrets would not survive a restart", "err", err)
	}
}

func (s *Secrets) write() error {
	f := secretsFile{secretsVersion, map[string]savedSecret{}}
	for repository, v := range s.known() {
		f.Secrets[repository] = savedSecret{v.cred.Username, v.cred.Password, v.server}
	}
	p, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return replaceSecret(s.path, p)
}

// replaceSecret writes a file that nobody else can read, and that is never seen
// half.
func replaceSecret(path string, p []byte) error {
	beside := path + ".new"
	if err := os.Remove(beside); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(p); err == nil {
		err = unix.Fdatasync(int(f.Fd()))
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(beside))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// isFor tells whether a host may see the secret.
func (s *secret) isFor(host string) bool {
	return s.server == "" || s.server == host || isDockerHub(s.server) && isDockerHub(host)
}

func isDockerHub(host string) bool {
	return host == "docker.io" || host == "index.docker.io" || host == "registry-1.docker.io"
}

// secretOf reads the secret of a pull as containerd does; nil if there is none.
func secretOf(a *cri.AuthConfig) *secret {
	s := &secret{server: hostOf(a.GetServerAddress())}
	switch {
	case a.GetUsername() != "":
		s.cred = registry.Credential{Username: a.GetUsername(), Password: a.GetPassword()}
	case a.GetIdentityToken() != "":
		s.cred = registry.Credential{Password: a.GetIdentityToken()}
	case a.GetAuth() != "":
		p, err := base64.StdEncoding.DecodeString(a.GetAuth())
		user, password, ok := strings.Cut(string(p), ":")
		if err != nil || !ok { // the pull fails, and says so
			return nil
		}
		s.cred = registry.Credential{Username: user, Password: strings.Trim(password, "\x00")}
	default: // registry tokens are nothing to containerd
		return nil
	}
	return s
}

// hostOf is the host of a server's address, with or without a scheme.
func hostOf(address string) string {
	if u, err := url.Parse(address); err == nil && u.Host != "" {
		return u.Host
	}
	host, _, _ := strings.Cut(address, "/")
	return host
}
