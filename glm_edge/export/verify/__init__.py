"""Comparison of an exported model with JAX, and the runtimes that run it."""
