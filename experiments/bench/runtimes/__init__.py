"""Runtimes beside each other: a module a runtime, each engine in a process of its own.

    PYTHON -m experiments.bench.runtimes.llama

speaks lines of JSON on standard input and output, see `engine`. Modules of peers import numpy and
the peer, nothing else of this repository but `engine`, so that each may have its own environment
and its memory holds nothing else.
"""
