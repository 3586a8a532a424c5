package replayer

import (
	"errors"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// An Image is what a plan has to know of an open image; [*backstore.Image] is
// one. A layer whose Decoded is 0 is not open, and a BlobRange of length 0 is
// not known.
type Image interface {
	Layers() []backstore.LayerInfo
	BlobRange(layer int, off, n int64) (blobOff, blobLen int64)
}

// ErrNotLocated is a trace that does not say where in the blobs its bytes are.
// It can be planned once the image's layers are open.
var ErrNotLocated = errors.New("the trace does not say where in the blobs its bytes are")

// Unopened is an image of which only the layers' digests and sizes are known,
// as from a manifest. Its plans are made of the places that the trace has
// stored, none of which can lead out of a blob.
func Unopened(layers []backstore.LayerInfo) Image { return unopened(layers) }

type unopened []backstore.LayerInfo

func (u unopened) Layers() []backstore.LayerInfo { return u }

func (u unopened) BlobRange(int, int64, int64) (blobOff, blobLen int64) { return 0, 0 }

// locate returns the blob bytes of an event in layer i of the image, none if it
// is not in there.
func locate(im Image, l backstore.LayerInfo, i int, e tracefmt.Event) (off, n int64, err error) {
	_, stored := im.(unopened)
	switch {
	case l.Decoded > 0 && e.Off >= l.Decoded || l.Decoded == 0 && !stored:
		return 0, 0, nil
	case stored:
		off, n = e.BlobOff, e.BlobLen
	default:
		off, n = im.BlobRange(i, e.Off, inLayer(l, e))
	}
	if n == 0 {
		return 0, 0, ErrNotLocated
	}
	if off < 0 || n < 0 || off > l.Size || n > l.Size-off {
		return 0, 0, nil
	}
	return off, n, nil
}

// match maps the trace's layer numbers to the image's: by digest, or by
// position where the trace does not know digests.
func match(t *tracefmt.Trace, layers []backstore.LayerInfo) (place func(int) int, missing int) {
	byDigest := map[digest.Digest]int{}
	for i, l := range layers {
		if l.Digest != "" {
			byDigest[l.Digest] = i
		}
	}
	to := make([]int, len(t.Layers))
	for i, l := range t.Layers {
		to[i] = -1
		if j, ok := byDigest[l.Digest]; ok && l.Digest != "" {
			to[i] = j
		} else if l.Digest == "" && i < len(layers) && sameSize(l, layers[i]) {
			to[i] = i
		}
		if to[i] < 0 {
			missing++
		}
	}
	return func(i int) int {
		switch {
		case i < 0:
			return -1
		case i < len(to):
			return to[i]
		case len(to) == 0 && i < len(layers):
			return i
		}
		return -1
	}, missing
}

// sameSize tells whether a layer without a digest may be the image's.
func sameSize(l tracefmt.Layer, im backstore.LayerInfo) bool {
	if im.Decoded == 0 && l.Size > 0 {
		return l.Size == im.Size
	}
	return l.Decoded == 0 || im.Decoded == 0 || l.Decoded == im.Decoded
}
