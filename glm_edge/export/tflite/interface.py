"""Comparing the signatures of an exported file with what its description says they are."""

from collections.abc import Iterable
from pathlib import Path

from glm_edge.configs import GLMConfig
from glm_edge.errors import ExportError, GlmEdgeError
from glm_edge.export.common.signatures import DECODE, signatures, step_name
from glm_edge.export.tflite.file import DAMAGE
from glm_edge.export.tflite.reader import Graph, Tensor, read_graphs
from glm_edge.models.multimodal import MultimodalGLM

CACHE = "kv_cache_"


def checked_graphs(
    path: str | Path,
    config: GLMConfig,
    prefill_lengths: Iterable[int],
    cache_slots: int,
    prefill_logits: bool,
    attended_slots: Iterable[int] = (),
) -> dict[str, Graph]:
    """Reads a file's signatures and compares them with those of its own description.

    Args:
      path: the file.
      config: of the model, as its description says.
      prefill_lengths: as its description says.
      cache_slots: as its description says.
      prefill_logits: as its description says.
      attended_slots: as its description says.

    Returns:
      The signatures by name.

    Raises:
      ExportError: the file is damaged, or its description is not of these signatures.
    """
    graphs = {graph.name: graph for graph in read_graphs(path)}
    lengths, attended = list(prefill_lengths), list(attended_slots)
    try:
        _check_sizes(graphs, config, lengths, attended)
        expected = expected_tensors(config, lengths, cache_slots, prefill_logits, attended)
        for name, (inputs, outputs) in expected.items():
            _compare(graphs[name].inputs, inputs, f"inputs of {name}")
            _compare(graphs[name].outputs, outputs, f"outputs of {name}")
    except (*DAMAGE, GlmEdgeError) as error:
        raise ExportError(
            f"{path}: damaged: its description does not fit its signatures: {error}"
        ) from error
    return graphs


def expected_tensors(
    config: GLMConfig,
    prefill_lengths: Iterable[int],
    cache_slots: int,
    prefill_logits: bool,
    attended_slots: Iterable[int] = (),
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What the signatures of an exported model take and give, see `trace.signatures`.

    Returns:
      Name of a signature to `(inputs, outputs)`, by name.
    """
    found, model = {}, MultimodalGLM(config)
    offered = signatures(model, prefill_lengths, cache_slots, prefill_logits, attended_slots)
    for signature in offered:
        inputs = {
            name: Tensor("", struct.dtype.name, tuple(struct.shape))
            for name, struct in signature.inputs.items()
        }
        scored = prefill_logits or signature.name.startswith(DECODE)
        found[signature.name] = inputs, _outputs(signature.name, inputs, config, scored)
    return found


def _check_sizes(
    graphs: dict[str, Graph], config: GLMConfig, lengths: list[int], attended: list[int]
) -> None:
    """Refuses counts that would take long to list before anything is compared."""
    caches = sum(name.startswith(f"{CACHE}k_") for name in graphs[DECODE].inputs)
    if config.decoder.num_layers != caches:
        raise ValueError(f"{config.decoder.num_layers} layers, caches of {caches}")
    missing = [length for length in lengths if step_name(length) not in graphs]
    if missing or len(set(lengths)) != len(lengths):
        raise ValueError(f"prefill lengths {lengths[:8]}")
    missing = [slots for slots in attended if step_name(1, slots) not in graphs]
    if missing or len(set(attended)) != len(attended):
        raise ValueError(f"attended slots {attended[:8]}")


def _outputs(
    name: str, inputs: dict[str, Tensor], config: GLMConfig, scored: bool
) -> dict[str, Tensor]:
    width = config.decoder.hidden_size
    if name == "vision":
        return {"features": Tensor("", "float32", (1, config.vision.num_tokens, width))}
    if name == "speech":
        return {"features": Tensor("", "float32", (1, config.speech.num_tokens, width))}
    if "tokens" in inputs:
        return {"embeddings": Tensor("", "float32", (*inputs["tokens"].shape, width))}
    outputs = {name: tensor for name, tensor in inputs.items() if name.startswith(CACHE)}
    if scored:
        length = inputs["input_pos"].shape[0]
        shape = (1, length, config.decoder.vocab_size)
        outputs["logits"] = Tensor("", "float32", shape)
    return outputs


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for name in sorted(found.keys() | expected.keys()):
        have, want = found.get(name), expected.get(name)
        if have is None or want is None or (have.type, have.shape) != (want.type, want.shape):
            raise ValueError(f"{where}: {name}")
