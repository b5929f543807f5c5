"""glm_edge: any recipe, in a separate process to measure its seconds and memory alone.

    python -m experiments.bench.peers.ours --checkpoint=DIR --calibration=DIR --recipe=JSON \\
        --where=REGEX --out=DIR

Writes the compressed model with dense float32 weights, so that the same program scores all methods.
`meta.json` contains seconds, peak memory, and the bits of the boxes of matrices that match
`--where`.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np

import glm_edge as ge
from experiments.bench.peers.exchange import peak_bytes
from glm_edge import params as boxes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--where", default="")
    parser.add_argument("--text_only", action="store_true", help="leave screens out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, params = ge.load(arguments.checkpoint, dtype="float32")
    transform = ge.recipe_from_json(arguments.recipe)
    batches = [dict(np.load(path)) for path in sorted(arguments.calibration.glob("*.npz"))]
    without = ("images", "audio") if arguments.text_only else ()
    if arguments.text_only:
        batches = [batch for batch in batches if "images" not in batch]
    start = time.perf_counter()
    model, params, _ = transform(model, params, batches, jax.random.key(0), without=without)
    jax.block_until_ready(jax.tree.leaves(params))
    seconds = time.perf_counter() - start
    meta = {"seconds": seconds, "peak_rss_bytes": peak_bytes(), **sizes(params, arguments.where)}
    dense = boxes.map_with_path(lambda _, leaf: boxes.dense(leaf).astype("float32"), params)
    shutil.rmtree(arguments.out, ignore_errors=True)
    ge.save(model, dense, arguments.out, format="safetensors")
    (arguments.out / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def sizes(params, where: str) -> dict[str, int]:
    """Counts bits and weights of the matrices whose path matches."""
    chosen = {
        path: leaf
        for path, leaf in boxes.path_items(params)
        if boxes.is_matrix(path, leaf) and re.search(where, path)
    }
    bits = 8 * boxes.stored_bytes(chosen)
    return {"stored_bits": bits, "packed_bits": bits, "weights": boxes.count(chosen)}


if __name__ == "__main__":
    main()
