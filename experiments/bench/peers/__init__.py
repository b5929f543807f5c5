"""Other quantizers on our weights: a module a peer, each run in an environment of its own.

    PYTHON -m experiments.bench.peers.torchao --weights=W.npz --inputs=I.npz --options=JSON \\
        --out=O.npz

They import numpy and the peer, nothing else of this repository but `exchange`, which says what the
files hold.
"""
