//go:build !race

package tracefmt

const raceDetector = false
