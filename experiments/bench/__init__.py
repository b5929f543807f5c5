"""Benchmarks, each run by `python -m experiments.bench.NAME`."""
