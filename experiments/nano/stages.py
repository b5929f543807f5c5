"""Stages of nano's training: each has a budget of steps, and resumes after an interruption.

The rate, the task and the batch of a step depend on its number and the seed only. So a run on a
busy machine, or after interruptions, takes the same steps.
"""

import csv
import dataclasses
import functools
import json
import operator
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from safetensors.numpy import load_file, save_file

from glm_edge.errors import DataError
from glm_edge.writers import write_whole

Tree = Any
Draw = Callable[[np.random.Generator], Any]
Loss = Callable[[Tree, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def learning_rate(fraction: float, peak: float, warmup: float = 0.03) -> float:
    """Compute linear warm-up, then cosine decay to 3 % of the peak, by the fraction of steps."""
    if fraction < warmup:
        return peak * max(fraction / warmup, 0.02)
    progress = (fraction - warmup) / (1 - warmup)
    return peak * (0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * progress)))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The budget of a stage and what depends on it.

    Args:
      steps: number of steps.
      peak_rate: peak of the learning rate.
      curriculum: pairs `(until, names)`; until that fraction of the steps, steps alternate between
        these tasks. None for a stage of one task.
      seed: seed of batches and of random values in the losses.
      evaluate_every: steps between measurements.
      save_minutes: minutes between saved states.
    """

    steps: int
    peak_rate: float
    curriculum: tuple[tuple[float, tuple[str, ...]], ...] | None = None
    seed: int = 0
    evaluate_every: int = 500
    save_minutes: float = 1.0

    def task(self, step: int, tasks: Sequence[str]) -> str:
        """Return the name of the task of a step.

        Args:
          step: number of the step, from zero.
          tasks: names of all tasks.
        """
        curriculum = self.curriculum or ((1.0, tuple(tasks)),)
        names = next(names for until, names in curriculum if step <= until * self.steps)
        return names[step % len(names)]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(step / self.steps, self.peak_rate)

    def random(self, name: str, step: int) -> np.random.Generator:
        """Return the random generator of a stage's batch."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode()), step])


def make_optimizer(
    weight_decay: float, scale_of: Callable[[str], float]
) -> optax.GradientTransformation:
    """Make AdamW with clipping at norm 1 and a mutable learning rate; `scale_of` scales parts.

    Args:
      weight_decay: applied to matrices only.
      scale_of: function from the first component of a parameter's path to a factor of its update.
    """

    def slow_down(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        del params
        scaled = {
            group: {
                name: jax.tree.map(functools.partial(operator.mul, scale_of(name)), part)
                for name, part in parts.items()
            }
            for group, parts in updates.items()
        }
        return scaled, state

    def build(rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                rate,
                b2=0.98,
                weight_decay=weight_decay,
                mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            ),
            optax.GradientTransformation(lambda params: optax.EmptyState(), slow_down),
        )

    return optax.inject_hyperparams(build)(rate=0.0)


def run_stage(
    name: str,
    directory: Path,
    schedule: Schedule,
    state: Tree,
    optimizer: optax.GradientTransformation,
    tasks: dict[str, tuple[Draw, Loss]],
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
) -> Tree:
    """Train until the stage's steps are done.

    Args:
      name: name of the stage; its files are `<name>.safetensors`, `<name>.csv` and `<name>.json`.
      directory: folder of these files; an existing stage is resumed.
      schedule: budget, rates and order of the tasks.
      state: `{"params": …, "heads": …}` to start from.
      optimizer: optimizer from `make_optimizer`.
      tasks: function that draws a batch, and loss `(state, batch, rng) -> (loss, parts)`, by name.
      evaluate: function that measures a state; its values are added to the curve.

    Returns:
      The trained state.

    Raises:
      DataError: the directory contains a run of the stage with another number of steps or seed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {suffix: directory / f"{name}.{suffix}" for suffix in ("safetensors", "csv", "json")}
    opt_state = optimizer.init(state)
    progress = {"minutes": 0.0, "step": 0, "steps": schedule.steps, "seed": schedule.seed}
    if files["json"].exists():
        progress = _resumed(files["json"], schedule)
        state, opt_state = restore(files["safetensors"], (state, opt_state))
        logging.info("%s resumes at step %d", name, progress["step"])
    first, before, started = progress["step"], progress["minutes"], time.monotonic()
    _truncate_rows(files["csv"], first)
    updates = {task: jax.jit(_update(loss, optimizer)) for task, (_, loss) in tasks.items()}
    recent: dict[str, float] = progress.pop("recent", {})
    saved = started

    def drawn() -> Iterator[tuple[str, Any]]:
        for step in range(first, schedule.steps):
            task = schedule.task(step, list(tasks))
            yield task, tasks[task][0](schedule.random(name, step))

    def record(step: int) -> None:
        values = {**recent, **(evaluate(state) if evaluate else {})}
        row = {"step": step, "minutes": round(minutes(), 2), **values}
        logging.info("%s %s", name, " ".join(f"{k} {v:.4g}" for k, v in row.items()))
        append_rows(files["csv"], row)

    def minutes() -> float:
        return before + (time.monotonic() - started) / 60

    def write(step: int) -> None:
        now = {"minutes": minutes(), "step": step, "recent": recent}
        save(files, (state, opt_state), {**progress, **now})

    for step, (task, batch) in enumerate(prefetch(drawn()), first + 1):
        opt_state.hyperparams["rate"] = jnp.float32(schedule.rate(step - 1))
        key = jax.random.fold_in(jax.random.key(schedule.seed), step)
        state, opt_state, parts = updates[task](state, opt_state, batch, key)
        for part, value in parts.items():
            label = f"{task}.{part}"
            recent[label] = 0.95 * recent.get(label, float(value)) + 0.05 * float(value)
        if step % schedule.evaluate_every == 0 or step == schedule.steps:
            record(step)
        if time.monotonic() - saved > 60 * schedule.save_minutes or step == schedule.steps:
            saved = time.monotonic()
            write(step)
    return state


def _resumed(path: Path, schedule: Schedule) -> dict[str, Any]:
    progress = json.loads(path.read_text())
    for field in ("steps", "seed"):
        if progress.get(field) != (value := getattr(schedule, field)):
            raise DataError(
                f"{path}: this run has {field} {progress.get(field)}, not {value}; use another "
                "directory"
            )
    return progress


def _update(loss: Loss, optimizer: optax.GradientTransformation):
    def update(state: Tree, opt_state: Tree, batch: Any, rng: jax.Array):
        gradient, parts = jax.grad(loss, has_aux=True)(state, batch, rng)
        updates, opt_state = optimizer.update(gradient, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, parts

    return update


def prefetch(batches: Iterator[Any], ahead: int = 4) -> Iterator[Any]:
    """Draw batches in a thread, a few in advance.

    Args:
      batches: source of the batches; an exception of the source is raised here.
      ahead: number of batches in advance.
    """
    queue: Queue = Queue(ahead)
    end = object()

    def fill() -> None:
        try:
            for batch in batches:
                queue.put(batch)
            queue.put(end)
        except Exception as error:
            queue.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (item := queue.get()) is not end:
        if isinstance(item, Exception):
            raise item
        yield item


def save(files: dict[str, Path], tree: Tree, progress: dict[str, Any]) -> None:
    """Write a tree and its progress; replace each file atomically, the progress last."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    arrays = {f"{i:05d}": np.ascontiguousarray(leaf) for i, leaf in enumerate(leaves)}
    write_whole(files["safetensors"], lambda path: save_file(arrays, path))
    write_whole(files["json"], lambda path: path.write_text(json.dumps(progress)))


def restore(path: Path, tree: Tree) -> Tree:
    """Read a tree of the same structure."""
    arrays = load_file(path)
    leaves, structure = jax.tree.flatten(tree)
    read = [arrays[f"{i:05d}"].reshape(np.shape(leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in read])


def append_rows(path: Path, row: dict[str, float]) -> None:
    """Append a row in long form: step, minutes, name, value."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("step", "minutes", "name", "value"))
        for key, value in row.items():
            if key not in ("step", "minutes"):
                writer.writerow((row["step"], row["minutes"], key, f"{value:.5g}"))


def _truncate_rows(path: Path, step: int) -> None:
    """Remove rows of steps that a resumed stage takes again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= step)])
