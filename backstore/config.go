package backstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/lsmt"
)

// Config is the image description of the reference implementation, a
// config.v1.json. Fields that are not listed are ignored.
type Config struct {
	RepoBlobURL string        `json:"repoBlobUrl"`
	Lowers      []ConfigLayer `json:"lowers"` // bottom first
	Upper       ConfigUpper   `json:"upper"`
	ResultFile  string        `json:"resultFile"`
}

// ConfigLayer is one sealed layer of a [Config].
type ConfigLayer struct {
	File   string        `json:"file,omitempty"`
	Dir    string        `json:"dir,omitempty"` // holds overlaybd.commit or .sealed
	Digest digest.Digest `json:"digest,omitempty"`
	Size   int64         `json:"size,omitempty"`
}

// ConfigUpper is the writable layer of a [Config].
type ConfigUpper struct {
	Index string `json:"index,omitempty"`
	Data  string `json:"data,omitempty"`
}

// maxConfig bounds a configuration file.
const maxConfig = 1 << 20

// ReadConfig reads a config.v1.json. Relative paths in it are relative to its
// folder, and are resolved.
func ReadConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	defer f.Close()
	p, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("read config %s: %w", path, err)
	}
	c, err := parseConfig(p)
	if err != nil {
		return nil, fmt.Errorf("read config %s: %w", path, err)
	}
	dir := filepath.Dir(path)
	for i := range c.Lowers {
		resolve(dir, &c.Lowers[i].File, &c.Lowers[i].Dir)
	}
	resolve(dir, &c.Upper.Index, &c.Upper.Data)
	return c, nil
}

func resolve(dir string, paths ...*string) {
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

func parseConfig(p []byte) (*Config, error) {
	if len(p) > maxConfig {
		return nil, fmt.Errorf("larger than %d bytes", maxConfig)
	}
	var c Config
	if err := json.Unmarshal(p, &c); err != nil {
		return nil, err
	}
	if len(c.Lowers) == 0 {
		return nil, fmt.Errorf("it names no lower layers")
	}
	if len(c.Lowers) > lsmt.MaxLayers {
		return nil, fmt.Errorf("%d lower layers, at most %d are supported", len(c.Lowers), lsmt.MaxLayers)
	}
	for i, l := range c.Lowers {
		if l.File == "" && l.Dir == "" {
			return nil, fmt.Errorf("lower layer %d has no file", i)
		}
		if l.Digest != "" {
			if err := l.Digest.Validate(); err != nil {
				return nil, fmt.Errorf("lower layer %d: digest %q: %w", i, l.Digest, err)
			}
		}
	}
	if (c.Upper.Data == "") != (c.Upper.Index == "") && c.Upper.Data == "" {
		return nil, fmt.Errorf("the upper layer has an index but no data file")
	}
	return &c, nil
}

// Sources gives the lower layers of the configuration as files.
func (c *Config) Sources() ([]LayerSource, error) {
	sources := make([]LayerSource, len(c.Lowers))
	for i, l := range c.Lowers {
		path, err := l.path()
		if err != nil {
			return nil, fmt.Errorf("lower layer %d: %w", i, err)
		}
		sources[i] = LayerSource{Path: path, Digest: l.Digest}
	}
	return sources, nil
}

func (l ConfigLayer) path() (string, error) {
	if l.File != "" {
		return l.File, nil
	}
	var err error
	for _, name := range []string{"overlaybd.commit", "overlaybd.sealed"} {
		path := filepath.Join(l.Dir, name)
		if _, err = os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", err
}

// OpenUpper opens the writable layer that the configuration names, nil if it
// names none. A sparse one has an empty index file, or none; its discard log is
// beside it, see [OpenUpper].
func (c *Config) OpenUpper() (*lsmt.Writable, error) {
	if c.Upper.Data == "" {
		return nil, nil
	}
	if c.Upper.Index == "" {
		return OpenUpper(c.Upper.Data)
	}
	index, err := os.OpenFile(c.Upper.Index, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open upper layer: %w", err)
	}
	if fi, err := index.Stat(); err == nil && fi.Size() == 0 {
		_ = index.Close()
		return OpenUpper(c.Upper.Data)
	}
	data, err := os.OpenFile(c.Upper.Data, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open upper layer: %w", err), index.Close())
	}
	w, err := lsmt.OpenAppend(data, index)
	if err != nil {
		return nil, fmt.Errorf("open upper layer %s: %w", c.Upper.Data, errors.Join(err, index.Close(), data.Close()))
	}
	return w, nil
}
