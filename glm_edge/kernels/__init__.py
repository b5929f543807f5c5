"""Reference kernels: pure jitted functions on plain arrays."""
