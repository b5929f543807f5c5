"""The mathematics of rounding, on plain arrays."""
