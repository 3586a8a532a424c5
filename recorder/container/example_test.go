package container_test

import (
	"context"
	"fmt"
	"os"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/reprise-project/reprise/recorder/container"
)

// Start the container of an image on a block device, and tell when it listens.
func Example() {
	container.Init() // the first statement of main

	ctx := context.Background()
	stage, err := container.NewStage(ctx, &container.Options{Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stage.Close() // before the device is detached

	// While the stage starts: find the image, attach its device.
	device, image := "/dev/loop0", ocispec.ImageConfig{Entrypoint: []string{"/server"}}

	c, err := stage.Start(ctx, &container.Config{
		Image: image, Device: device, Args: []string{"--port", "8080"}, Ready: container.Ready{Port: 8080},
	})
	if err != nil {
		fmt.Println(err) // a *StartError has the exit status
		return
	}
	ready, err := c.WaitReady(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("ready after", ready.Sub(c.Timeline().Requested))
	status, err := c.Stop(ctx, 10*time.Second)
	fmt.Println(status, err)
}
