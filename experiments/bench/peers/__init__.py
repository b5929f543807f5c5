"""Other quantizers on our weights: one module per peer, each in an environment of its own.

    PYTHON -m experiments.bench.peers.torchao

answers the request `quantize` of `exchange.serve` on standard input. Peers import numpy, their own
packages, and of this repository `exchange` and `experiments.common.child`.
"""
