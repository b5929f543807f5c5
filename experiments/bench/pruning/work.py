"""Carries out the rows of the pruning table: prunes, heals, and counts what is stored."""

import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import glm_edge as ge
from experiments.bench.peers import sparsity
from experiments.bench.peers.methods import DECODER, OURS, Method
from experiments.bench.pruning.rows import RESTATED
from experiments.bench.quality import Gathered, sown_inputs
from glm_edge import params as boxes
from glm_edge.cli.console import progress
from glm_edge.compress import batches
from glm_edge.compress.transform import Context


class Pruned(NamedTuple):
    """A model, masks in boxes, and what its making says.

    Attributes:
      model: perhaps smaller.
      params: its parameters.
      notes: of the reports.
      curve: loss of the last steps of training, or None.
    """

    model: Any
    params: Any
    notes: tuple[str, ...] = ()
    curve: dict[str, float] | None = None


class Worker:
    """Prunes and heals one model.

    Args:
      data: the model.
      calibration: batches that scores and reconstructions read.
      training: batches that healing reads, made when it is first asked for.
      directory: where trainings keep their state.
      seed: of the order of batches.
    """

    def __init__(
        self,
        data: Gathered,
        calibration: Sequence[dict[str, Any]],
        training: Any,
        directory: Path,
        seed: int,
    ):
        self.data, self.calibration, self.directory = data, calibration, directory
        self.dense = (data.model, data.params)
        self._training, self._key = training, jax.random.key(seed)

    @functools.cached_property
    def training(self) -> list[dict[str, Any]]:
        """Batches that healing reads."""
        return self._training()

    def run(self, method: Method, slug: str) -> Pruned:
        """Carries out a row.

        Args:
          method: the row.
          slug: name of its state.
        """
        if method.peer == OURS:
            return self._ours(slug, **method.options)
        if method.peer == RESTATED:
            return self._restated(method.options)
        return Pruned(*self.dense)

    def _ours(self, slug: str, prune: dict[str, Any] | None, heal: dict[str, Any] | None) -> Pruned:
        (model, params), notes, curve = self.dense, [], None
        if prune is not None:
            transform = ge.recipe_from_json(json.dumps(prune))
            context = Context(self.calibration, self._key, self.dense, progress())
            model, params, report = transform.apply(model, params, context)
            notes += report.notes
        if heal is not None:
            if "mixture" in heal:
                kinds = {batches.kind_of(batch) for batch in self.training}
                # Without recordings there is nothing spoken.
                shares = heal["mixture"].items()
                heal = {**heal, "mixture": {k: share for k, share in shares if k in kinds}}
            # Other options, such as more steps, are another training.
            options = json.dumps([prune, heal], sort_keys=True).encode()
            state = str(self.directory / f"{slug}-{zlib.crc32(options):08x}")
            recipe = {"name": "distill", "options": {**heal, "state_dir": state}}
            transform = ge.recipe_from_json(json.dumps(recipe))
            transform = dataclasses.replace(transform, teacher=self.dense)
            context = Context(self.training, self._key, self.dense, progress())
            model, params, report = transform.apply(model, params, context)
            notes += report.notes
            tail = report.curve[-100:]
            curve = {
                name: float(np.mean([getattr(point, name) for point in tail]))
                for name in ("loss", "soft", "hard")
            }
        jax.block_until_ready(jax.tree.leaves(params))
        return Pruned(model, params, tuple(dict.fromkeys(notes)), curve)

    def _restated(self, options: Mapping[str, Any]) -> Pruned:
        leaves = dict(boxes.path_items(self.data.params))
        weights = {path: np.asarray(leaves[path]) for path in boxes.select(leaves, DECODER)}

        def with_weights(pruned_weights: Mapping[str, np.ndarray]) -> Any:
            return boxes.map_with_path(
                lambda path, leaf: (
                    jnp.asarray(pruned_weights[path], jnp.float32)
                    if path in pruned_weights
                    else leaf
                ),
                self.data.params,
            )

        def inputs(pruned_weights: sparsity.Weights, paths: list[str]) -> sparsity.Weights:
            params = with_weights(pruned_weights)
            sown = [sown_inputs(self.data.model, params, b, paths) for b in self.calibration]
            return {path: np.concatenate([part[path] for part in sown]) for path in paths}

        pruned_weights = sparsity.prune(weights, inputs, options)
        params = boxes.map_with_path(
            lambda path, leaf: boxes.mask(leaf, leaf != 0) if path in pruned_weights else leaf,
            with_weights(pruned_weights),
        )
        return Pruned(self.data.model, params)


def sizes(dense: Any, pruned: Any) -> dict[str, Any]:
    """Counts the parameters and bytes of a pruned decoder.

    Args:
      dense: parameters of the whole model.
      pruned: of the pruned one.

    Returns:
      `removed`, the fraction of the decoder's parameters that its arrays no longer hold; `zeros`,
      the fraction of what they hold that is zero; `stored_bytes`, masks included; `mask_bytes`; and
      `stored`, these bytes as a fraction of the dense decoder's.
    """
    before, after = dense["decoder"], pruned["decoder"]
    leaves = [leaf for _, leaf in boxes.path_items(after)]
    stored, count = boxes.stored_bytes(after), boxes.count(after)
    zeros = sum(int(jnp.sum(boxes.dense(leaf) == 0)) for leaf in leaves)
    return {
        "removed": 1 - count / boxes.count(before),
        "zeros": zeros / count,
        "stored_bytes": stored,
        "mask_bytes": sum(leaf.mask.nbytes for leaf in leaves if isinstance(leaf, boxes.Masked)),
        "stored": stored / boxes.stored_bytes(before),
    }


def dense_of(params: Any) -> Any:
    """Parameters without boxes, float32."""
    return boxes.map_with_path(lambda _, leaf: boxes.dense(leaf).astype(jnp.float32), params)


def timed(worker: Worker, method: Method, slug: str) -> tuple[Pruned, float]:
    """Returns a row, and the seconds that it took."""
    start = time.perf_counter()
    return worker.run(method, slug), time.perf_counter() - start
