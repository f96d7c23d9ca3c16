"""Storage formats of weights: NVFP4 and FP8, on the device and on the host."""
