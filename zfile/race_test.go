//go:build race

package zfile

func init() { raceEnabled = true }
