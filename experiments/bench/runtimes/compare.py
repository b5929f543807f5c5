"""Comparison of alternating bursts: medians with quartiles, ratios of paired bursts, goals."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.bench.runtimes.child import Spec

REFERENCE = "llama.cpp"
# Goals: smallest decoding speed relative to llama.cpp at the same bits, and smallest fraction of
# the bandwidth limit.
TIMES_LLAMA = {8: 1.2, 4: 1.2, 2: 2.0}
OF_LIMIT = {8: 0.84, 4: 0.73, 2: 0.50}
TIMES_ONNXRUNTIME = {"decode": 1.3, "prefill": 4.0}


class Burst(NamedTuple):
    """One burst of an engine.

    Attributes:
      turn: index of the round, unique across groups.
      seconds: seconds per decoding step (median of the burst), or of a prompt.
    """

    turn: int
    seconds: float


Bursts = dict[str, list[Burst]]


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Quartiles":
        """Return the quartiles of some values."""
        low, median, high = np.quantile(np.asarray(values, np.float64), [0.25, 0.5, 0.75])
        return Quartiles(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.low)}-{shown(self.high)})"


def shown(value: float | None) -> str:
    """Format a number with three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def speedup(ours: Sequence[Burst], theirs: Sequence[Burst]) -> Quartiles | None:
    """Compute ratios of two engines' times, pairing bursts of the same rounds.

    Engines that were never resident together are compared by their medians. The result is None if
    an engine has no bursts.
    """
    if not ours or not theirs:
        return None
    other = {burst.turn: burst.seconds for burst in theirs}
    pairs = [other[b.turn] / b.seconds for b in ours if b.turn in other]
    if pairs:
        return Quartiles.of(pairs)
    ratio = statistics.median(b.seconds for b in theirs) / statistics.median(
        b.seconds for b in ours
    )
    return Quartiles(ratio, ratio, ratio)


def of_limit(
    bursts: Sequence[Burst], weight_bytes: int, bandwidth: Mapping[int, float]
) -> Quartiles:
    """Compute the time of reading the weights as a fraction of a step of the same round."""
    return Quartiles.of([weight_bytes / bandwidth[b.turn] / b.seconds for b in bursts])


def phase_rows(
    phase: str,
    specs: Sequence[Spec],
    samples: Mapping[str, Bursts],
    engines: Mapping[str, Mapping[str, Any]],
    bandwidth: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Return one row per engine that ran a phase.

    Args:
      phase: phase, such as `decode 128` or `prefill 512`.
      specs: specs of the engines.
      samples: bursts by engine and phase.
      engines: properties of each engine, with `weight_bytes`.
      bandwidth: bytes per second by round.

    Returns:
      Rows with quartiles as `[low, median, high]`.
    """
    kind, count = phase.split()
    rows = []
    for spec in specs:
        bursts = samples.get(spec.name, {}).get(phase)
        if not bursts:
            continue
        tokens = int(count) if kind == "prefill" else 1
        row: dict[str, Any] = {
            "engine": spec.name,
            "bits": spec.bits,
            "ms": _listed(Quartiles.of([1e3 * b.seconds for b in bursts])),
            "tokens_per_second": _listed(Quartiles.of([tokens / b.seconds for b in bursts])),
        }
        if kind == "decode":
            weights = engines[spec.name]["weight_bytes"]
            row["of_limit"] = _listed(of_limit(bursts, weights, bandwidth))
        row["times_llama"] = {
            other.name.removeprefix(f"{REFERENCE} "): _listed(ratio)
            for other in specs
            if other.family == REFERENCE and other.bits == spec.bits and other is not spec
            if (ratio := speedup(bursts, samples.get(other.name, {}).get(phase, [])))
        }
        rows.append(row)
    return rows


def _listed(quartiles: Quartiles) -> list[float]:
    return [quartiles.low, quartiles.median, quartiles.high]


def goals(
    specs: Sequence[Spec],
    phases: Sequence[str],
    samples: Mapping[str, Bursts],
    engines: Mapping[str, Mapping[str, Any]],
    bandwidth: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Compare the speed of glm_edge's files with the goals.

    Returns:
      Rows with `phase`, `engine`, `beside`, `wanted`, `found` as `[low, median, high]`, `reached`.
    """
    rows = []

    def add(phase: str, spec: Spec, beside: str, wanted: float, value: Quartiles | None) -> None:
        if value is None:
            return
        rows.append(
            {
                "phase": phase,
                "engine": spec.name,
                "beside": beside,
                "wanted": wanted,
                "found": _listed(value),
                "reached": value.median >= wanted,
            }
        )

    for phase in phases:
        kind = phase.split()[0]
        for spec in specs:
            bursts = samples.get(spec.name, {}).get(phase, [])
            if spec.family != "ours" or spec.bits not in TIMES_LLAMA or not bursts:
                continue
            for other in specs:
                if other.bits != spec.bits:
                    continue
                ratio = speedup(bursts, samples.get(other.name, {}).get(phase, []))
                if other.family == REFERENCE and kind == "decode":
                    add(phase, spec, other.name, TIMES_LLAMA[spec.bits], ratio)
                if other.family == "onnxruntime":
                    add(phase, spec, other.name, TIMES_ONNXRUNTIME[kind], ratio)
            if kind == "decode":
                limit = of_limit(bursts, engines[spec.name]["weight_bytes"], bandwidth)
                add(phase, spec, "bandwidth limit", OF_LIMIT[spec.bits], limit)
    return rows


def figure(rows: Mapping[str, Sequence[Mapping[str, Any]]], path: Any) -> None:
    """Draw tokens per second of every engine, with one panel per phase.

    Args:
      rows: rows of `phase_rows` by phase.
      path: path of the PNG file.
    """
    from glm_edge.errors import require

    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    names = list(dict.fromkeys(row["engine"] for phase in rows.values() for row in phase))
    canvas, axes = pyplot.subplots(
        1,
        len(rows),
        figsize=(3.4 * len(rows) + 1.4, 0.28 * len(names) + 1.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = dict(zip(dict.fromkeys(name.split()[0] for name in names), COLORS, strict=False))
    for axis, (phase, engines) in zip(axes.flat, rows.items(), strict=True):
        places = [names.index(row["engine"]) for row in engines]
        speeds = np.array([row["tokens_per_second"] for row in engines]).T
        error = np.abs(speeds[[0, 2]] - speeds[1])
        axis.barh(
            places,
            speeds[1],
            xerr=error,
            color=[colors[row["engine"].split()[0]] for row in engines],
        )
        axis.set(title=phase, xlabel="tokens/s")
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)


COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
