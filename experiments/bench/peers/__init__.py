"""Other quantizers on glm_edge's weights: one module per peer, each with its own environment.

    PYTHON -m experiments.bench.peers.torchao --weights=W.npz --inputs=I.npz --options=JSON \\
        --out=O.npz

They import only numpy, the peer and `exchange`, which documents the files.
"""
