//go:build race

package backstore

func init() { raceEnabled = true }
