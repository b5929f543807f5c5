"""Runtimes for the comparison: one module per runtime, each engine in a separate process.

    PYTHON -m experiments.bench.runtimes.llama

Reads and writes lines of JSON on standard input and output; see `engine`. Modules of peers import
only numpy, the peer and `engine`, so that each may have its own environment and its memory contains
nothing else.
"""
