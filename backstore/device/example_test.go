package device_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/reprise-project/reprise/backstore/device"
)

// A disk image with an ext4 file system, mounted read-only without losetup(8).
func ExampleAttach() {
	image, err := os.Open("disk.img")
	if err != nil {
		log.Fatal(err)
	}
	defer image.Close()
	info, err := image.Stat()
	if err != nil {
		log.Fatal(err)
	}
	d, err := device.Attach(context.Background(), image, info.Size(), &device.Options{
		ReadOnly: true,
		Name:     "disk.img",
		OnError:  func(err error) { log.Print(err) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	if err := device.Mount(d.Path(), "/mnt", "ext4", true, ""); err != nil {
		log.Fatal(err)
	}
	defer device.Unmount("/mnt")
	fmt.Println("serving /mnt from", d.Path())
}
