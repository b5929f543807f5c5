"""Compares a checkpoint with the reference outputs stored beside it, one row per output.

    python -m experiments.check_golden --golden_dir=DIR --case=glm_edge

Without the flag, the environment variable GLM_EDGE_GOLDEN names the folder.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import glm_edge as ge
from glm_edge.errors import DataError, GlmEdgeError
from glm_edge.models.glm import init_cache

GOLDEN = flags.DEFINE_string(
    "golden_dir",
    os.environ.get("GLM_EDGE_GOLDEN") or "../shared/golden",
    "Folder with one folder a case.",
)
CASE = flags.DEFINE_string("case", "glm_edge", "Name of the case.")


@dataclass(frozen=True)
class Row:
    """One compared output.

    Attributes:
      name: `<subcase>.<output>`.
      error: largest absolute difference, or number of tokens that differ.
      tolerance: largest allowed.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True within the tolerance; a NaN fails."""
        return self.error <= self.tolerance


def compare(case: Path) -> list[Row]:
    """Runs a text case and compares what its outputs hold.

    Args:
      case: folder with a checkpoint, inputs.npz, outputs.npz and meta.json.

    Returns:
      A row per output: hidden states, logits, greedy tokens and their logits.

    Raises:
      DataError: the folder is not a case.
      GlmEdgeError: its checkpoint cannot be loaded.
    """
    try:
        meta = json.loads((case / "meta.json").read_text())
        inputs, outputs = np.load(case / "inputs.npz"), np.load(case / "outputs.npz")
    except (OSError, ValueError) as error:
        raise DataError(f"{case}: not a reference case: {error}") from error
    model, params = ge.load(case)
    rows = []
    for subcase in meta["subcases"]:
        tokens = inputs[f"{subcase}.input_ids"]
        valid = inputs[f"{subcase}.attention_mask"].astype(bool)
        found = forward(model, params, tokens, valid)
        found |= greedy(model, params, tokens, valid, outputs[f"{subcase}.greedy_ids"].shape[1])
        for name, value in found.items():
            expected = outputs[f"{subcase}.{name}"]
            if name == "greedy_ids":
                rows.append(Row(f"{subcase}.{name}", float((value != expected).sum()), 0.0))
                continue
            noise = meta["fp32_vs_fp64_max_abs"][name.replace("greedy_logits", "logits")]
            difference = np.abs(value - expected)
            if not name.startswith("greedy"):
                difference = difference[valid]
            rows.append(Row(f"{subcase}.{name}", float(difference.max()), 1e-4 + 10 * noise))
    return rows


def forward(
    model: ge.MultimodalGLM, params: dict, tokens: np.ndarray, valid: np.ndarray
) -> dict[str, np.ndarray]:
    """Hidden states and logits of a left-padded batch, by the reference's names.

    Args:
      model: a text model.
      params: its parameters.
      tokens: [B, T].
      valid: bool [B, T], False at padding.

    Returns:
      `logits` [B, T, V], `hidden.embed`, `hidden.layer<i>`, `hidden.final` [B, T, D].
    """
    causal = np.tril(np.ones((tokens.shape[1], tokens.shape[1]), bool))
    logits, aux = jax.jit(model.apply)(
        {"params": params},
        tokens,
        positions=_positions(valid),
        mask=(causal & valid[:, None])[:, None],
    )
    names = ["embed", *(f"layer{i}" for i in range(len(aux["hidden"]) - 1))]
    found = {f"hidden.{name}": np.asarray(x) for name, x in zip(names, aux["hidden"], strict=True)}
    return found | {"hidden.final": np.asarray(aux["final"]), "logits": np.asarray(logits)}


def greedy(
    model: ge.MultimodalGLM, params: dict, tokens: np.ndarray, valid: np.ndarray, steps: int
) -> dict[str, np.ndarray]:
    """Continues a left-padded batch with the most likely tokens, through the cache.

    Args:
      model: a text model.
      params: its parameters.
      tokens: [B, T].
      valid: bool [B, T], False at padding.
      steps: tokens to add.

    Returns:
      `greedy_ids` [B, steps] and `greedy_logits` [B, steps, V].
    """
    batch, length = tokens.shape
    slots = length + steps
    seen = np.concatenate([valid, np.ones((batch, steps), bool)], axis=1)
    causal = np.tril(np.ones((slots, slots), bool))
    mask = (causal & seen[:, None])[:, None]
    positions = _positions(seen)
    apply = jax.jit(model.apply)
    cache = init_cache(model.config.decoder, batch, slots)
    ids, scores, start = [], [], 0
    for end in range(length, slots):
        logits, aux = apply(
            {"params": params},
            tokens,
            positions=positions[:, start:end],
            mask=mask[:, :, start:end],
            cache=cache,
        )
        cache, start = aux["cache"], end
        scores.append(np.asarray(logits[:, -1]))
        ids.append(scores[-1].argmax(-1))
        tokens = jnp.asarray(ids[-1][:, None], jnp.int32)
    return {"greedy_ids": np.stack(ids, 1), "greedy_logits": np.stack(scores, 1)}


def _positions(valid: np.ndarray) -> np.ndarray:
    return np.maximum(np.cumsum(valid, axis=1) - 1, 0)


def main(_: list[str]) -> None:
    """Prints the table; exits with 1 when an output is off, with 2 when there is no case."""
    try:
        rows = compare(Path(GOLDEN.value) / CASE.value)
    except GlmEdgeError as error:
        print(f"check_golden: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{'output':<24} {'max |error|':>12} {'tolerance':>12}")
    for row in rows:
        verdict = "ok" if row.passed else "OFF"
        print(f"{row.name:<24} {row.error:>12.3e} {row.tolerance:>12.3e}  {verdict}")
    if not all(row.passed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
