//go:build race

package tracefmt

const raceDetector = true
