package main

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/snapshotter"
)

// configPath is where the daemon's configuration is, if there is one.
const configPath = "/etc/reprise/config.toml"

// configSample has all keys with their defaults, commented out.
//
//go:embed config.toml
var configSample string

// A config is the daemon's configuration file; config.toml describes the keys. Those
// that are flags, too, are nil where the file does not have them.
type config struct {
	path string

	Root      *string `toml:"root" flag:"root"`
	Transport *string `toml:"transport" flag:"transport"`
	Platform  *string `toml:"platform" flag:"platform"`
	Registry  struct {
		PlainHTTP *bool     `toml:"plain_http" flag:"plain-http"`
		HostsDir  *string   `toml:"hosts_dir" flag:"hosts-dir"`
		RetryFor  *duration `toml:"retry_for" flag:"retry-for"`
		Outage    *duration `toml:"outage" flag:"outage"`
	} `toml:"registry"`
	Cache struct {
		Size        *byteSize `toml:"size" flag:"cache-size"`
		ChunkSize   *byteSize `toml:"chunk_size" flag:"chunk-size"`
		DecodedSize *byteSize `toml:"decoded_size" flag:"decoded-size"`
	} `toml:"cache"`
	Prefetch struct {
		Rate      *byteSize `toml:"rate" flag:"prefetch-rate"`
		InFlight  *byteSize `toml:"in_flight" flag:"prefetch-in-flight"`
		PerMinute *int      `toml:"requests_per_minute" flag:"requests-per-minute"`
	} `toml:"prefetch"`
	Metrics struct {
		Address *string `toml:"address" flag:"metrics"`
	} `toml:"metrics"`

	Containerd struct {
		Address *string `toml:"address" flag:"containerd"`
	} `toml:"containerd"`
	Snapshotter struct {
		Linger      duration `toml:"linger"`
		Writable    string   `toml:"writable"`
		RemapIDs    bool     `toml:"remap_ids"`
		LookupAhead bool     `toml:"lookup_ahead"`
	} `toml:"snapshotter"`
	Policy policy `toml:"policy"`
	Record struct {
		Tail        duration `toml:"tail"`
		Settle      duration `toml:"settle"`
		Quiet       duration `toml:"quiet"`
		MaxDuration duration `toml:"max_duration"`
		MaxBytes    byteSize `toml:"max_bytes"`
	} `toml:"record"`
	Log struct {
		Level  string `toml:"level"`
		Format string `toml:"format"`
	} `toml:"log"`
	Tracing tracing `toml:"tracing"`
}

func defaultConfig() *config {
	c := &config{}
	c.Snapshotter.Linger.Duration = 30 * time.Second
	c.Snapshotter.Writable, c.Snapshotter.LookupAhead = snapshotter.WritableOverlayfs, true
	c.Policy.Replay, c.Policy.Record = true, recordOff
	c.Policy.LookupTime.Duration = 2 * time.Second
	c.Record.Tail.Duration, c.Record.MaxDuration.Duration = time.Minute, time.Minute
	c.Record.Settle.Duration, c.Record.Quiet.Duration = 2*time.Second, 5*time.Second
	c.Log.Level, c.Log.Format = "info", "text"
	c.Tracing.Sample = 1
	return c
}

// A duration is a string in the file.
type duration struct {
	time.Duration
	bad string // what is there instead
}

// UnmarshalText implements [encoding.TextUnmarshaler]. See [badValue] for the error:
// the decoder does not always say of which key it is.
func (d *duration) UnmarshalText(p []byte) error {
	var err error
	if d.Duration, err = time.ParseDuration(string(p)); err != nil {
		d.bad = fmt.Sprintf("%q is not a duration such as \"300ms\" or \"1m30s\"", p)
	}
	return nil
}

// A byteSize is a number, or a string in the file.
type byteSize struct {
	n   int64
	bad string // as in duration
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (s *byteSize) UnmarshalText(p []byte) error {
	var err error
	if s.n, err = strconv.ParseInt(strings.ReplaceAll(string(p), "_", ""), 10, 64); err == nil {
		return nil
	}
	if s.n, err = units.RAMInBytes(string(p)); err != nil {
		s.bad = fmt.Sprintf("%q is not a size such as 65536 or \"512MiB\"", p)
	}
	return nil
}

func (s byteSize) String() string { return strconv.FormatInt(s.n, 10) }

// badValue finds durations and sizes that are none.
func badValue(v reflect.Value, key string) error {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			return badValue(v.Elem(), key)
		}
	case reflect.Slice:
		for i := range v.Len() {
			if err := badValue(v.Index(i), fmt.Sprintf("%s %d", key, i+1)); err != nil {
				return err
			}
		}
	case reflect.Struct:
		if bad := v.FieldByName("bad"); bad.IsValid() {
			if bad.String() != "" {
				return fmt.Errorf("%s: %s", key, bad)
			}
			return nil
		}
		for i := range v.NumField() {
			if name := v.Type().Field(i).Tag.Get("toml"); name != "" {
				if err := badValue(v.Field(i), strings.TrimPrefix(key+"."+name, ".")); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// loadConfig reads the configuration at path; at [configPath] if it is empty, where
// it may be missing. It does not know the flags.
func loadConfig(path string) (*config, error) {
	p, err := os.ReadFile(path)
	if path == "" {
		path = configPath
		if p, err = os.ReadFile(path); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	c, err := parseConfig(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c.path = path
	return c, nil
}

func parseConfig(p []byte) (*config, error) {
	c := defaultConfig()
	d := toml.NewDecoder(bytes.NewReader(p)).DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, plainTOML(err)
	}
	if err := badValue(reflect.ValueOf(c).Elem(), ""); err != nil {
		return nil, err
	}
	return c, c.check()
}

// plainTOML says what is wrong and where, in the words of the file.
func plainTOML(err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var errs []string
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			errs = append(errs, fmt.Sprintf("line %d: unknown key %s", line, strings.Join(e.Key(), ".")))
		}
		return errors.New(strings.Join(errs, "; "))
	}
	var wrong *toml.DecodeError
	if !errors.As(err, &wrong) {
		return err
	}
	line, _ := wrong.Position()
	says := strings.TrimPrefix(wrong.Error(), "toml: ")
	if kind, ok := strings.CutPrefix(says, "cannot decode TOML "); ok { // into some Go type
		kind, _, _ = strings.Cut(kind, " ")
		says = "it cannot be of type " + kind
	}
	if key := strings.Join(wrong.Key(), "."); key != "" {
		says = key + ": " + says
	}
	return fmt.Errorf("line %d: %s", line, says)
}

// check finds what is wrong with the keys that are not flags.
func (c *config) check() error {
	for _, d := range []struct {
		key string
		is  duration
	}{
		{"snapshotter.linger", c.Snapshotter.Linger},
		{"policy.lookup_time", c.Policy.LookupTime},
	} {
		if d.is.Duration <= 0 {
			return fmt.Errorf("%s %v: more than nothing", d.key, d.is)
		}
	}
	switch {
	case !slices.Contains(writables, c.Snapshotter.Writable):
		return fmt.Errorf("snapshotter.writable %q: one of %s", c.Snapshotter.Writable, strings.Join(writables, ", "))
	case c.Record.MaxBytes.n < 0:
		return fmt.Errorf("record.max_bytes %v: it cannot be negative", c.Record.MaxBytes)
	case !slices.Contains(logLevels, c.Log.Level):
		return fmt.Errorf("log.level %q: one of %s", c.Log.Level, strings.Join(logLevels, ", "))
	case c.Log.Format != "text" && c.Log.Format != "json":
		return fmt.Errorf("log.format %q: text or json", c.Log.Format)
	}
	if err := c.Policy.check(); err != nil {
		return err
	}
	return c.Tracing.check()
}

var (
	logLevels = []string{"debug", "info", "warn", "error"}
	writables = []string{snapshotter.WritableOverlayfs, snapshotter.WritableDir, snapshotter.WritableDev}
)

// logger logs as the file says.
func (c *config) logger(w io.Writer) *slog.Logger {
	var o slog.HandlerOptions
	var l slog.Level
	if l.UnmarshalText([]byte(c.Log.Level)) == nil {
		o.Level = l
	}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, &o))
	}
	return slog.New(slog.NewTextHandler(w, &o))
}

// rules are those of [record].
func (c *config) rules() node.RecordRules {
	r := &c.Record
	return node.RecordRules{
		Tail: r.Tail.Duration, Settle: r.Settle.Duration, Quiet: r.Quiet.Duration,
		MaxDuration: r.MaxDuration.Duration, MaxBytes: r.MaxBytes.n,
	}
}

// apply sets the flags that the file has and the command line has not, and checks
// them. Those of the command line were checked before.
func (c *config) apply(cmd *cobra.Command, f *nodeFlags) error {
	names := map[string]string{} // keys by flag
	if err := setFlags(cmd, reflect.ValueOf(c).Elem(), "", names); err != nil {
		return fmt.Errorf("%s: %w", c.path, err)
	}
	err := f.check(cmd)
	if err == nil {
		return nil
	}
	says := err.Error()
	for flag, key := range names {
		if rest, ok := strings.CutPrefix(says, "--"+flag); ok && strings.IndexAny(rest, " :") == 0 {
			says = key + rest
		}
	}
	return fmt.Errorf("%s: %s", c.path, says)
}

// setFlags sets the flags that the fields of a table name, and collects the names.
func setFlags(cmd *cobra.Command, table reflect.Value, prefix string, names map[string]string) error {
	for i := range table.NumField() {
		field, value := table.Type().Field(i), table.Field(i)
		key := prefix + field.Tag.Get("toml")
		flag := field.Tag.Get("flag")
		if flag == "" && value.Kind() == reflect.Struct {
			if err := setFlags(cmd, value, key+".", names); err != nil {
				return err
			}
		}
		if flag == "" || value.IsNil() || cmd.Flags().Changed(flag) {
			continue
		}
		names[flag] = key
		if err := cmd.Flags().Set(flag, fmt.Sprint(value.Elem())); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

func newConfig() *cobra.Command {
	var check bool
	var path string
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print a configuration file with all keys and their defaults",
		Long: `Print a configuration file for the daemon, with all keys and their defaults,
commented out:

  reprise daemon config > ` + configPath + `

With --check, say what is wrong with the file that there is instead.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !check {
				_, err := fmt.Fprint(cmd.OutOrStdout(), configSample)
				return err
			}
			return checkConfig(path)
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "check the configuration file")
	addConfig(cmd, &path)
	return cmd
}

func addConfig(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "config", "", "configuration file (default "+configPath+", if there is one)")
}

// checkConfig finds what is wrong with a file for a daemon without flags.
func checkConfig(path string) error {
	c, err := loadConfig(path)
	if err != nil {
		return err
	}
	var f daemonFlags
	cmd := &cobra.Command{}
	f.add(cmd)
	return c.apply(cmd, &f.nodeFlags)
}
