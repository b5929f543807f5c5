"""Comparison of the signatures of a `.tflite` file with its description."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from glm_edge.configs import GLMConfig
from glm_edge.errors import ExportError, GlmEdgeError
from glm_edge.export.common.interface import CACHE, Tensor, expected_tensors
from glm_edge.export.common.parsing import PARSE_ERRORS
from glm_edge.export.common.sizes import DECODE, all_lengths, step_name
from glm_edge.export.tflite.reader import Graph, read_graphs


def checked_graphs(
    path: str | Path,
    config: GLMConfig,
    prefill_lengths: Iterable[int],
    cache_slots: int,
    prefill_logits: bool,
    attended_slots: Iterable[int] = (),
    forced_lengths: Iterable[int] = (),
) -> dict[str, Graph]:
    """Read a file's signatures and compare them with its description.

    Args:
      path: path of the file.
      config: configuration of the model, from the description.
      prefill_lengths: token counts of the prefill signatures, from the description.
      cache_slots: number of cache slots, from the description.
      prefill_logits: whether prefill returns logits of every token, from the description.
      attended_slots: slot counts that signatures attend to, from the description.
      forced_lengths: token counts of the signatures with logits of their last token, from the
        description.

    Returns:
      The signatures by name.

    Raises:
      ExportError: the file is damaged, or its description does not match its signatures.
    """
    graphs = {graph.name: graph for graph in read_graphs(path)}
    lengths, attended, forced = list(prefill_lengths), list(attended_slots), list(forced_lengths)
    try:
        _check_sizes(graphs, config, lengths, attended, forced)
        expected = expected_tensors(config, lengths, cache_slots, prefill_logits, attended, forced)
        for name, (inputs, outputs) in expected.items():
            _compare(graphs[name].inputs, inputs, f"inputs of {name}")
            _compare(graphs[name].outputs, outputs, f"outputs of {name}")
    except (*PARSE_ERRORS, GlmEdgeError) as error:
        raise ExportError(
            f"{path}: damaged: its description does not match its signatures: {error}"
        ) from error
    return graphs


def _check_sizes(
    graphs: dict[str, Graph],
    config: GLMConfig,
    lengths: list[int],
    attended: list[int],
    forced: list[int],
) -> None:
    """Reject counts that would take long to list."""
    caches = sum(name.startswith(f"{CACHE}k_") for name in graphs[DECODE].inputs)
    if config.decoder.num_layers != caches:
        raise ValueError(f"{config.decoder.num_layers} layers, caches of {caches}")
    for name, counts in (("prefill", lengths), ("forced", forced)):
        missing = [count for count in all_lengths(counts, ()) if step_name(count) not in graphs]
        if missing or len(set(counts)) != len(counts):
            raise ValueError(f"{name} lengths {counts[:8]}")
    missing = [slots for slots in attended if step_name(1, slots) not in graphs]
    if missing or len(set(attended)) != len(attended):
        raise ValueError(f"attended slots {attended[:8]}")


def _compare(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    for name in sorted(stored.keys() | expected.keys()):
        ours, theirs = expected.get(name), stored.get(name)
        if not ours or not theirs or (ours.type, ours.shape) != (theirs.type, theirs.shape):
            raise ValueError(f"{where}: {name}")
