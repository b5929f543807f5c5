"""Writes golden.npz: masks of torch.nn.utils.prune. Needs torch.

python tests/compress/prune/make_golden.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import prune

UNSTRUCTURED = [
    # rows, columns, largest integer (0 for normal numbers), amount
    (8, 12, 0, 0.1),
    (8, 12, 0, 0.5),
    (8, 12, 0, 0.9),
    (2, 4, 1, 0.5),
    (1, 3, 1, 0.4),
    (16, 24, 1, 0.05),
    (16, 24, 3, 0.3),
    (16, 24, 3, 0.5),
    (16, 24, 3, 0.9),
    (40, 64, 2, 0.0121),
    (40, 64, 20, 0.0121),
]
STRUCTURED = [
    # rows, columns, largest integer, amount, order of the norm
    (12, 7, 0, 0.3, 1),
    (12, 7, 0, 0.3, 2),
    (12, 7, 0, 0.75, float("inf")),
    (17, 3, 1, 0.3, 1),
    (17, 3, 1, 0.5, 2),
    (64, 3, 1, 0.5, float("inf")),
    (64, 3, 2, 0.99, 2),
]


def killer(size):
    """Numbers among which the median of the second, the middle and the last is always small."""
    values, places = np.full(size, np.inf), np.arange(size)
    # Told from the front: at each step the three that are looked at are the lowest left.
    lowest, first = 0, 0
    while size - first > 3:
        middle = first + (size - first) // 2
        for position in (first + 1, middle):
            values[places[position]] = lowest
            lowest += 1
        # The second lowest becomes the pivot, and the lowest comes before all that is left.
        places[first], places[middle] = places[middle], places[first]
        first += 2
    others = np.flatnonzero(np.isinf(values))
    values[others] = lowest + np.arange(len(others))
    return values.astype(np.float32)


def mask_of(weight, structured, amount, order):
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = torch.tensor(weight)
    if structured:
        prune.ln_structured(module, "weight", amount, n=order, dim=0)
    else:
        prune.l1_unstructured(module, "weight", amount)
    return module.weight_mask.numpy().astype(bool)


def main():
    rng, arrays, cases = np.random.default_rng(0), {}, []
    for rows, columns, largest, amount, *others in UNSTRUCTURED + STRUCTURED:
        if largest:
            weight = rng.integers(-largest, largest + 1, (rows, columns)).astype(np.float32)
        else:
            weight = rng.normal(size=(rows, columns)).astype(np.float32)
        index, order = len(cases), others[0] if others else None
        arrays[f"weight_{index}"] = weight if not largest else weight.astype(np.int8)
        arrays[f"mask_{index}"] = mask_of(weight, bool(others), amount, order)
        cases.append({"amount": amount, "order": order and f"{order:g}", "ties": bool(largest)})
    weight = np.minimum(killer(256), 85.0).reshape(16, 16)
    arrays[f"weight_{len(cases)}"] = weight.astype(np.int8)
    arrays[f"mask_{len(cases)}"] = mask_of(weight, False, 0.5, None)
    cases.append({"amount": 0.5, "order": None, "ties": True})
    meta = {"torch": torch.__version__, "cases": cases}
    np.savez_compressed(Path(__file__).with_name("golden.npz"), meta=json.dumps(meta), **arrays)


if __name__ == "__main__":
    main()
