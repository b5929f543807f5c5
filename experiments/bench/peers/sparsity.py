"""Published pruning algorithms, reimplemented in float64 numpy without this library.

Magnitude, Wanda and SparseGPT follow their papers and default settings: one pass over the layers,
each layer with the outputs of the pruned layers before it, and all matrices of a layer at once.
JaxPruner cannot be imported with current jax, so its magnitude pruning is reimplemented too. It
keeps the largest magnitudes; the sparsity of each matrix is uniform or follows the Erdos-Renyi
rule.

Shapes: `N` calibration rows, `in` and `out` sides of a matrix.

References: Learning both Weights and Connections, https://arxiv.org/abs/1506.02626; Wanda,
https://arxiv.org/abs/2306.11695; SparseGPT, https://arxiv.org/abs/2301.00774; JaxPruner,
https://arxiv.org/abs/2304.14082.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BLOCK, DAMPING = 128, 0.01
Weights = dict[str, np.ndarray]
Inputs = Callable[[Weights, list[str]], Weights]


def prune(weights: Mapping[str, np.ndarray], inputs: Inputs, options: Mapping[str, Any]) -> Weights:
    """Prune the matrices of a decoder.

    Args:
      weights: weights [out, in] by path, `.../layers/<i>/...`.
      inputs: function of weights and some of their paths that returns the input rows [N, in] of
        each.
      options: `algorithm` (`magnitude`, `wanda` or `sparsegpt`), `sparsity` or `n_m` (keeps N of M
        neighbours along the inputs), and for magnitude `scope`: `uniform`, `global` or `erk`.

    Returns:
      Pruned float64 weights by path.
    """
    dense = {path: np.asarray(weight, np.float64) for path, weight in weights.items()}
    sparsity, n_m = options.get("sparsity"), options.get("n_m")
    if options["algorithm"] == "magnitude":
        masks = magnitude(dense, sparsity, n_m, options.get("scope", "uniform"))
        return {path: weight * masks[path] for path, weight in dense.items()}
    for paths in layers(dense):
        sown = inputs(dense, paths)
        for path in paths:
            rows = np.asarray(sown[path], np.float64)
            if options["algorithm"] == "wanda":
                dense[path] = dense[path] * wanda(dense[path], rows, sparsity, n_m)
            else:
                dense[path] = sparsegpt(dense[path], rows, sparsity, n_m)
    return dense


def layers(weights: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Return the paths of each layer, in order."""
    numbered: dict[int, list[str]] = {}
    for path in weights:
        numbered.setdefault(int(re.search(r"layers/(\d+)/", path).group(1)), []).append(path)
    return [numbered[index] for index in sorted(numbered)]


def magnitude(
    weights: Weights, sparsity: float | None, n_m: tuple[int, int] | None, scope: str
) -> dict[str, np.ndarray]:
    """Mask the smallest magnitudes; return bool [out, in] by path."""
    if n_m is not None:
        return {path: _of_neighbours(np.abs(weight), n_m) for path, weight in weights.items()}
    if scope == "global":
        scores = np.concatenate([np.abs(weight).ravel() for weight in weights.values()])
        ends = np.cumsum([weight.size for weight in weights.values()])
        masks = np.split(_largest(scores, sparsity), ends[:-1])
        return {p: k.reshape(weights[p].shape) for p, k in zip(weights, masks, strict=True)}
    shares = dict.fromkeys(weights, sparsity)
    if scope == "erk":
        shares = erdos_renyi({path: weight.shape for path, weight in weights.items()}, sparsity)
    return {
        path: _largest(np.abs(weight).ravel(), shares[path]).reshape(weight.shape)
        for path, weight in weights.items()
    }


def erdos_renyi(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Compute sparsities by path that keep a fraction `c (out + in)/(out in)` of `out in` weights.

    Matrices whose fraction would exceed one stay dense, and the others compensate.
    """
    dense_paths: set[str] = set()
    while True:
        sparse = {path: shape for path, shape in shapes.items() if path not in dense_paths}
        total = sum(np.prod(shape) for shape in shapes.values())
        budget = (1 - sparsity) * total - sum(np.prod(shapes[path]) for path in dense_paths)
        scale = budget / sum(sum(shape) for shape in sparse.values())
        density = {path: scale * sum(shape) / np.prod(shape) for path, shape in sparse.items()}
        over = {path for path, share in density.items() if share > 1}
        if not over:
            return {path: 1 - density.get(path, 1.0) for path in shapes}
        dense_paths |= over


def wanda(
    weight: np.ndarray, rows: np.ndarray, sparsity: float | None, n_m: tuple[int, int] | None
) -> np.ndarray:
    """Mask by `|w| ||x||` per output row; return bool [out, in]."""
    score = np.abs(weight) * np.sqrt(np.square(rows).sum(axis=0))
    if n_m is not None:
        return _of_neighbours(score, n_m)
    return np.stack([_largest(row, sparsity) for row in score])


def sparsegpt(
    weight: np.ndarray,
    rows: np.ndarray,
    sparsity: float | None,
    n_m: tuple[int, int] | None,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> np.ndarray:
    """Prune a weight; later columns compensate for the errors of earlier ones.

    Args:
      weight: weight [out, in].
      rows: input rows [N, in].
      sparsity: fraction of each block of columns that is pruned; None with `n_m`.
      n_m: `(N, M)`.
      block: number of columns whose weights are compared.
      damping: fraction of the mean diagonal of the Hessian that is added to it.
    """
    weight, hessian = weight.copy(), rows.T @ rows
    silent = np.diag(hessian) == 0
    hessian[silent, silent] = 1
    weight[:, silent] = 0
    hessian[np.diag_indices_from(hessian)] += damping * np.mean(np.diag(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        scale = np.diag(upper)[start:stop]
        if n_m is None:
            worth = np.square(weight[:, start:stop] / scale)
            stays = _largest(worth.ravel(), sparsity).reshape(worth.shape)
        else:
            stays = np.ones((weight.shape[0], stop - start), bool)
        errors = np.zeros_like(stays, np.float64)
        for column in range(start, stop):
            if n_m is not None and (column - start) % n_m[1] == 0:
                group = slice(column, column + n_m[1])
                worth = np.square(weight[:, group] / np.diag(upper)[group])
                stays[:, column - start : column - start + n_m[1]] = _of_neighbours(worth, n_m)
            column_values = weight[:, column]
            error = np.where(stays[:, column - start], 0.0, column_values) / upper[column, column]
            weight[:, column:stop] -= np.outer(error, upper[column, column:stop])
            weight[~stays[:, column - start], column] = 0.0
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def _largest(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Return True for all but the lowest fraction of scores [n]."""
    stays = np.ones(len(scores), bool)
    stays[np.argsort(scores, kind="stable")[: round(sparsity * len(scores))]] = False
    return stays


def _of_neighbours(scores: np.ndarray, n_m: tuple[int, int]) -> np.ndarray:
    """Return True for the N highest of each M neighbours of a row, [out, in]."""
    n, m = n_m
    groups = scores.reshape(-1, m)
    stays = np.ones(groups.shape, bool)
    np.put_along_axis(stays, np.argsort(groups, axis=1, kind="stable")[:, : m - n], False, axis=1)
    return stays.reshape(scores.shape)
