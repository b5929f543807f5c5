"""Streaming compression of a checkpoint from disk to disk, one stage at a time."""

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
    """Compress a checkpoint directory to another directory, with one layer in memory at a time.

    For each layer, the function reads parameters, applies every transform of the recipe, writes the
    result as one file, and runs the calibration batches through it. A later layer is therefore
    calibrated on earlier layers after the complete recipe. A chain in memory instead finishes each
    transform before the next one. With several transforms that need calibration, results differ.

    Rerunning the same call resumes an interrupted run and produces byte-identical output. This
    needs the same source, recipe, key, order of batches, kind of processor, versions of jax, and
    count of cores. `rtn`, `hqq`, `gptq` and `sparsegpt` do not depend on cores, see `fixed_order`.
    Other differences raise OutputError, since rounding amplifies differences in the last bits.
    Finished layers are stored next to `output`, in `.<name>.partial`; `output` appears only when it
    is complete. Tokenizer, chat template and processor files of the source are copied.

        report = ge.compress_checkpoint(
            "path/to/checkpoint", "compressed", ge.quantize.rtn("int4-g32", fallback_bits=8)
        )

    Args:
      source: directory for `glm_edge.load`.
      output: directory to create, in the native format.
      recipe: a layer-wise transform (`quantize.*`), or a chain of them.
      calibration: batches, see `glm_edge.compress.batches`; None for transforms without
        calibration.
      rng: jax key; None for transforms without random values.
      progress: True, or a function `progress(stage, done, total)`.
      without: inputs (`images`, `audio`) that calibration intentionally lacks.
      overwrite: replaces an existing checkpoint at `output`.
      extras: further files to copy by name, such as `{"notes.txt": path}`, which override files of
        the source.
      compute: arithmetic of the calibration runs: `float32`, or `bfloat16`, which is several times
        faster on processors that support it.

    Returns:
      The report, also stored in `output` as report.json.

    Raises:
      CheckpointError: the source is damaged, or stored with Orbax.
      RecipeError: a transform needs the complete model, or does not match it.
      DataError: calibration is missing, malformed, or lacks a modality.
      OutputError: `output` exists, is a link, cannot be written, is in use by another process, or
        has an unfinished run with other arguments or from another machine; or the name of an extra
        contains a directory.
    """
    opened = open_lazily(source)
    steps = _steps(recipe, rng)
    rounded: set[str] = set()
    for step in steps:
        step.select(opened.abstract, rounded, opened.model)
    model = opened.model.clone(compute=compute)
    runner = LayerwiseRunner(
        model, steps, Context(calibration, rng, (model, {}), progress, tuple(without))
    )
    copied = read_companions(source) | read_extras(extras)
    with new_directory(Path(output), overwrite, keep=True) as partial:
        _check_job(partial, Path(output), _job(opened, recipe, calibration, rng, without, compute))
        rows, names, before, after = [], [], Totals(), Totals()
        spec: dict[str, Any] = {}
        for index, stage in enumerate(runner.stages):
            file = f"model-{index + 1:05d}-of-{len(runner.stages):05d}.safetensors"
            stage_paths = [path for path in opened.abstract if stage.holds(path)]
            if not stage_paths:
                continue
            leaves = opened.read(stage_paths)
            before.add(leaves)
            done = _finished(partial, file)
            if done is None:
                leaves, stage_rows = runner.compress(stage, leaves)
                described = _write_stage(partial, file, leaves, stage_rows)
            else:
                compressed, stage_rows, described = done
                runner.skip(stage, leaves, compressed)
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
            notes=(*runner.notes, *fallback_notes(rows)),
        )
        _finish(partial, opened, spec, names, report, copied)
    return report


class Totals:
    """Running sums over stages."""

    def __init__(self) -> None:
        self.bytes, self.count = 0, 0

    def add(self, leaves: Leaves) -> None:
        """Add the parameters of a stage."""
        tree = nested(leaves)
        self.bytes += boxes.stored_bytes(tree)
        self.count += boxes.count(tree)


def is_streamable(recipe: Transform) -> bool:
    """Test for a recipe whose transforms all compress one stage at a time."""
    return all(isinstance(step, LayerwiseTransform) for step in recipe.steps_in_order)


def _steps(recipe: Transform, rng: Array | None) -> list[BoundTransform]:
    chained = isinstance(recipe, Chain)
    bound = []
    for index, inner in enumerate(recipe.steps_in_order):
        if not isinstance(inner, LayerwiseTransform):
            raise RecipeError(
                f"{inner.name} needs the whole model in memory; load the checkpoint and call the "
                "recipe, or remove this transform"
            )
        key = jax.random.fold_in(rng, index) if chained and rng is not None else rng
        bound.append(BoundTransform(inner, key))
    if not bound:
        raise RecipeError("the recipe is empty: there is nothing to do")
    return bound


# Transforms whose sums have the same order on any count of cores.
_BY_ROW, _BY_COLUMN = ("quantize.rtn", "quantize.hqq"), ("quantize.gptq", "prune.sparsegpt")


def fixed_order(recipe: Transform) -> bool:
    """Test for a recipe whose float32 results have the same bytes on any count of cores."""

    def fixed(step: Transform) -> bool:
        format = getattr(step, "format", None)
        group_size = None if format is None else format.group_size
        if group_size == PER_TENSOR:
            return False
        if step.name in _BY_ROW:
            return True
        # LAPACK refits scales of large groups, and all scales without sweeps.
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
    """List all arguments and conditions that determine the bytes of the result."""
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
                f"{partial}: has an unfinished run with another {name}{difference(stored, job)}; "
                "repeat its arguments on its machine to finish it, or remove the directory to "
                f"restart {output.name}"
            )


def _write_stage(partial: Path, file: str, leaves: Leaves, rows: list[Row]) -> dict[str, Any]:
    """Write the result of a stage; the file of arrays is written last and marks it as finished."""
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
