"""The Wan DiT as single-device code: configuration, weights, model, attention kernels. Knows no processes."""
