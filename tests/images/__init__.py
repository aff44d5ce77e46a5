"""The two images, built and run without a Docker engine: `make images` and `make images-test`."""
