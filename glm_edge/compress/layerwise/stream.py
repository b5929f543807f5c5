"""Compressing a checkpoint that need not fit in memory, one stage at a time, from disk to disk."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.checkpoint import native
from glm_edge.checkpoint.companions import read_companions
from glm_edge.checkpoint.lazy import LazyCheckpoint, open_lazily
from glm_edge.checkpoint.load import read_extras
from glm_edge.checkpoint.safetensors import SafetensorsFile, to_device, write_safetensors
from glm_edge.compress.distill.state import calibration_digest, difference, machine
from glm_edge.compress.layerwise.runner import (
    BoundTransform,
    LayerwiseRunner,
    LayerwiseTransform,
    fallback_notes,
)
from glm_edge.compress.layerwise.stages import Leaves
from glm_edge.compress.quantize.solvers.gptq_solver import SEARCHED
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import Batch, Chain, Context, Progress, Transform, to_json
from glm_edge.errors import OutputError, RecipeError
from glm_edge.files import CONFIG, read_json
from glm_edge.params.formats import PER_TENSOR
from glm_edge.params.tree import nested
from glm_edge.writers import new_directory, write_json, write_whole

REPORT = "report.json"
_JOB = "job.json"


def compress_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    recipe: Transform,
    calibration: Sequence[Batch] | None = None,
    rng: Array | None = None,
    progress: Progress | bool | None = None,
    without: Sequence[str] = (),
    overwrite: bool = False,
    extras: Mapping[str, str | os.PathLike] | None = None,
    compute: str = "float32",
) -> Report:
    """Compresses a checkpoint directory into another, holding one layer in memory at a time.

    Layer by layer, parameters are read, every transform of the recipe is applied, the result is
    written as one file, and the calibration batches are run through it. A later layer is therefore
    calibrated on what all earlier ones give after the whole recipe, whereas a chain in memory
    finishes a transform before the next begins: with several transforms that read calibration, the
    numbers of the two differ.

    A run that was killed is taken up again by the same call, and its result has the same bytes: of
    the same source, recipe, key and batches in the same order, on the same kind of processor,
    under the same versions of jax, and on the same number of cores; `rtn`, `hqq`, `gptq` and
    `sparsegpt` take sums in an order that does not depend on the cores, see `fixed_order`.
    Elsewhere the call is refused, since last bits of sums may differ there and rounding makes them
    large. What a run has finished lies beside `output`, in `.<name>.partial`; `output` itself
    appears only when all is written. Tokenizer, chat template and the other files that the source
    needs to read text, images and sound are copied.

    Args:
      source: directory that `glm_edge.load` opens.
      output: directory to create, in this library's format.
      recipe: a stage-wise transform (`quantize.*`), or a chain of them.
      calibration: batches, see `glm_edge.compress.batches`; None where no transform needs them.
      rng: jax key; None where nothing is drawn.
      progress: True, or called as `progress(stage, done, total)`.
      without: inputs (`images`, `audio`) that calibration is known to lack.
      overwrite: replaces an existing checkpoint at `output`.
      extras: further files to copy by name, such as `{"notes.txt": path}`; they win over the
        source's.
      compute: `float32`, or `bfloat16` products while calibration runs through the layers, several
        times faster where the processor has them.

    Returns:
      The report, which also lies in `output` as report.json.

    Raises:
      CheckpointError: the source is damaged, or stored with Orbax.
      RecipeError: a transform needs the whole model, or does not fit it.
      DataError: calibration is missing, malformed, or lacks a modality.
      OutputError: `output` exists, is a link, cannot be written, is written by another process, or
        an unfinished run of other arguments or of another machine lies beside it; or an extra has
        no plain name.
    """
    opened = open_lazily(source)
    steps = _steps(recipe, rng)
    rounded: set[str] = set()
    for step in steps:
        step.select(opened.abstract, rounded, opened.model)
    model = opened.model.clone(compute=compute)
    walk = LayerwiseRunner(
        model, steps, Context(calibration, rng, (model, {}), progress, tuple(without))
    )
    copied = read_companions(source) | read_extras(extras)
    with new_directory(Path(output), overwrite, keep=True) as partial:
        _check_job(partial, Path(output), _job(opened, recipe, calibration, rng, without, compute))
        rows, names, before, after = [], [], Totals(), Totals()
        spec: dict[str, Any] = {}
        for index, stage in enumerate(walk.stages):
            file = f"model-{index + 1:05d}-of-{len(walk.stages):05d}.safetensors"
            mine = [path for path in opened.abstract if stage.holds(path)]
            if not mine:
                continue
            leaves = opened.read(mine)
            before.add(leaves)
            done = _finished(partial, file)
            if done is None:
                leaves, stage_rows = walk.compress(stage, leaves)
                described = _write_stage(partial, file, leaves, stage_rows)
            else:
                compressed, stage_rows, described = done
                walk.skip(stage, leaves, compressed)
                leaves = compressed
            after.add(leaves)
            names.append(file)
            spec |= described
            rows += stage_rows
        report = Report(
            tuple(rows),
            before.bytes,
            after.bytes,
            before.count,
            after.count,
            notes=(*walk.notes, *fallback_notes(rows)),
        )
        _finish(partial, opened, spec, names, report, copied)
    return report


class Totals:
    """Running sums over stages."""

    def __init__(self) -> None:
        self.bytes, self.count = 0, 0

    def add(self, leaves: Leaves) -> None:
        """Adds the parameters of a stage."""
        tree = nested(leaves)
        self.bytes += boxes.stored_bytes(tree)
        self.count += boxes.count(tree)


def is_streamable(recipe: Transform) -> bool:
    """True where every transform of a recipe acts on one stage at a time."""
    return all(isinstance(step, LayerwiseTransform) for step in recipe.steps_in_order)


def _steps(recipe: Transform, rng: Array | None) -> list[BoundTransform]:
    chained = isinstance(recipe, Chain)
    bound = []
    for index, inner in enumerate(recipe.steps_in_order):
        if not isinstance(inner, LayerwiseTransform):
            raise RecipeError(
                f"{inner.name} needs the whole model in memory; load the checkpoint and call the "
                "recipe, or leave this transform out"
            )
        key = jax.random.fold_in(rng, index) if chained and rng is not None else rng
        bound.append(BoundTransform(inner, key))
    if not bound:
        raise RecipeError("the recipe is empty: there is nothing to do")
    return bound


# Transforms whose sums are taken in one order on any number of cores.
_BY_ROW, _BY_COLUMN = ("quantize.rtn", "quantize.hqq"), ("quantize.gptq", "prune.sparsegpt")


def fixed_order(recipe: Transform) -> bool:
    """True for a recipe whose float32 results have the same bytes on any number of cores."""

    def fixed(step: Transform) -> bool:
        format = getattr(step, "format", None)
        group_size = None if format is None else format.group_size
        if group_size == PER_TENSOR:
            return False
        if step.name in _BY_ROW:
            return True
        # Scales of large groups, and of any without sweeps, are refit by LAPACK.
        solver = getattr(step, "solver", None)
        searched = group_size is None or (solver and solver.sweeps and group_size <= SEARCHED)
        return step.name in _BY_COLUMN and bool(searched)

    return all(map(fixed, recipe.steps_in_order))


def _job(
    opened: LazyCheckpoint,
    recipe: Transform,
    calibration: Sequence[Batch] | None,
    rng: Array | None,
    without: Sequence[str],
    compute: str,
) -> dict[str, Any]:
    """Lists all that determines the bytes of the result."""
    return {
        "source": opened.fingerprint(),
        "recipe": json.loads(to_json(recipe)),
        "calibration": calibration_digest(() if calibration is None else calibration),
        "rng": None if rng is None else np.asarray(jax.random.key_data(rng)).tolist(),
        "without": sorted(without),
        "compute": compute,
        "machine": machine(fixed_order(recipe) and compute == "float32"),
    }


def _check_job(partial: Path, output: Path, job: dict[str, Any]) -> None:
    job_file = partial / _JOB
    if not job_file.exists() or not any(partial.glob("*.safetensors")):
        write_whole(job_file, lambda path: write_json(path, job))
        return
    stored = read_json(job_file)
    for name, value in job.items():
        if stored.get(name) != value:
            raise OutputError(
                f"{partial}: holds an unfinished run with another {name}{difference(stored, job)}; "
                "repeat its arguments where it ran to finish it, or remove the directory to begin "
                f"{output.name} anew"
            )


def _write_stage(partial: Path, file: str, leaves: Leaves, rows: list[Row]) -> dict[str, Any]:
    """Writes what came of a stage; the file of arrays comes last and marks it as finished."""
    arrays, spec = boxes.to_flat(nested(leaves))
    notes = {"spec": spec, "rows": [asdict(row) for row in rows]}
    write_whole(partial / f"{file}.json", lambda path: write_json(path, notes))
    write_whole(partial / file, lambda path: write_safetensors(path, arrays))
    return spec


def _finished(partial: Path, file: str) -> tuple[Leaves, list[Row], dict[str, Any]] | None:
    if not (partial / file).exists() or not (partial / f"{file}.json").exists():
        return None
    notes, tensors = read_json(partial / f"{file}.json"), SafetensorsFile(partial / file)
    arrays = {name: to_device(tensors.read(name)) for name in tensors.tensors}
    leaves = dict(boxes.path_items(boxes.from_flat(arrays, notes["spec"])))
    return leaves, [Row(**row) for row in notes["rows"]], notes["spec"]


def _finish(
    partial: Path,
    opened: LazyCheckpoint,
    spec: dict[str, Any],
    names: list[str],
    report: Report,
    extras: dict[str, bytes],
) -> None:
    for name, content in extras.items():
        (partial / name).write_bytes(content)
    write_json(partial / REPORT, asdict(report))
    fields = native.describe(opened.model, spec)
    write_whole(partial / CONFIG, lambda path: write_json(path, {**fields, "files": names}))
    for left_over in {path.name for path in partial.iterdir()} - {*names, *extras, REPORT, CONFIG}:
        (partial / left_over).unlink()
