package convert_test

import (
	"context"
	"fmt"
	"log"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry"
)

func ExampleConvert() {
	ctx := context.Background()
	client, err := registry.New(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	src, err := convert.At("docker.io/library/python:3.13", client)
	if err != nil {
		log.Fatal(err)
	}
	dst, err := convert.At("registry.example.com/python:3.13-lazy", client)
	if err != nil {
		log.Fatal(err)
	}
	d, err := convert.Convert(ctx, src, dst, &convert.Options{
		CacheDir: "/var/cache/reprise/convert",
		Progress: func(e convert.Event) {
			if e.Done {
				fmt.Printf("layer %d of %d: %s, %d bytes\n", e.Layer+1, e.Layers, e.Stage, e.Bytes)
			}
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(d.Digest)
}
