"""Execution of the rows of the pruning table: pruning, healing, and counting stored bytes."""

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
from experiments.bench.gathered import Gathered, sown_inputs
from experiments.bench.peers import sparsity
from experiments.bench.peers.methods import DECODER, OURS, Method
from experiments.bench.pruning.rows import RESTATED
from glm_edge import params as boxes
from glm_edge.cli.console import progress
from glm_edge.compress import batches
from glm_edge.compress.transform import Context


class Pruned(NamedTuple):
    """A pruned model with boxed masks, and the notes of its reports.

    Attributes:
      model: pruned model, possibly with smaller arrays.
      params: its parameters.
      notes: notes of the reports.
      curve: losses of the last training steps, or None.
    """

    model: Any
    params: Any
    notes: tuple[str, ...] = ()
    curve: dict[str, float] | None = None


class Worker:
    """A worker that prunes and heals one model.

    Args:
      data: the model and its data.
      calibration: batches for scores and reconstruction.
      training: function that makes the batches for healing on first use.
      directory: directory for training states.
      seed: seed of the order of batches.
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
        """Batches for healing."""
        return self._training()

    def run(self, method: Method, slug: str) -> Pruned:
        """Run a row.

        Args:
          method: the row.
          slug: file name of its training state.
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
                # Without recordings there are no spoken questions.
                shares = heal["mixture"].items()
                heal = {**heal, "mixture": {k: share for k, share in shares if k in kinds}}
            # Different options, such as more steps, need a separate training state.
            options = json.dumps([prune, heal], sort_keys=True).encode()
            state = str(self.directory / f"{slug}-{zlib.crc32(options):08x}")
            recipe = {"name": "distill", "options": {**heal, "state_dir": state}}
            transform = ge.recipe_from_json(json.dumps(recipe))
            if transform.alpha:
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
    """Count the parameters and bytes of a pruned decoder.

    Args:
      dense: parameters of the dense model.
      pruned: parameters of the pruned model.

    Returns:
      `removed`, the fraction of the decoder's parameters removed from its arrays; `zeros`, the
      fraction of zeros among the others; `stored_bytes`, masks included; `mask_bytes`; and
      `stored`, the stored bytes as a fraction of the dense decoder's.
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
    """Return float32 parameters without boxes."""
    return boxes.map_with_path(lambda _, leaf: boxes.dense(leaf).astype(jnp.float32), params)


def timed(worker: Worker, method: Method, slug: str) -> tuple[Pruned, float]:
    """Return a row and its seconds."""
    start = time.perf_counter()
    return worker.run(method, slug), time.perf_counter() - start
