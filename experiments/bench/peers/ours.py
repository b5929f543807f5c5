"""glm_edge: any recipe, in a separate process to measure its seconds and memory alone.

    python -m experiments.bench.peers.ours

answers the request `quantize` on standard input. It writes the compressed model with dense float32
weights, so that the program that scores all peers scores it too.
"""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import glm_edge as ge
from experiments.common import child
from glm_edge import params as boxes
from glm_edge.compress.domains import KEY as DOMAIN


def quantize(
    checkpoint: str, calibration: str, recipe: str, where: str, text_only: bool, out: str
) -> dict[str, Any]:
    """Run a recipe and write its model.

    Args:
      checkpoint: directory of the model.
      calibration: directory of batches, one `.npz` file each.
      recipe: JSON of the transform.
      where: regular expression of the matrices whose bits count.
      text_only: leaves screens out of calibration.
      out: directory to write.

    Returns:
      Seconds, peak memory, and the bits of the matrices.
    """
    model, params = ge.load(checkpoint, dtype="float32")
    transform = ge.recipe_from_json(recipe)
    batches = [read_batch(path) for path in sorted(Path(calibration).glob("*.npz"))]
    without = ("images", "audio") if text_only else ()
    if text_only:
        batches = [batch for batch in batches if "images" not in batch]
    start = time.perf_counter()
    model, params, _ = transform(model, params, batches, jax.random.key(0), without=without)
    jax.block_until_ready(jax.tree.leaves(params))
    seconds = time.perf_counter() - start
    meta = {"seconds": seconds, "peak_rss_bytes": child.peak_bytes(), **sizes(params, where)}
    dense = boxes.map_with_path(lambda _, leaf: boxes.dense(leaf).astype("float32"), params)
    shutil.rmtree(out, ignore_errors=True)
    ge.save(model, dense, out, format="safetensors")
    return meta


def read_batch(path: Path) -> dict[str, Any]:
    """Read a batch that `np.savez` wrote; its domain becomes a string again."""
    with np.load(path) as file:
        batch = dict(file)
    return batch | {DOMAIN: str(batch[DOMAIN])} if DOMAIN in batch else batch


def sizes(params, where: str) -> dict[str, int]:
    """Count bits and weights of the matrices whose path matches."""
    chosen = {
        path: leaf
        for path, leaf in boxes.path_items(params)
        if boxes.is_matrix(path, leaf) and re.search(where, path)
    }
    bits = 8 * boxes.stored_bytes(chosen)
    return {"stored_bits": bits, "packed_bits": bits, "weights": boxes.count(chosen)}


if __name__ == "__main__":
    child.serve(lambda: {"quantize": quantize}, {})
