"""Outputs of small reference models in transformers, and their rounding."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.golden.cases import Arrays
from experiments.golden.reference_inputs import positions_of
from experiments.golden.reference_plans import EOS, SPECIAL_IDS

GREEDY_STEPS = 16
LEAST_MARGIN = 0.02
Points = dict[str, tuple[torch.nn.Module, bool]]


@torch.no_grad()
def outputs_of(model: torch.nn.Module, inputs: Arrays) -> Arrays:
    """Run a model on the inputs of a subcase in the precision of its weights.

    Args:
      model: model of transformers.
      inputs: arrays by name.

    Returns:
      Outputs by name.
    """
    points, run = _PARTS[type(model).__name__](model)
    recorded: dict[str, torch.Tensor] = {}
    handles = [_record(module, into, name, recorded) for name, (module, into) in points.items()]
    try:
        recorded |= run(_tensors(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.detach().cpu().numpy() for name, value in recorded.items()}


def noise_of(model: torch.nn.Module, inputs: Arrays, outputs: Arrays) -> dict[str, float]:
    """Return the largest difference of each output from float64 at valid tokens.

    Args:
      model: float32 model.
      inputs: arrays by name.
      outputs: outputs from `outputs_of`.

    Returns:
      Differences by name.
    """
    exact = outputs_of(copy.deepcopy(model).double(), inputs)
    mask = inputs.get("attention_mask")
    recorded = {}
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.floating):
            difference = np.abs(value - exact[name])
            if mask is not None and difference.shape[:2] == mask.shape:
                difference = difference[mask == 1]
            recorded[name] = float(difference.max(initial=0.0))
    return recorded


@torch.no_grad()
def greedy(model: torch.nn.Module, inputs: Arrays) -> tuple[Arrays, float] | None:
    """Generate greedily with the cache, and check the result by a complete forward pass.

    Args:
      model: model that generates.
      inputs: inputs of the prompts.

    Returns:
      `(outputs, smallest margin between the first and the second token)`; None if the text contains
      a stop token or a placeholder, or a margin is below `LEAST_MARGIN`.

    Raises:
      RuntimeError: generation and the forward pass disagree.
    """
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, EOS[0]
    tensors = {k: v for k, v in _tensors(model, inputs).items() if k != "position_ids"}
    made = model.generate(
        **tensors,
        do_sample=False,
        max_new_tokens=GREEDY_STEPS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = made.sequences[:, -GREEDY_STEPS:].numpy()
    scores = torch.stack(made.logits, dim=1).float().numpy()
    best = np.sort(scores, axis=-1)
    margin = float((best[..., -1] - best[..., -2]).min())
    # A placeholder would need features in the forward pass.
    special = scores.shape[-1] - SPECIAL_IDS
    if margin < LEAST_MARGIN or np.isin(ids, EOS).any() or (ids >= special).any():
        return None
    again = outputs_of(model, _with_new(inputs, ids))["logits"][:, -GREEDY_STEPS - 1 : -1]
    if (again.argmax(-1) != ids).any() or np.abs(again - scores).max() > 1e-2:
        raise RuntimeError("generate and a complete forward pass disagree")
    return {"greedy_ids": ids, "greedy_logits": scores}, margin


def _with_new(inputs: Arrays, ids: np.ndarray) -> Arrays:
    """Return inputs with generated tokens appended to the texts."""
    mask = np.concatenate([inputs["attention_mask"], np.ones_like(ids)], axis=1)
    recorded = inputs | {
        "input_ids": np.concatenate([inputs["input_ids"], ids], axis=1),
        "attention_mask": mask,
    }
    if "position_ids" in inputs:
        recorded["position_ids"] = positions_of(mask)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        recorded["mm_token_type_ids"] = np.concatenate([types, np.zeros_like(ids)], axis=1)
    return recorded


def _record(module: torch.nn.Module, into: bool, name: str, recorded: dict) -> Any:
    if into:
        return module.register_forward_pre_hook(
            lambda _, arguments: recorded.__setitem__(name, arguments[0])
        )

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        recorded[name] = output[0] if isinstance(output, tuple) else output

    return module.register_forward_hook(keep)


def _tensors(model: torch.nn.Module, inputs: Arrays) -> dict[str, torch.Tensor]:
    kind = next(model.parameters()).dtype
    recorded = {name: torch.as_tensor(value) for name, value in inputs.items()}
    return {k: v.to(kind) if v.is_floating_point() else v for k, v in recorded.items()}


def _stack(prefix: str, layers: Any, norm: torch.nn.Module) -> Points:
    points: Points = {f"{prefix}.embed": (layers[0], True)}
    points |= {f"{prefix}.layer{index}": (layer, False) for index, layer in enumerate(layers)}
    return points | {f"{prefix}.final": (norm, False)}


def _decoder(model: torch.nn.Module) -> tuple[Points, Callable]:
    core = getattr(model.model, "language_model", model.model)
    points = _stack("hidden", core.layers, core.norm)
    return points, lambda inputs: {"logits": model(**inputs, use_cache=False).logits}


def _edge_v(model: torch.nn.Module) -> tuple[Points, Callable]:
    points, _ = _decoder(model)

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        positions = torch.as_tensor(positions_of(inputs["attention_mask"].numpy()))
        logits = model(**inputs, position_ids=positions, use_cache=False).logits
        if "pixel_values" not in inputs:
            return {"logits": logits}
        features = model.adapter(model.vit(inputs["pixel_values"]).last_hidden_state)
        return {"logits": logits, "vision.features": features}

    return points, run


def _with_vision(model: torch.nn.Module) -> tuple[Points, Callable]:
    points, _ = _decoder(model)
    visual = model.model.visual
    vision = {
        "vision.patch_embed": (visual.patch_embed, False),
        "vision.embeddings": (visual.blocks[0], True),
        **{f"vision.block{i}": (block, False) for i, block in enumerate(visual.blocks)},
        "vision.post_layernorm": (visual.post_layernorm, False),
        "vision.merged": (visual.merger, False),
    }

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        grids = {k: v for k, v in inputs.items() if k.endswith("grid_thw")}
        mask = inputs["attention_mask"]
        if grids:
            types = inputs["mm_token_type_ids"]
            positions, delta = model.model.get_rope_index(
                inputs["input_ids"], types, attention_mask=mask, **grids
            )
        else:
            counted = torch.as_tensor(positions_of(mask.numpy()))
            positions, delta = counted.expand(3, -1, -1), torch.zeros(len(mask), 1).long()
        logits = model(**inputs, position_ids=positions, use_cache=False).logits
        return {"logits": logits, "position_ids": positions, "rope_delta": delta}

    return points | vision, run


def _with_speech(model: torch.nn.Module) -> tuple[Points, Callable]:
    points, plain = _decoder(model)
    tower = model.model.audio_tower
    points |= _convolutions("audio", tower, tower.norm)
    points["audio.projected"] = (model.model.multi_modal_projector, False)

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        recorded = plain(inputs)
        if "input_features" in inputs:
            features = model.get_audio_features(
                inputs["input_features"], inputs["input_features_mask"]
            )
            recorded["audio.features"] = features.pooler_output
        return recorded

    return points, run


def _convolutions(prefix: str, tower: torch.nn.Module, norm: torch.nn.Module) -> Points:
    points = {f"{prefix}.{name}": (getattr(tower, name), False) for name in ("conv1", "conv2")}
    return points | _stack(prefix, tower.layers, norm)


def _whisper(model: torch.nn.Module) -> tuple[Points, Callable]:
    tower = model if hasattr(model, "conv1") else model.get_encoder()

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tower(**inputs)
        return {}

    return _convolutions("hidden", tower, tower.layer_norm), run


def _siglip(model: torch.nn.Module) -> tuple[Points, Callable]:
    tower = getattr(model, "vision_model", model)

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        recorded = tower(**inputs, interpolate_pos_encoding=True)
        pooled = recorded.pooler_output
        return {} if pooled is None else {"pooler_output": pooled}

    return _stack("hidden", tower.encoder.layers, tower.post_layernorm), run


def _text(model: torch.nn.Module) -> tuple[Points, Callable]:
    base = model.base_model
    layers = base.encoder.layer if hasattr(base, "encoder") else base.transformer.layer
    points = _stack("hidden", layers, layers[-1])

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if hasattr(model, "classifier"):
            return {"logits": model(**inputs).logits}
        pooled = getattr(base(**inputs), "pooler_output", None)
        return {} if pooled is None else {"pooler_output": pooled}

    return points, run


_PARTS: dict[str, Callable[[torch.nn.Module], tuple[Points, Callable]]] = {
    "GlmForCausalLM": _decoder,
    "Glm4ForCausalLM": _decoder,
    "Glm4vForConditionalGeneration": _with_vision,
    "GlmOcrForConditionalGeneration": _with_vision,
    "GlmAsrForConditionalGeneration": _with_speech,
    "GlmEdgeV": _edge_v,
    "WhisperForConditionalGeneration": _whisper,
    "WhisperModel": _whisper,
    "WhisperEncoder": _whisper,
    "SiglipVisionModel": _siglip,
    "SiglipModel": _siglip,
    "BertModel": _text,
    "BertForSequenceClassification": _text,
    "BertForMaskedLM": _text,
    "BertForPreTraining": _text,
    "DistilBertModel": _text,
    "DistilBertForSequenceClassification": _text,
    "DistilBertForMaskedLM": _text,
}
