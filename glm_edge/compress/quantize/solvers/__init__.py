"""Quantization solvers on plain arrays."""
