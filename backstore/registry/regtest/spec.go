package regtest

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// A LinkSpec says how a link behaves. The zero value is a perfect one.
type LinkSpec struct {
	Delay     time.Duration // a round trip
	Rate      int64         // bits a second each way; 0 is no limit
	Stall     float64       // probability that a body pauses half-way for StallTime
	Reset     float64       // probability that a body's connection is reset half-way
	PerMinute int           // requests a minute, beyond which the answer is 429; 0 is no limit
}

// StallTime is how long a stalled body pauses.
const StallTime = 3 * time.Second

const (
	maxDelay = time.Minute
	maxRate  = 1e12 // bits a second
)

var rateUnits = []struct {
	name string
	bits float64
}{{"gbit", 1e9}, {"mbit", 1e6}, {"kbit", 1e3}, {"bit", 1}}

// ParseLink reads DELAY,RATE[,stall=P][,reset=P][,429=N/min], as in
// "10ms,200mbit" or "30ms,1gbit,stall=0.01,429=100/min". DELAY is a Go
// duration, RATE a number with bit, kbit, mbit or gbit (powers of ten, a
// second), or "unlimited"; P is a probability from 0 to 1.
func ParseLink(s string) (LinkSpec, error) {
	spec, err := parseLink(s)
	if err != nil {
		return LinkSpec{}, fmt.Errorf("link %.100q: %w", s, err)
	}
	return spec, nil
}

func parseLink(s string) (spec LinkSpec, err error) {
	parts := strings.Split(s, ",")
	if len(parts) < 2 {
		return spec, errors.New("want DELAY,RATE, as in 10ms,200mbit")
	}
	if spec.Delay, err = parseDelay(parts[0]); err != nil {
		return spec, err
	}
	if spec.Rate, err = parseRate(parts[1]); err != nil {
		return spec, err
	}
	seen := map[string]bool{}
	for _, p := range parts[2:] {
		key, val, ok := strings.Cut(p, "=")
		if !ok || seen[key] {
			return spec, fmt.Errorf("%q: want stall=P, reset=P or 429=N/min, each once", p)
		}
		seen[key] = true
		switch key {
		case "stall":
			spec.Stall, err = parseProbability(val)
		case "reset":
			spec.Reset, err = parseProbability(val)
		case "429":
			spec.PerMinute, err = parsePerMinute(val)
		default:
			err = errors.New("want stall, reset or 429")
		}
		if err != nil {
			return spec, fmt.Errorf("%q: %w", p, err)
		}
	}
	return spec, nil
}

func parseDelay(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > maxDelay {
		return 0, fmt.Errorf("delay %q: want a duration up to %v, as in 10ms", s, maxDelay)
	}
	return d, nil
}

func parseRate(s string) (int64, error) {
	if s == "unlimited" {
		return 0, nil
	}
	for _, u := range rateUnits {
		num, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(num, 64)
		f = math.Round(f * u.bits)
		if err != nil || !(f >= 1 && f <= maxRate) {
			break
		}
		return int64(f), nil
	}
	return 0, fmt.Errorf("rate %q: want a number and bit, kbit, mbit or gbit, as in 200mbit, or unlimited", s)
}

func parseProbability(s string) (float64, error) {
	p, err := strconv.ParseFloat(s, 64)
	if err != nil || !(p >= 0 && p <= 1) {
		return 0, errors.New("want a probability from 0 to 1")
	}
	return p, nil
}

func parsePerMinute(s string) (int, error) {
	num, ok := strings.CutSuffix(s, "/min")
	n, err := strconv.ParseUint(num, 10, 31)
	if !ok || err != nil || n == 0 {
		return 0, errors.New("want a number of requests, as in 100/min")
	}
	return int(n), nil
}

// String is what ParseLink reads.
func (s LinkSpec) String() string {
	var b strings.Builder
	b.WriteString(s.Delay.String())
	b.WriteByte(',')
	b.WriteString(formatRate(s.Rate))
	if s.Stall > 0 {
		b.WriteString(",stall=" + strconv.FormatFloat(s.Stall, 'g', -1, 64))
	}
	if s.Reset > 0 {
		b.WriteString(",reset=" + strconv.FormatFloat(s.Reset, 'g', -1, 64))
	}
	if s.PerMinute > 0 {
		fmt.Fprintf(&b, ",429=%d/min", s.PerMinute)
	}
	return b.String()
}

func formatRate(bits int64) string {
	if bits == 0 {
		return "unlimited"
	}
	for _, u := range rateUnits {
		if bits%int64(u.bits) == 0 {
			return strconv.FormatInt(bits/int64(u.bits), 10) + u.name
		}
	}
	return ""
}
