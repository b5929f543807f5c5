"""Stages of nano's training: each has a time budget, and resumes after an interruption."""

import csv
import functools
import json
import operator
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from safetensors.numpy import load_file, save_file

from experiments.common.training import gradient_step
from glm_edge.writers import write_whole

Tree = Any
Step = Callable[[Tree, Tree, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class Clock:
    """A clock of training minutes across restarts.

    Attributes:
      budget: time budget of the stage in minutes.
    """

    def __init__(self, budget: float, spent: float = 0.0):
        self.budget, self._before, self._started = budget, spent, time.monotonic()

    @property
    def spent(self) -> float:
        """Elapsed minutes."""
        return self._before + (time.monotonic() - self._started) / 60

    @property
    def fraction(self) -> float:
        """Elapsed fraction of the budget, at most 1."""
        return min(self.spent / self.budget, 1.0)


def learning_rate(fraction: float, peak: float, warmup: float = 0.03) -> float:
    """Compute linear warm-up, then cosine decay to 3 % of the peak, by the elapsed fraction."""
    if fraction < warmup:
        return peak * max(fraction / warmup, 0.02)
    progress = (fraction - warmup) / (1 - warmup)
    return peak * (0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * progress)))


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
    minutes: float,
    peak_rate: float,
    state: Tree,
    optimizer: optax.GradientTransformation,
    tasks: dict[str, tuple[Iterator[Any], Step]],
    curriculum: tuple[tuple[float, tuple[str, ...]], ...],
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
    evaluate_every: float = 4.0,
    save_every: float = 1.0,
) -> Tree:
    """Train until the stage's time budget is used.

    Args:
      name: name of the stage; its files are `<name>.safetensors`, `<name>.csv` and `<name>.json`.
      directory: folder of these files; an existing stage is resumed.
      minutes: budget of wall-clock minutes across restarts.
      peak_rate: peak of the learning rate, whose schedule follows the elapsed fraction of the
        budget.
      state: `{"params": …, "heads": …}` to start from.
      optimizer: optimizer from `make_optimizer`.
      tasks: batches and loss `(state, batch, rng) -> (loss, parts)` by name.
      curriculum: pairs `(until, names)`; until that fraction of the time, steps alternate between
        these tasks.
      evaluate: function that measures a state; its values are added to the curve.
      evaluate_every: minutes between measurements.
      save_every: minutes between saved states.

    Returns:
      The trained state.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {suffix: directory / f"{name}.{suffix}" for suffix in ("safetensors", "csv", "json")}
    opt_state = optimizer.init(state)
    progress = {"minutes": 0.0, "step": 0}
    if files["json"].exists():
        progress = json.loads(files["json"].read_text())
        state, opt_state = restore(files["safetensors"], (state, opt_state))
        logging.info("%s resumes at step %d", name, progress["step"])
    steps = {task: jax.jit(_update(loss, optimizer)) for task, (_, loss) in tasks.items()}
    feeds = {task: prefetch(batches) for task, (batches, _) in tasks.items()}
    clock = Clock(minutes, progress["minutes"])
    step, saved, measured = progress["step"], clock.spent, clock.spent
    recent: dict[str, float] = {}

    def record(values: dict[str, float]) -> None:
        row = {"step": step, "minutes": round(clock.spent, 2), **values}
        logging.info("%s %s", name, " ".join(f"{k} {v:.4g}" for k, v in row.items()))
        append_rows(files["csv"], row)

    while clock.spent < minutes:
        pattern = next(names for until, names in curriculum if clock.fraction <= until)
        task = pattern[step % len(pattern)]
        opt_state.hyperparams["rate"] = jnp.float32(learning_rate(clock.fraction, peak_rate))
        key = jax.random.fold_in(jax.random.key(0), step)
        state, opt_state, parts = steps[task](state, opt_state, next(feeds[task]), key)
        step += 1
        for part, value in parts.items():
            label = f"{task}.{part}"
            recent[label] = 0.95 * recent.get(label, float(value)) + 0.05 * float(value)
        if clock.spent - saved > save_every:
            saved = clock.spent
            save(files, (state, opt_state), {"minutes": clock.spent, "step": step})
        if clock.spent - measured > evaluate_every:
            measured = clock.spent
            record({**recent, **(evaluate(state) if evaluate else {})})
    record({**recent, **(evaluate(state) if evaluate else {})})
    save(files, (state, opt_state), {"minutes": clock.spent, "step": step})
    return state


def _update(loss: Step, optimizer: optax.GradientTransformation):
    def update(state: Tree, opt_state: Tree, batch: Any, rng: jax.Array):
        state, opt_state, _, parts = gradient_step(loss, optimizer, state, opt_state, batch, rng)
        return state, opt_state, parts

    return update


def prefetch(batches: Iterator[Any], ahead: int = 3) -> Iterator[Any]:
    """Draw batches in a thread, a few in advance."""
    queue: Queue = Queue(ahead)

    def fill() -> None:
        for batch in batches:
            queue.put(batch)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield queue.get()


def save(files: dict[str, Path], tree: Tree, progress: dict[str, float]) -> None:
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
