"""Decoding speed in LiteRT of a shape, dense and after the removal of the table."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.bench.export import decoder_of
from experiments.bench.pruning.rows import HEADS, NEURONS
from experiments.bench.runtimes import child as children
from experiments.bench.runtimes.compare import Burst, Quartiles, speedup
from glm_edge.compress.prune.structured import heads_to_keep, neurons_to_keep
from glm_edge.configs import GLMConfig

FORM, BITS = "int8", 8
DENSE, PRUNED = "dense", "pruned"
MULTIPLE = 32


def smaller(config: GLMConfig, heads: float = HEADS, neurons: float = NEURONS) -> GLMConfig:
    """Return the configuration of a uniform decoder after `prune.structured`."""
    decoder = config.decoder
    groups = decoder.num_kv_heads if decoder.num_kv_heads < decoder.num_heads else 1
    num_heads = groups * heads_to_keep(decoder.num_heads // groups, heads)
    width = neurons_to_keep(decoder.intermediate_size, neurons, MULTIPLE)
    decoder = dataclasses.replace(decoder, num_heads=num_heads, intermediate_size=width)
    return dataclasses.replace(config, decoder=decoder)


def decoder_parameters(config: GLMConfig) -> int:
    """Count the parameters of the layers and the last norm."""
    shape = config.decoder
    per_head = shape.head_dim * shape.hidden_size
    attention = 2 * per_head * (shape.num_heads + shape.num_kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return shape.num_layers * layer + shape.hidden_size


def measure(
    shape: str, work: Path, rounds: int, steps: int, context: int, slots: int, threads: int
) -> dict[str, Any]:
    """Write both files with random weights and time their decoding alternately in one run.

    Args:
      shape: name of a preset, or `toy`.
      work: folder for the files, which are removed afterwards.
      rounds: number of bursts per model.
      steps: tokens per burst.
      context: tokens in the cache before a burst.
      slots: number of cache slots.
      threads: number of LiteRT threads.

    Returns:
      `removed` fraction of the decoder's parameters, `milliseconds` per token by model and
      `speedup` (ratios of bursts of one round), each as `[low quartile, median, high quartile]`,
      and `file_bytes` by model.

    Raises:
      ChildError: LiteRT is not installed, or fails.
    """
    dense = decoder_of(shape)
    configs = {DENSE: dense, PRUNED: smaller(dense)}
    specs = {
        name: children.spec_of(
            name,
            FORM,
            work / f"{shape}_{name}.tflite",
            config,
            slots,
            contexts=(context,),
            lengths=(2,),
            threads=threads,
            bits=BITS,
        )
        for name, config in configs.items()
    }
    work.mkdir(parents=True, exist_ok=True)
    engines: dict[str, children.EngineProcess] = {}
    bursts: dict[str, list[Burst]] = {name: [] for name in specs}
    try:
        files = {name: children.prepare(spec)["file_bytes"] for name, spec in specs.items()}
        for name, spec in specs.items():
            engines[name], _ = children.start(spec)
        for turn in range(rounds):
            for name in (DENSE, PRUNED) if turn % 2 else (PRUNED, DENSE):
                seconds = engines[name].burst("decode", context, steps)
                bursts[name].append(Burst(turn, seconds))
    finally:
        for engine in engines.values():
            engine.close()
        for spec in specs.values():
            Path(spec.task.path).unlink(missing_ok=True)
    counts = {name: decoder_parameters(config) for name, config in configs.items()}
    return {
        "shape": shape,
        "removed": 1 - counts[PRUNED] / counts[DENSE],
        "parameters": counts,
        "file_bytes": files,
        "milliseconds": {
            name: _listed(Quartiles.of([1e3 * burst.seconds for burst in samples]))
            for name, samples in bursts.items()
        },
        "speedup": _listed(speedup(bursts[PRUNED], bursts[DENSE])),
        "bursts": {name: [burst.seconds for burst in samples] for name, samples in bursts.items()},
    }


def _listed(quartiles: Quartiles) -> list[float]:
    return [quartiles.low, quartiles.median, quartiles.high]
